"""The report of a run: one page to read, the plots as files, and the numbers for people (Markdown) and programs (JSON).

The page needs no network: styles and plots are in it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from elastic_core.files.shapes import MeasuredShapes
from elastic_core.geometry import ModelConfig
from elastic_core.layers.kinds import kind_names, sizes_text
from elastic_core.recipe import Recipe
from elastic_core.schema import to_dict
from elastic_core.subnet import Subnet
from tasks.records import EvaluationRecord, OrderComparison
from tasks.reporting.benchmarks import (
    CONTAMINATION,
    PASS_AT_1,
    answers_table,
    benchmark_table,
    contamination_table,
    notes,
)
from tasks.reporting.drawing import THEME, Run
from tasks.reporting.history import read_stages
from tasks.reporting.numbers import fixed, human_bytes, human_count, human_seconds, percent
from tasks.reporting.plots import Plot, draw_all
from tasks.reporting.summary import (
    ORDERS,
    active_column,
    by_size,
    evaluation_warnings,
    markdown_table,
    order_table,
    order_warnings,
    recovered,
    smallest_loss,
    summary_lines,
    summary_table,
)
from tasks.settings import redact


def write_report(
    directory: Path,
    *,
    recipe: Recipe,
    evaluation: EvaluationRecord,
    orders: OrderComparison,
    stages: Sequence[tuple[str, Path]],
    subnets: Mapping[str, Subnet],
    layer_ranking: Sequence[int],
    model: ModelConfig,
    shapes: MeasuredShapes | None,
    links: Mapping[str, str],
) -> Path:
    """Write index.html, one PNG a plot, results.json and results.md into `directory`; returns the page.

    `stages` gives each stage's name and its metrics, one JSON object of `StepMetrics` a line. `subnets` has every
    budget of `evaluation`. `layer_ranking` lists all layers, first those that every subnet keeps. `shapes` are those
    that the subnets were chosen of, None where the router chose alone. `links` has addresses by title; secrets in them
    are hidden, and only http addresses become links.
    """
    run = Run(
        recipe=recipe,
        model=model,
        axes=recipe.axes.bind(model),
        layer_ranking=layer_ranking,
        evaluation=evaluation,
        orders=orders,
        budgets=by_size(evaluation),
        subnets=subnets,
        stages=read_stages(stages),
        shapes=shapes,
    )
    links = {title: redact(address) for title, address in links.items()}
    directory.mkdir(parents=True, exist_ok=True)
    results = json.dumps(_finite(_results(run, links)), indent=2, allow_nan=False)
    (directory / "results.json").write_text(results + "\n", encoding="utf-8")
    (directory / "results.md").write_text(_markdown(run), encoding="utf-8")
    page = directory / "index.html"
    page.write_text(_html(run, links, draw_all(run, directory)), encoding="utf-8")
    return page


def _results(run: Run, links: Mapping[str, str]) -> dict[str, Any]:
    evaluation = to_dict(run.evaluation)
    evaluation["budgets"] = [
        {
            **to_dict(budget),
            "recovered": recovered(run.evaluation, budget),
            "subnet": to_dict(run.subnets[budget.budget]),
        }
        for budget in run.budgets
    ]
    return {
        "family": run.recipe.family,
        "evaluation": evaluation,
        "orders": {
            "heldout_tokens": run.orders.heldout_tokens,
            "cuts": [to_dict(cut) | {"beats_random": cut.beats_random} for cut in run.orders.cuts],
        },
        "storage_bytes": {way: sum(parts.values()) for way, parts in run.storage().items()},
        "stages": [
            {
                "name": stage.name,
                "steps": len(stage.metrics),
                "tokens": stage.tokens,
                "seconds": stage.seconds,
                "final_loss": stage.metrics[-1].loss,
            }
            for stage in run.stages
        ],
        "layer_ranking": list(run.layer_ranking),
        "links": dict(links),
    }


def _finite(value: Any) -> Any:
    """`value` with null for every number that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(run: Run) -> str:
    lines = [f"- **{name}**: {line}" for name, line in summary_lines(run.evaluation).items()]
    parts = [f"# {run.recipe.family}", "\n".join(lines), markdown_table(summary_table(run.evaluation)).rstrip()]
    parts += [f"Warning: {warning}." for warning in evaluation_warnings(run.evaluation)]
    if run.evaluation.scores:
        parts.append(PASS_AT_1)
        parts.append(markdown_table(benchmark_table(run.evaluation)).rstrip())
        parts += notes(run.evaluation, run.recipe.evaluation.endpoint)
        if answers := answers_table(run.evaluation):
            parts.append(markdown_table(answers).rstrip())
    if run.evaluation.contamination:
        parts += [CONTAMINATION, markdown_table(contamination_table(run.evaluation)).rstrip()]
    if run.orders.cuts:
        parts.append(ORDERS)
        parts.append(markdown_table(order_table(run.orders)).rstrip())
        parts += [f"Warning: {warning}." for warning in order_warnings(run.orders)]
    return "\n\n".join(parts) + "\n"


def _shape_rows(run: Run) -> list[dict[str, str]]:
    """The shape and the bytes of every budget, as rows of text by column title."""
    targets = {budget.name: str(budget) for budget in run.recipe.budgets}
    rows, named = [], kind_names(run.model)
    for budget in run.budgets:
        subnet = run.subnets[budget.budget]
        kinds = [run.model.hybrid_override_pattern[layer] for layer in subnet.layers]
        counts = " / ".join(str(kinds.count(kind)) for kind in named)
        rows.append(
            {
                "budget": budget.budget,
                "target": targets.get(budget.budget, "full"),
                "parameters": f"{budget.params:,}",
                **active_column(budget.active_params),
                "share": percent(budget.params / run.evaluation.teacher_params),
                "hidden": str(subnet.hidden),
                f"layers {' / '.join(named.values())}": f"{len(kinds)}: {counts}",
                **sizes_text(run.model, subnet),
                "weights": human_bytes(budget.weight_bytes),
                "memory": human_bytes(budget.memory_bytes),
            }
        )
    return rows


def _stage_rows(run: Run) -> list[dict[str, str]]:
    planned = {stage.name: stage for stage in run.recipe.stages}
    rows = []
    for stage in run.stages:
        plan = planned.get(stage.name)
        rows.append(
            {
                "stage": stage.name,
                "steps": f"{len(stage.metrics):,}",
                "sequence": f"{plan.sequence_length:,}" if plan else "-",
                "batch": f"{plan.batch_size:,}" if plan else "-",
                "router": plan.router.mode if plan else "-",
                "tokens": human_count(stage.tokens),
                "time": human_seconds(stage.seconds),
                "tokens/s": human_count(stage.tokens / stage.seconds) if stage.seconds > 0 else "-",
                "last loss": fixed(stage.metrics[-1].loss, 3),
            }
        )
    return rows


# The page


def _html(run: Run, links: Mapping[str, str], plots: Sequence[tuple["Plot", Markup]]) -> str:
    evaluation = run.evaluation
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        family=run.recipe.family,
        theme=THEME,
        colours=run.colours,
        lines=summary_lines(evaluation),
        facts={
            "teacher's parameters": human_count(evaluation.teacher_params),
            "teacher's loss": f"{fixed(evaluation.teacher_cross_entropy, 3)} nats/token",
            "held-out tokens": human_count(evaluation.heldout_tokens),
            "held-out problems": f"{evaluation.problems:,}" if evaluation.problems else "none",
            "training tokens": human_count(sum(stage.tokens for stage in run.stages)),
            "training time": human_seconds(sum(stage.seconds for stage in run.stages)),
        },
        results=summary_table(evaluation),
        smallest_loss=fixed(smallest_loss(evaluation.heldout_tokens), 4),
        benchmarks=benchmark_table(evaluation),
        pass_at_1=PASS_AT_1,
        notes=notes(evaluation, run.recipe.evaluation.endpoint),
        answers=answers_table(evaluation),
        contaminated=contamination_table(evaluation),
        contamination=CONTAMINATION,
        warnings=[*evaluation_warnings(evaluation), *order_warnings(run.orders)],
        orders=order_table(run.orders),
        random_orders=len(run.orders.cuts[0].at_random) if run.orders.cuts else 0,
        compared_tokens=human_count(run.orders.heldout_tokens),
        shapes=_shape_rows(run),
        stages=_stage_rows(run),
        plots=plots,
        links=links,
        recipe=redact(yaml.safe_dump(to_dict(run.recipe), sort_keys=False, allow_unicode=True)),
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ family }}: report</title>
<style>
:root { color-scheme: light dark; {% for name, (light, dark) in theme.items() %}--{{ name }}: {{ light }}; {% endfor %}}
@media screen and (prefers-color-scheme: dark) {
  :root { {% for name, (light, dark) in theme.items() %}--{{ name }}: {{ dark }}; {% endfor %}}
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 74rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .8rem; padding-bottom: .3rem; font-size: 1.2rem; border-bottom: 1px solid var(--line); }
h3 { margin: 0 0 .2rem; font-size: 1rem; }
.note + h3 { margin-top: 1.6rem; }
p, figcaption { margin: .2rem 0; color: var(--muted); }
figcaption, dt, .note { font-size: .875rem; }
.summary { margin: 1.4rem 0; padding: 0; list-style: none; font-size: 1.05rem; }
.summary li { margin: .35rem 0; }
.warning { color: var(--ink); padding: .5rem .8rem; border-left: .25rem solid var(--c1); background: var(--pale); }
.chip { display: inline-block; width: .75em; height: .75em; margin-right: .45em; border-radius: .2em; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .9rem; margin: 1.4rem 0 0; }
dl div { padding: .6rem .8rem; border-radius: .5rem; background: var(--pale); }
dt { color: var(--muted); }
dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--muted); font-size: .875rem; font-weight: 500; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 600; }
th:first-child { position: sticky; left: 0; background: var(--ground); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 2.2rem 2rem; }
figure { min-width: 0; margin: 0; }
.wide { grid-column: 1 / -1; }
svg { display: block; width: 100%; height: auto; margin-top: .5rem; }
.wide svg { min-width: 44rem; }
pre { padding: 1rem; overflow-x: auto; border-radius: .5rem; background: var(--pale); font-size: .8125rem; }
a { color: var(--c0); }
code { overflow-wrap: anywhere; }
details { margin-top: 1.4rem; }
summary { cursor: pointer; }
.links { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; }
.links dt, .links dd { overflow-wrap: anywhere; font-size: 1rem; font-weight: 400; }
@media print {
  html, body { font-size: 12px; }
  figure, table, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  .wide svg { min-width: 0; }
  table, thead th { font-size: .8rem; }
  th, td { padding: .25rem .35rem; }
  th:first-child { position: static; }
}
</style>
</head>
<body>
{% macro chip(name) %}
{% if name in colours %}<span class="chip" style="background: var(--{{ colours[name] }})"></span>{% endif %}
{% endmacro %}
{% macro table(rows) %}
<div class="scroll">
<table>
<thead><tr>{% for title in rows[0] %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>
{% for cell in row.values() %}
{% if loop.first %}<th scope="row">{{ chip(cell) }}{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
<h1>{{ family }}</h1>
<p>One elastic checkpoint; {{ lines | length }} {{ "size" if lines | length == 1 else "sizes" }}:
{{ lines | join(", ") }}.</p>
<ul class="summary">
{% for name, line in lines.items() %}
<li>{{ chip(name) }}<b>{{ name }}</b>: {{ line }}</li>
{% endfor %}
</ul>
{% for warning in warnings %}
<p class="warning"><b>Warning</b>: {{ warning }}.</p>
{% endfor %}
<dl>
{% for title, fact in facts.items() %}
<div><dt>{{ title }}</dt><dd>{{ fact }}</dd></div>
{% endfor %}
</dl>

<h2>Results</h2>
{{ table(results) }}
<p class="note">Loss is cross-entropy, cut the loss before training, and KL is to the teacher, in nats a token on
held-out data. Accuracy is the share of held-out problems answered exactly. Tokens/s is decoding. Recovered is the share
of the loss of cutting that training won back; "-" where cutting lost less than {{ smallest_loss }} nats a token, too
little to tell from noise.</p>

{% if benchmarks %}
<h2>Benchmarks</h2>
{{ table(benchmarks) }}
<p class="note">{{ pass_at_1 }}
{% for note in notes %}
{{ note }}
{% endfor %}
</p>
{% if answers %}
<h3>Answers</h3>
{{ table(answers) }}
<p class="note">The error of the runs is that of pass@1, were the same problems answered again. Without an answer is the
share of completions that give none, an endless thought among them; cut off is the share that came to the limit of
tokens, and too slow the share whose program was stopped because of its time. Tokens a solution are those of a
completion, its thought included.</p>
{% endif %}
{% if contaminated %}
<h3>Contamination</h3>
{{ table(contaminated) }}
<p class="note">{{ contamination }}</p>
{% endif %}

{% endif %}
{% if orders %}
<h2>Order of importance</h2>
{{ table(orders) }}
<p class="note">KL to the teacher, in nats a token on {{ compared_tokens }} held-out tokens, where one axis of it alone
is cut, with no training. At random is the mean and the standard deviation of {{ random_orders }} random orders.
Importance loses less where it is below that mean by more than the mean's standard error.</p>

{% endif %}
<h2>Plots</h2>
<div class="plots">
{% for plot, svg in plots %}
<figure{% if plot.wide %} class="wide"{% endif %}>
<h3>{{ plot.title }}</h3>
<figcaption>{{ plot.caption }}</figcaption>
<div class="scroll" role="img" aria-label="{{ plot.title }}">{{ svg }}</div>
</figure>
{% endfor %}
</div>

<h2>Shapes</h2>
{{ table(shapes) }}
<p class="note">Mamba-2 is heads x channels, attention heads, FFN neurons. Memory is the weights and the caches of the
decoded batch.</p>

<h2>Run</h2>
{% if stages %}
{{ table(stages) }}
{% endif %}
{% if links %}
<dl class="links">
{% for title, address in links.items() %}
<dt>{{ title }}</dt>
{% if address.startswith(("http://", "https://")) %}
<dd><a href="{{ address }}" rel="noopener noreferrer">{{ address }}</a></dd>
{% else %}
<dd><code>{{ address }}</code></dd>
{% endif %}
{% endfor %}
</dl>
{% endif %}
<details>
<summary>Recipe</summary>
<pre>{{ recipe }}</pre>
</details>
</body>
</html>
"""
