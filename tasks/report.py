"""The report of a run: one page to read, the plots as files, and the numbers for people (Markdown) and programs (JSON).

The page needs no network: styles and plots are in it. A plot is drawn once in the light theme; its PNG keeps that
theme, and in the page its colours become CSS variables, so that one drawing serves light and dark.
"""

import dataclasses
import io
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
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
    from matplotlib.axes import Axes as Plot
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
    """What became of each budget, in a sentence, by budget."""
    lines = {}
    for budget in by_size(evaluation):
        delta = budget.cross_entropy - evaluation.teacher_cross_entropy
        share = recovered(evaluation, budget)
        parts = [
            f"{_percent(budget.params / evaluation.teacher_params)} of the parameters",
            f"{delta:+.3f} nats a token over the teacher"
            if round(delta, 3) >= 0
            else f"{-delta:.3f} nats a token below the teacher",
        ]
        if share is not None:
            parts.append(f"{_percent(share)} of what cutting lost is recovered")
        lines[budget.budget] = ", ".join(parts)
    return lines


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
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            torn += 1
            continue
        budgets = {name: BudgetMetrics(**budget) for name, budget in record.pop("budgets").items()}
        steps[record["step"]] = StepMetrics(budgets=budgets, **record)
    if torn:
        _log.warning("%s: passed over %d unfinished line(s)", path, torn)
    return [steps[step] for step in sorted(steps)]


@dataclass(frozen=True)
class _Stage:
    """A stage's steps, and how many steps came before it."""

    name: str
    first: int
    metrics: Sequence[StepMetrics]

    @property
    def end(self) -> int:
        return self.first + self.metrics[-1].step + 1

    def curve(self, budget: str, pick: Callable[[BudgetMetrics], float | None]) -> tuple[np.ndarray, np.ndarray]:
        """Steps, counted over all stages, and the finite values that `pick` finds of a budget."""
        values = [(self.first + m.step, pick(m.budgets[budget])) for m in self.metrics if budget in m.budgets]
        points = [(step, value) for step, value in values if value is not None and math.isfinite(value)]
        return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _stages(metrics: Sequence[tuple[str, Path]]) -> list[_Stage]:
    read = [(name, steps) for name, path in metrics if (steps := read_metrics(path))]
    firsts = accumulate((steps[-1].step + 1 for _, steps in read), initial=0)
    return [_Stage(name, first, steps) for (name, steps), first in zip(read, firsts, strict=False)]


# The report


@dataclass(frozen=True)
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

    @cached_property
    def colour_names(self) -> dict[str, str]:
        """The theme's name for each budget's colour."""
        return {budget.budget: f"c{i % len(MARKERS)}" for i, budget in enumerate(self.budgets)}

    def colour(self, budget: str) -> str:
        return THEME[self.colour_names[budget]][0]

    def marker(self, budget: str) -> str:
        return MARKERS[int(self.colour_names[budget][1:])]

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
        return {"separate checkpoints": sizes, "one elastic checkpoint": {"all": whole}, "nested storage": shells}


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
                "tokens": sum(m.tokens for m in stage.metrics),
                "seconds": sum(m.seconds for m in stage.metrics),
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
        seconds, tokens = sum(m.seconds for m in stage.metrics), sum(m.tokens for m in stage.metrics)
        plan = planned.get(stage.name)
        rows.append(
            {
                "stage": stage.name,
                "steps": f"{len(stage.metrics):,}",
                "sequence": f"{plan.sequence_length:,}" if plan else "-",
                "batch": f"{plan.batch_size:,}" if plan else "-",
                "router": plan.router.mode if plan else "-",
                "tokens": human_count(tokens),
                "time": human_seconds(seconds),
                "tokens/s": human_count(tokens / seconds) if seconds > 0 else "-",
                "last loss": _fixed(stage.metrics[-1].loss, 3),
            }
        )
    return rows


# The page


def _html(run: _Run, links: Mapping[str, str], plots: Sequence[tuple["_Kind", Markup]]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    evaluation = run.evaluation
    facts = {
        "teacher": f"{human_count(evaluation.teacher_params)} parameters",
        "teacher's loss": f"{_fixed(evaluation.teacher_cross_entropy, 3)} nats a token",
        "held out": f"{evaluation.heldout_tokens:,} tokens",
        "problems": f"{evaluation.problems:,}" if evaluation.problems else "none",
        "trained on": f"{human_count(sum(m.tokens for stage in run.stages for m in stage.metrics))} tokens",
        "training time": human_seconds(sum(m.seconds for stage in run.stages for m in stage.metrics)),
    }
    return environment.from_string(PAGE).render(
        family=run.recipe.family,
        theme=THEME,
        names=run.colour_names,
        lines=summary_lines(evaluation),
        facts=facts,
        tables={
            "results": summary_table(evaluation),
            "shapes": _shape_rows(run),
            "stages": _stage_rows(run),
        },
        plots=plots,
        links=links,
        recipe=redact(yaml.safe_dump(to_dict(run.recipe), sort_keys=False, allow_unicode=True)),
    )


# Drawing


@contextmanager
def _drawing() -> Iterator[None]:
    """Matplotlib in this report's style, with nothing of the user's, and silent about its caches and fonts."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            import matplotlib.style

            style = {
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
                "figure.facecolor": GROUND,
                "font.size": 9,
                "grid.color": LINE,
                "grid.linewidth": 0.6,
                "legend.frameon": False,
                "legend.labelcolor": INK,
                "lines.linewidth": 1.6,
                "savefig.dpi": 180,
                "savefig.facecolor": "auto",
                "svg.hashsalt": "report",
                "text.color": INK,
                "text.parse_math": False,
                "xtick.color": LINE,
                "xtick.labelcolor": MUTED,
                "ytick.color": LINE,
                "ytick.labelcolor": MUTED,
            }
            with matplotlib.style.context(style, after_reset=True):
                yield
    finally:
        logger.setLevel(level)


def _draw_all(run: _Run, directory: Path) -> list[tuple["_Kind", Markup]]:
    """Every plot that the run has data for: a PNG in `directory`, and the SVG to put in the page."""
    drawn = []
    with _drawing():
        for kind in KINDS:
            figure = kind.draw(run)
            if figure is not None:
                figure.savefig(directory / f"{kind.name}.png")
                drawn.append((kind, _svg(figure)))
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


def _count_axis(axis: Any) -> None:
    axis.set_major_formatter(lambda value, _: human_count(value))


def _rolling_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of `width` neighbours around each value, of fewer at the ends."""
    ones = np.ones(min(width, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def _curve(
    plot: "Plot", run: _Run, stage: _Stage, budget: str, pick: Callable[[BudgetMetrics], float | None], label: str
) -> bool:
    """Draw a budget's values over a stage: the raw line faint, its rolling mean over it. False where it has none."""
    steps, values = stage.curve(budget, pick)
    if not len(steps):
        return False
    width = max(1, round(SMOOTHING * len(values)))
    if width > 1:
        plot.plot(steps, values, color=run.colour(budget), alpha=0.25, linewidth=0.7)
    style = {"marker": run.marker(budget), "markersize": 4} if len(steps) == 1 else {}
    plot.plot(steps, _rolling_mean(values, width), color=run.colour(budget), label=label, **style)
    return True


def _mark_stages(plot: "Plot", stages: Sequence[_Stage]) -> None:
    """Name the stages along the top, and draw a line where each later one begins."""
    for stage in stages:
        if stage is not stages[0]:
            plot.axvline(stage.first - 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        plot.annotate(
            stage.name,
            (stage.first, 1),
            xycoords=plot.get_xaxis_transform(),
            xytext=(3, 2),
            textcoords="offset points",
            color=MUTED,
            fontsize=8,
        )
    plot.set_xlim(stages[0].first, max(stages[-1].end - 1, stages[0].first + 1))
    _count_axis(plot.xaxis)


def _legend(figure: "Figure", plot: "Plot") -> None:
    """One legend above the figure, with each label once."""
    entries = dict(reversed(list(zip(*reversed(plot.get_legend_handles_labels()), strict=True))))
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper left", ncols=max(1, len(entries)), columnspacing=1.4
    )


def _draw_quality(run: _Run) -> "Figure":
    evaluation, budgets = run.evaluation, run.budgets
    figure = _figure(COLUMN, 5.2)
    plots = figure.subplots(2, 1, sharex=True, height_ratios=(1.15, 1))
    sizes = [budget.params for budget in budgets]
    for plot in plots:
        plot.axhline(evaluation.teacher_cross_entropy, color=INK, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        plot.plot(
            evaluation.teacher_params,
            evaluation.teacher_cross_entropy,
            "*",
            color=INK,
            markersize=11,
            label="teacher",
            zorder=2,
        )
        plot.plot(sizes, [budget.cross_entropy for budget in budgets], color=MUTED, linewidth=1.2, zorder=2)
        for budget in budgets:
            plot.plot(
                budget.params,
                budget.cross_entropy,
                run.marker(budget.budget),
                color=run.colour(budget.budget),
                markeredgecolor=GROUND,
                markersize=7.5,
                label=budget.budget,
                zorder=4,
            )
        plot.set_ylabel("cross-entropy (nats a token)")
    plots[0].plot(
        sizes,
        [budget.cut_cross_entropy for budget in budgets],
        "x-",
        color=MUTED,
        linewidth=1.2,
        markersize=6,
        label="cut by importance",
    )
    plots[0].plot(
        sizes,
        [budget.random_cut_cross_entropy for budget in budgets],
        "+:",
        color=MUTED,
        linewidth=1.2,
        markersize=8,
        label="cut at random",
    )
    plots[0].set_title("trained, against cut with no training")
    plots[1].set_title("close up: the family and its teacher")
    for budget in budgets:
        delta = budget.cross_entropy - evaluation.teacher_cross_entropy
        plots[1].annotate(
            f"{budget.budget} {delta:+.3f}",
            (budget.params, budget.cross_entropy),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=run.colour(budget.budget),
            fontweight="bold",
        )
    plots[1].margins(y=0.3)
    low, high = min(sizes), max(*sizes, evaluation.teacher_params)
    plots[1].set_xlim(low - 0.18 * high, 1.18 * high - 0.18 * low if low < high else 1.18 * high)
    plots[1].set_xlabel("parameters")
    _count_axis(plots[1].xaxis)
    _legend(figure, plots[0])
    return figure
