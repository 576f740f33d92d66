"""The report of a run: one page to read, the plots as files, and the numbers for people (Markdown) and programs (JSON).

The page needs no network: styles and plots are in it. A plot is drawn once in the light theme; its PNG keeps that
theme, and in the page its colours become CSS variables, so that one drawing serves light and dark.
"""

import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from elastic_core.config import ATTENTION, FFN, MAMBA, Axes, ModelConfig, Recipe, to_dict
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.train import BudgetMetrics, StepMetrics
from tasks.records import BudgetEvaluation, EvaluationRecord
from tasks.settings import redact

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Panel
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

AXIS_TITLES = {
    "hidden": "hidden channels",
    "ffn": "FFN neurons",
    "mamba_heads": "Mamba heads",
    "mamba_head_dim": "Mamba head channels",
    "attention_heads": "attention heads",
    "depth": "layers",
}
KIND_TITLES = {MAMBA: "Mamba-2", FFN: "FFN", ATTENTION: "attention"}

# Names of CSS variables, each with its colour in the light and in the dark theme. c0, c1, ... are the budgets', from
# the largest; the first four stay apart under every colour blindness (at least 15 in CIELAB), on both grounds.
THEME = {
    "ink": ("#1b2430", "#e6ebf1"),
    "muted": ("#5b6776", "#9ba8b7"),
    "line": ("#dce2e9", "#333d49"),
    "pale": ("#eef1f5", "#222a34"),
    "ground": ("#ffffff", "#15191f"),
    "c0": ("#1a6fc4", "#4f9cf9"),
    "c1": ("#e8590c", "#ff7a1a"),
    "c2": ("#5a1846", "#f5c2e7"),
    "c3": ("#00916e", "#2fbf8f"),
    "c4": ("#d14d9e", "#c24fb0"),
    "c5": ("#8a6d00", "#d9bb4a"),
}
INK, MUTED, LINE, PALE, GROUND = (THEME[name][0] for name in ("ink", "muted", "line", "pale", "ground"))
MARKERS = "osD^vP"
DASHES = (0, (4, 3))
DOT = {"linestyle": "none", "markeredgecolor": GROUND, "clip_on": False, "zorder": 5}

COLUMN, WIDE = 5.2, 11.0  # widths of a plot in inches: half the page, or all of it
SMOOTHING = 0.03  # a smoothed line averages this share of its stage's steps


# Numbers for people


def human_count(count: float) -> str:
    """A count with three digits: 12.3B, 4.56M, 812K, 95."""
    return "".join(_scaled(count, ("", "K", "M", "B", "T")))


def human_bytes(count: float) -> str:
    """Bytes in decimal units: 24.6 GB."""
    return " ".join(_scaled(count, ("B", "kB", "MB", "GB", "TB", "PB")))


def human_seconds(seconds: float) -> str:
    """A duration in its two largest units: 3 min 20 s."""
    minutes, hours = round(seconds) // 60, round(seconds) // 3600
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.3g} s"


def _scaled(count: float, units: Sequence[str]) -> tuple[str, str]:
    power = 0
    while power < len(units) - 1 and abs(float(f"{count:.3g}")) >= 1000:
        count, power = count / 1000, power + 1
    return f"{count:.3g}", units[power]


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{share * 100:.{digits}f} %"


# The budget table


def by_size(evaluation: EvaluationRecord) -> list[BudgetEvaluation]:
    """The budgets from the largest to the smallest."""
    return sorted(evaluation.budgets, key=lambda budget: budget.params, reverse=True)


def recovered(evaluation: EvaluationRecord, budget: BudgetEvaluation) -> float | None:
    """The share of what cutting lost that training won back; None for the full model, which cuts nothing."""
    if budget.params >= evaluation.teacher_params:
        return None
    return budget.recovered(evaluation.teacher_cross_entropy)


def summary_table(evaluation: EvaluationRecord) -> list[dict[str, str]]:
    """The teacher and every budget, largest first, as rows of text by column title; "-" stands for "not measured"."""
    teacher = {
        "budget": "teacher",
        "parameters": f"{evaluation.teacher_params:,}",
        "loss": _fixed(evaluation.teacher_cross_entropy, 3),
        "KL": "-",
        "accuracy": _percent(evaluation.teacher_accuracy, 1),
        "tokens/s": "-",
        "size": "-",
        "recovered": "-",
    }
    rows = [
        {
            "budget": budget.budget,
            "parameters": f"{budget.params:,}",
            "loss": _fixed(budget.cross_entropy, 3),
            "KL": _fixed(budget.kl, 4),
            "accuracy": _percent(budget.accuracy, 1),
            "tokens/s": _fixed(budget.tokens_per_second, 0 if budget.tokens_per_second >= 100 else 1),
            "size": human_bytes(budget.weight_bytes),
            "recovered": _percent(recovered(evaluation, budget), 1),
        }
        for budget in by_size(evaluation)
    ]
    return [teacher, *rows]


def summary_lines(evaluation: EvaluationRecord) -> dict[str, str]:
    """What became of each budget, in plain words, by budget."""
    lines = {}
    for budget in by_size(evaluation):
        loss, share = _above_teacher(evaluation, budget), recovered(evaluation, budget)
        lines[budget.budget] = (
            f"{_percent(budget.params / evaluation.teacher_params)} of the parameters, "
            f"{loss:+.3f} nats a token {'over' if loss >= 0 else 'below'} the teacher"
            + (f", {_percent(share)} of what cutting lost is recovered" if share is not None else "")
        )
    return lines


def _above_teacher(evaluation: EvaluationRecord, budget: BudgetEvaluation) -> float:
    """Cross-entropy above the teacher's, rounded as it is shown, and never minus zero."""
    return round(budget.cross_entropy - evaluation.teacher_cross_entropy, 3) + 0.0


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal columns as a Markdown table; every column but the first is aligned right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    titles = list(rows[0])
    rule = "|" + "|".join([" --- ", *[" ---: "] * (len(titles) - 1)]) + "|"
    return "\n".join([line(titles), rule, *(line([row[title] for title in titles]) for row in rows)]) + "\n"


# The metrics of the stages


def read_metrics(path: Path) -> list[StepMetrics]:
    """The steps of a stage in order, from JSON lines.

    A run that was killed and resumed writes some steps twice, of which the last counts, and may leave a line
    unfinished, which is passed over.
    """
    steps: dict[int, StepMetrics] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            _log.info("%s: passed over an unfinished line", path)
            continue
        budgets = {name: BudgetMetrics(**budget) for name, budget in record.pop("budgets").items()}
        steps[record["step"]] = StepMetrics(budgets=budgets, **record)
    return [steps[step] for step in sorted(steps)]


Pick = Callable[[BudgetMetrics], float | None]


@dataclass(frozen=True, slots=True)
class _Stage:
    """A stage's steps, and how many steps came before it."""

    name: str
    first: int
    metrics: Sequence[StepMetrics]

    @property
    def end(self) -> int:
        return self.first + self.metrics[-1].step + 1

    @property
    def tokens(self) -> int:
        return sum(m.tokens for m in self.metrics)

    @property
    def seconds(self) -> float:
        return sum(m.seconds for m in self.metrics)

    def curve(self, budget: str, pick: Pick) -> tuple[np.ndarray, np.ndarray]:
        """Steps, counted over all stages, and the finite values that `pick` finds of a budget."""
        values = [(self.first + m.step, pick(m.budgets[budget])) for m in self.metrics if budget in m.budgets]
        points = [(step, value) for step, value in values if value is not None and math.isfinite(value)]
        return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _stages(metrics: Sequence[tuple[str, Path]]) -> list[_Stage]:
    read = [(name, steps) for name, path in metrics if (steps := read_metrics(path))]
    firsts = accumulate((steps[-1].step + 1 for _, steps in read), initial=0)
    return [_Stage(name, first, steps) for (name, steps), first in zip(read, firsts, strict=False)]


# The report


@dataclass(frozen=True, slots=True)
class _Run:
    """All that a report tells of; `budgets` are the evaluated ones from the largest to the smallest."""

    recipe: Recipe
    model: ModelConfig
    axes: Axes
    layer_ranking: Sequence[int]
    evaluation: EvaluationRecord
    budgets: Sequence[BudgetEvaluation]
    subnets: Mapping[str, Subnet]
    stages: Sequence[_Stage]

    @property
    def colours(self) -> dict[str, str]:
        """The theme's name for each budget's colour."""
        return {budget.budget: f"c{i % len(MARKERS)}" for i, budget in enumerate(self.budgets)}

    def style(self, budget: str) -> dict[str, Any]:
        """How a budget's lines and markers are drawn; larger budgets bolder, so that they show behind smaller ones."""
        index = list(self.colours).index(budget) % len(MARKERS)
        colour = THEME[self.colours[budget]][0]
        return {
            "color": colour,
            "marker": MARKERS[index],
            "markersize": max(7, 9 - index),
            "linewidth": 2 - 0.15 * index,
        }

    def size(self, budget: str, axis: str) -> float:
        """The size of a budget's subnet on an axis, averaged over its layers, as the router's metrics are."""
        value = getattr(self.subnets[budget], axis)
        return sum(value) / max(1, len(value)) if isinstance(value, tuple) else value

    def storage(self) -> dict[str, dict[str, int]]:
        """Bytes of the family's weights by way of storing them, and in each by what holds them."""
        sizes = {budget.budget: budget.weight_bytes for budget in self.budgets}
        largest = self.budgets[0]
        shells, inner = {}, 0
        for name, size in reversed(sizes.items()):
            shells[name], inner = max(0, size - inner), max(size, inner)
        whole = round(largest.weight_bytes / largest.params * self.evaluation.teacher_params)
        return {"separate checkpoints": sizes, "one elastic checkpoint": {"all sizes": whole}, "nested storage": shells}


def write_report(
    directory: Path,
    *,
    recipe: Recipe,
    evaluation: EvaluationRecord,
    stages: Sequence[tuple[str, Path]],
    subnets: Mapping[str, Subnet],
    layer_ranking: Sequence[int],
    model: ModelConfig,
    links: Mapping[str, str],
) -> Path:
    """Write index.html, one PNG a plot, results.json and results.md into `directory`; returns the page.

    `stages` gives each stage's name and its metrics, one JSON object of `StepMetrics` a line. `subnets` has every
    budget of `evaluation`. `layer_ranking` lists all layers, most important first. `links` has addresses by title;
    secrets in them are hidden, and only http addresses become links.
    """
    run = _Run(
        recipe=recipe,
        model=model,
        axes=recipe.axes.bind(model),
        layer_ranking=layer_ranking,
        evaluation=evaluation,
        budgets=by_size(evaluation),
        subnets=subnets,
        stages=_stages(stages),
    )
    links = {title: redact(address) for title, address in links.items()}
    directory.mkdir(parents=True, exist_ok=True)
    results = json.dumps(_finite(_results(run, links)), indent=2, allow_nan=False)
    (directory / "results.json").write_text(results + "\n", encoding="utf-8")
    (directory / "results.md").write_text(_markdown(run), encoding="utf-8")
    page = directory / "index.html"
    page.write_text(_html(run, links, _draw_all(run, directory)), encoding="utf-8")
    return page


def _results(run: _Run, links: Mapping[str, str]) -> dict[str, Any]:
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


def _markdown(run: _Run) -> str:
    lines = [f"- **{name}**: {line}" for name, line in summary_lines(run.evaluation).items()]
    return "\n".join([f"# {run.recipe.family}", "", *lines, "", markdown_table(summary_table(run.evaluation))])


def _shape_rows(run: _Run) -> list[dict[str, str]]:
    """The shape and the bytes of every budget, as rows of text by column title."""
    targets = {budget.name: budget.params for budget in run.recipe.budgets}
    rows = []
    for budget in run.budgets:
        subnet, target = run.subnets[budget.budget], targets.get(budget.budget)
        kinds = [run.model.hybrid_override_pattern[layer] for layer in subnet.layers]
        heads = _span(run, subnet, MAMBA, subnet.mamba_heads)
        rows.append(
            {
                "budget": budget.budget,
                "target": f"{target:,}" if target is not None else "full",
                "parameters": f"{budget.params:,}",
                "share": _percent(budget.params / run.evaluation.teacher_params),
                "hidden": str(subnet.hidden),
                "layers M / - / *": f"{len(kinds)}: " + " / ".join(str(kinds.count(kind)) for kind in KIND_TITLES),
                "FFN": _span(run, subnet, FFN, subnet.ffn),
                "Mamba heads": f"{heads} x {subnet.mamba_head_dim}" if heads != "-" else "-",
                "attention heads": _span(run, subnet, ATTENTION, subnet.attention_heads),
                "weights": human_bytes(budget.weight_bytes),
                "memory": human_bytes(budget.memory_bytes),
            }
        )
    return rows


def _span(run: _Run, subnet: Subnet, kind: str, sizes: Sequence[int]) -> str:
    """The sizes of the kept layers of a kind: one number, or the smallest and the largest."""
    kept = {sizes[run.model.ordinal(i)] for i in subnet.layers if run.model.hybrid_override_pattern[i] == kind}
    return "-".join(str(size) for size in sorted({min(kept), max(kept)})) if kept else "-"


def _stage_rows(run: _Run) -> list[dict[str, str]]:
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
                "last loss": _fixed(stage.metrics[-1].loss, 3),
            }
        )
    return rows


# The page


def _html(run: _Run, links: Mapping[str, str], plots: Sequence[tuple["_Plot", Markup]]) -> str:
    evaluation = run.evaluation
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        family=run.recipe.family,
        theme=THEME,
        colours=run.colours,
        lines=summary_lines(evaluation),
        facts={
            "teacher's parameters": human_count(evaluation.teacher_params),
            "teacher's loss": f"{_fixed(evaluation.teacher_cross_entropy, 3)} nats/token",
            "held-out tokens": human_count(evaluation.heldout_tokens),
            "held-out problems": f"{evaluation.problems:,}" if evaluation.problems else "none",
            "training tokens": human_count(sum(stage.tokens for stage in run.stages)),
            "training time": human_seconds(sum(stage.seconds for stage in run.stages)),
        },
        results=summary_table(evaluation),
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
p, figcaption { margin: .2rem 0; color: var(--muted); }
figcaption, dt, .note { font-size: .875rem; }
.summary { margin: 1.4rem 0; padding: 0; list-style: none; font-size: 1.05rem; }
.summary li { margin: .35rem 0; }
.chip { display: inline-block; width: .75em; height: .75em; margin-right: .45em; border-radius: .2em; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .9rem; margin: 1.4rem 0 0; }
dl div { padding: .6rem .8rem; border-radius: .5rem; background: var(--pale); }
dt { color: var(--muted); }
dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--muted); font-size: .875rem; font-weight: 500; }
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
@media print { figure, tr { break-inside: avoid; } }
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
<dl>
{% for title, fact in facts.items() %}
<div><dt>{{ title }}</dt><dd>{{ fact }}</dd></div>
{% endfor %}
</dl>

<h2>Results</h2>
{{ table(results) }}
<p class="note">Loss is cross-entropy, and KL is to the teacher, in nats a token on held-out data. Accuracy is the
share of held-out problems answered exactly. Tokens/s is decoding. Recovered is the share of the loss of cutting with
no training that training won back.</p>

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
<p class="note">M is Mamba-2, - is FFN, * is attention. Mamba heads are heads x channels. Memory is the weights and
the caches of the decoded batch.</p>

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


# The plots


@contextmanager
def _drawing() -> Iterator[None]:
    """Matplotlib in this report's style, with nothing of the user's, and silent about its caches and missing glyphs."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            import matplotlib.style  # late, to be silenced, and because the tables alone do without

            with matplotlib.style.context(STYLE, after_reset=True):
                yield
    finally:
        logger.setLevel(level)


STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.facecolor": GROUND,
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "path.simplify_threshold": 0.5,
    "svg.hashsalt": "report",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
}


def _draw_all(run: _Run, directory: Path) -> list[tuple["_Plot", Markup]]:
    """Every plot that the run has data for: a PNG in `directory`, and the SVG to put in the page."""
    drawn = []
    with _drawing():
        for plot in PLOTS:
            figure = plot.draw(run)
            if figure is not None:
                figure.savefig(directory / f"{plot.name}.png", dpi=180)
                figure.set_layout_engine("none")  # it is laid out now, and need not be again
                drawn.append((plot, _svg(figure)))
    return drawn


def _svg(figure: "Figure") -> Markup:
    """The figure as an <svg> element in the theme's variables, without comments, name spaces and metadata."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", facecolor="none", metadata=metadata)
    svg = re.sub(r"<!--.*?-->|\s+xmlns(:xlink)?=\"[^\"]*\"", "", buffer.getvalue(), flags=re.DOTALL)
    for name, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{name})")
    return Markup(svg[svg.index("<svg") :])


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _legend(figure: "Figure", panel: "Panel") -> None:
    """One legend above the figure, with each label once, in as many columns as fit."""
    handles, labels = panel.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    columns = max(1, int(figure.get_figwidth() / (0.5 + 0.07 * max(map(len, labels)))))
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns, handlelength=1.6)


def _count_tick(value: float, _: float) -> str:
    return human_count(value)


def _draw_curves(panel: "Panel", run: _Run, stages: Sequence[_Stage], pick: Pick) -> None:
    """Each budget's values over the stages, the raw line faint behind its rolling mean, and the stages' names."""
    for stage, budget in product(stages, run.colours):
        steps, values = stage.curve(budget, pick)
        if not len(steps):
            continue
        style, width = run.style(budget), max(1, round(SMOOTHING * len(values)))
        if width > 1:
            panel.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.7)
        lone = {} if len(steps) == 1 else {"marker": None}
        panel.plot(steps, _rolling_mean(values, width), label=budget, **style | lone)
    start, end = stages[0].first, stages[-1].end
    for stage in stages:
        if stage is not stages[0]:
            panel.axvline(stage.first - 0.5, color=MUTED, linewidth=0.9, linestyle=DASHES)
        above = {"xycoords": panel.get_xaxis_transform(), "xytext": (2, 3), "textcoords": "offset points"}
        if (stage.end - stage.first) / (end - start) > 0.023 * len(stage.name):  # there is room for the name
            panel.annotate(stage.name, (stage.first - 0.5, 1), color=MUTED, fontsize=8, **above)
    panel.set_xlim(start - 0.5, end - 0.5)
    panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    panel.xaxis.set_major_formatter(_count_tick)


def _rolling_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` values around each, of fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _draw_quality(run: _Run) -> "Figure":
    teacher, loss = run.evaluation.teacher_params, run.evaluation.teacher_cross_entropy
    sizes = [budget.params for budget in run.budgets]
    figure = _figure(COLUMN, 5.4)
    whole, close = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
    for panel in (whole, close):
        panel.axhline(loss, color=INK, linewidth=1, linestyle=DASHES)
        panel.plot(teacher, loss, "o", color=INK, markersize=14, markerfacecolor="none", clip_on=False, label="teacher")
        panel.plot(sizes, [budget.cross_entropy for budget in run.budgets], color=MUTED, linewidth=1)
        for budget in run.budgets:
            panel.plot(budget.params, budget.cross_entropy, label=budget.budget, **run.style(budget.budget) | DOT)
        panel.set_ylabel("nats a token")
    cut = {"color": MUTED, "linewidth": 1.2, "markersize": 7}
    whole.plot(sizes, [b.cut_cross_entropy for b in run.budgets], "x-", label="cut by importance", **cut)
    whole.plot(sizes, [b.random_cut_cross_entropy for b in run.budgets], "+:", label="cut at random", **cut)
    whole.set_title("held-out cross-entropy, trained and cut with no training")
    for budget in run.budgets:
        text = f"{budget.budget} {_above_teacher(run.evaluation, budget):+.3f}"
        beside = {"xytext": (8, 6), "textcoords": "offset points", "color": run.style(budget.budget)["color"]}
        close.annotate(text, (budget.params, budget.cross_entropy), **beside)
    close.margins(y=0.3)
    close.set_title("close up: the family against its teacher")
    close.set_xlim(min(sizes) - 0.12 * teacher, 1.25 * teacher)
    close.set_xlabel("parameters")
    close.xaxis.set_major_formatter(_count_tick)
    _legend(figure, whole)
    return figure


def _draw_loss(run: _Run) -> "Figure | None":
    picks: dict[str, Pick] = {
        "KL to the teacher": lambda b: b.kl if b.kl > 0 else None,
        "cross-entropy on the training data": lambda b: b.cross_entropy if b.cross_entropy > 0 else None,
    }
    curves = {
        title: np.concatenate([stage.curve(name, pick)[1] for stage, name in product(run.stages, run.colours)])
        for title, pick in picks.items()
        if run.stages
    }
    shown = {title: values for title, values in curves.items() if len(values)}
    if not shown:
        return None
    figure = _figure(COLUMN, 0.8 + 2.2 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, values) in zip(panels, shown.items(), strict=True):
        _draw_curves(panel, run, run.stages, picks[title])
        panel.set_title(title, pad=16)
        panel.set_ylabel("nats a token")
        # The first steps after a cut lie far above the rest, and the first KL of a full model next to zero.
        low, high = np.quantile(values, (0.02, 1))
        if high > 4 * low:
            panel.set_yscale("log", subs=[2, 5])
            panel.yaxis.set_minor_formatter("{x:g}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_ylim(low / 1.1, high * 1.1)
    panels[-1].set_xlabel("optimizer steps")
    _legend(figure, panels[0])
    return figure


def _routed(run: _Run) -> list[_Stage]:
    """The stages in which the router makes choices."""
    return [s for s in run.stages if any(budget.choices for m in s.metrics for budget in m.budgets.values())]


def _share_chosen(axis: str, full: int) -> Pick:
    """The router's expected size on an axis as a share of the full size."""
    return lambda budget: budget.choices[axis] / full if budget.choices else None


def _draw_router(run: _Run) -> "Figure | None":
    stages = _routed(run)
    elastic = [axis for axis in run.axes.NAMES if len(run.axes.choices(axis)) > 1]
    if not stages or not elastic:
        return None
    columns = min(3, len(elastic))
    rows = math.ceil(len(elastic) / columns)
    figure = _figure(WIDE, 0.6 + 2.3 * rows)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for panel in panels[len(elastic) :]:
        panel.remove()
    for panel, axis in zip(panels, elastic, strict=False):
        choices = run.axes.choices(axis)
        full, span = choices[0], 1 - choices[-1] / choices[0]
        for name in run.colours:
            panel.plot(stages[-1].end - 0.5, run.size(name, axis) / full, label=name, **run.style(name) | DOT)
        _draw_curves(panel, run, stages, _share_chosen(axis, full))
        panel.set_title(AXIS_TITLES[axis], pad=16)
        ticks = [c for i, c in enumerate(choices) if i == 0 or (choices[i - 1] - c) / full > 0.08 * span]
        panel.set_yticks([c / full for c in ticks], [f"{c} ({_percent(c / full)})" for c in ticks], fontsize=8)
        panel.set_ylim(1 - 1.1 * span, 1 + 0.1 * span)
        panel.tick_params(labelbottom=True)
    figure.supxlabel("optimizer steps", color=MUTED, fontsize=9)
    _legend(figure, panels[0])
    return figure


def _draw_params(run: _Run) -> "Figure | None":
    stages = _routed(run)
    if not stages:
        return None
    figure = _figure(COLUMN, 3.4)
    panel = figure.subplots()
    targets = {budget.name: budget.params for budget in run.recipe.budgets}
    for budget in run.budgets:
        style, target = run.style(budget.budget), targets.get(budget.budget)
        panel.plot(stages[-1].end - 0.5, budget.params, label=budget.budget, **style | DOT)
        if target is not None:
            panel.axhline(target, color=style["color"], linewidth=1, linestyle=DASHES)
    panel.plot([], [], color=MUTED, linewidth=1, linestyle=DASHES, label="target")
    _draw_curves(panel, run, stages, lambda b: b.expected_params if b.choices else None)
    panel.set_ylabel("parameters")
    panel.yaxis.set_major_formatter(_count_tick)
    panel.set_xlabel("optimizer steps")
    _legend(figure, panel)
    return figure


def _draw_storage(run: _Run) -> "Figure":
    ways = run.storage()
    figure = _figure(COLUMN, 2.6)
    panel = figure.subplots()
    most = max(sum(parts.values()) for parts in ways.values())
    for row, parts in enumerate(ways.values()):
        left = 0
        for name, size in parts.items():
            colour = run.style(name)["color"] if name in run.colours else MUTED
            panel.barh(row, size, left=left, height=0.62, color=colour, edgecolor=GROUND)
            if size / most > 0.02 + 0.035 * len(name):  # there is room for the name
                panel.text(left + size / 2, row, name, color=GROUND, ha="center", va="center", fontweight="bold")
            left += size
        panel.text(left + 0.015 * most, row, human_bytes(left), va="center")
    panel.set_yticks(range(len(ways)), list(ways), color=INK)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.2 * most)
    panel.locator_params(axis="x", nbins=5)
    panel.set_xlabel("bytes of weights")
    panel.xaxis.set_major_formatter(lambda value, _: human_bytes(value))
    panel.grid(visible=False, axis="y")
    return figure


def _draw_anatomy(run: _Run) -> "Figure":
    pattern = run.model.hybrid_override_pattern
    names = list(run.colours)
    figure = _figure(WIDE, 1.2 + 0.55 * len(names))
    panel = figure.subplots()
    layers = range(len(pattern))
    panel.bar(run.layer_ranking, [0.8 * (1 - rank / len(pattern)) for rank in layers], color=MUTED)
    for row, name in enumerate(names, start=1):
        subnet = run.subnets[name]
        dropped = [layer for layer in layers if layer not in subnet.layers]
        shares = [0.8 * _width_share(run.model, subnet, layer) for layer in subnet.layers]
        panel.bar(dropped, 0.8, bottom=-row, color="none", edgecolor=LINE)
        panel.bar(subnet.layers, 0.8, bottom=-row, color=PALE)
        panel.bar(subnet.layers, shares, bottom=-row, color=run.style(name)["color"])
        beside = {"xytext": (8, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        panel.annotate(_widths(run, subnet), (len(pattern) - 0.5, 0.4 - row), annotation_clip=False, **beside)
    panel.set_yticks([0.4 - row for row in range(len(names) + 1)], ["layer importance", *names], color=INK)
    panel.set_xticks(layers, list(pattern), fontsize=min(9, 480 / len(pattern)), color=INK)
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    panel.set_xlim(-0.6, len(pattern) - 0.4)
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.set_xlabel(", ".join(f"{kind} {title}" for kind, title in KIND_TITLES.items()))
    return figure


def _width_share(model: ModelConfig, subnet: Subnet, layer: int) -> float:
    """A kept layer's width as a share of the full model's."""
    kind, ordinal, full = model.hybrid_override_pattern[layer], model.ordinal(layer), full_subnet(model)
    if kind == FFN:
        return subnet.ffn[ordinal] / full.ffn[ordinal]
    if kind == ATTENTION:
        return subnet.attention_heads[ordinal] / full.attention_heads[ordinal]
    return subnet.mamba_heads[ordinal] * subnet.mamba_head_dim / model.mamba_size


def _widths(run: _Run, subnet: Subnet) -> str:
    """A subnet's shape in a line and a half, for a label."""
    heads = _span(run, subnet, MAMBA, subnet.mamba_heads)
    return (
        f"{subnet.depth} layers, hidden {subnet.hidden}, FFN {_span(run, subnet, FFN, subnet.ffn)}\n"
        f"Mamba {heads} x {subnet.mamba_head_dim}, attention {_span(run, subnet, ATTENTION, subnet.attention_heads)}"
    )


def _draw_accuracy(run: _Run) -> "Figure | None":
    overall = {"teacher": run.evaluation.teacher_accuracy} | {b.budget: b.accuracy for b in run.budgets}
    tasks = sorted({task for budget in run.budgets for task in budget.accuracy_by_task})
    groups = {"all problems": overall} | {
        task: {b.budget: b.accuracy_by_task.get(task) for b in run.budgets} for task in tasks
    }
    bars = {
        group: {name: 100 * share for name, share in shares.items() if share is not None}
        for group, shares in groups.items()
    }
    bars = {group: shares for group, shares in bars.items() if shares}
    if not bars:
        return None
    figure = _figure(WIDE, 3.2)
    panel = figure.subplots()
    width = 0.8 / max(map(len, bars.values()))
    for column, shares in enumerate(bars.values()):
        for i, (name, share) in enumerate(shares.items()):
            x = column + width * (i + 0.5 - len(shares) / 2)
            colour = run.style(name)["color"] if name in run.colours else MUTED
            panel.bar(x, share, width=0.86 * width, color=colour, label=name)
            if sum(map(len, bars.values())) <= 45:  # there is room for the numbers
                panel.text(x, share + 1, f"{share:.0f}", ha="center", fontsize=8, color=MUTED)
    panel.set_xticks(range(len(bars)), list(bars), color=INK, rotation=30 if len(bars) > 8 else 0)
    panel.set_ylim(0, 105)
    panel.set_ylabel("answered exactly (%)")
    panel.grid(visible=False, axis="x")
    _legend(figure, panel)
    return figure


@dataclass(frozen=True, slots=True)
class _Plot:
    """A plot of the report; `draw` returns None for a run without the data for it."""

    name: str
    title: str
    caption: str
    draw: Callable[[_Run], "Figure | None"]
    wide: bool = False


PLOTS = (
    _Plot(
        "quality",
        "Quality against size",
        "Trained members of the family, and the teacher cut to the same shapes with no training.",
        _draw_quality,
    ),
    _Plot("loss", "Loss by budget", "The faint line is every step, the full line its rolling mean.", _draw_loss),
    _Plot(
        "router",
        "The router's choices",
        "Expected size on each elastic axis, by budget. The marker at the end is the size deployed.",
        _draw_router,
        wide=True,
    ),
    _Plot(
        "params",
        "Expected parameters",
        "The router's expected parameters; dashed, the budget's target; the marker at the end, the size deployed.",
        _draw_params,
    ),
    _Plot("storage", "Storage", "What the weights of all sizes take, by way of storing them.", _draw_storage),
    _Plot(
        "anatomy",
        "Anatomy",
        "The layers each budget keeps. A bar's height is the layer's width as a share of the full one's.",
        _draw_anatomy,
        wide=True,
    ),
    _Plot("accuracy", "Accuracy by kind of problem", "Held-out problems answered exactly.", _draw_accuracy, wide=True),
)
