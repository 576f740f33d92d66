"""How a report's plots are drawn: its colours in both themes, its style, and what the plots have in common.

A plot is drawn once in the light theme; its PNG keeps that theme, and in the page its colours become CSS variables, so
that one drawing serves light and dark.
"""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

from elastic_core.files.shapes import MeasuredShapes
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.recipe import Recipe
from elastic_core.subnet import Subnet
from tasks.records import BudgetEvaluation, EvaluationRecord, OrderComparison
from tasks.reporting.history import Pick, StageHistory
from tasks.reporting.numbers import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Panel
    from matplotlib.figure import Figure

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
DOT: dict[str, Any] = {"linestyle": "none", "markeredgecolor": GROUND, "clip_on": False, "zorder": 5}

COLUMN, WIDE = 5.2, 11.0  # widths of a plot in inches: half the page, or all of it
SMOOTHING = 0.03  # a smoothed line averages this share of its stage's steps


# The run


@dataclass(frozen=True, slots=True)
class Run:
    """All that a report tells of; `budgets` are the evaluated ones from the largest to the smallest."""

    recipe: Recipe
    model: ModelConfig
    axes: Axes
    layer_ranking: Sequence[int]
    evaluation: EvaluationRecord
    orders: OrderComparison
    budgets: Sequence[BudgetEvaluation]
    subnets: Mapping[str, Subnet]
    stages: Sequence[StageHistory]
    shapes: MeasuredShapes | None

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


# Matplotlib


@contextmanager
def report_style() -> Iterator[None]:
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


def to_svg(figure: "Figure") -> Markup:
    """The figure as an <svg> element in the theme's variables, without comments, name spaces and metadata."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", facecolor="none", metadata=metadata)
    svg = re.sub(r"<!--.*?-->|\s+xmlns(:xlink)?=\"[^\"]*\"", "", buffer.getvalue(), flags=re.DOTALL)
    for name, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{name})")
    return Markup(svg[svg.index("<svg") :])


def new_figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def legend(figure: "Figure", panel: "Panel") -> None:
    """One legend above the figure, with each label once, in as many columns as fit."""
    handles, labels = panel.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    columns = max(1, int(figure.get_figwidth() / (0.5 + 0.07 * max(map(len, labels)))))
    figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns, handlelength=1.6)


def count_tick(value: float, _: float) -> str:
    return human_count(value)


def logarithmic(panel: "Panel", which: Literal["x", "y"], label: str | Callable[[float, float], str] = "{x:g}") -> None:
    """Give an axis a logarithmic scale with a label at 1, 2 and 5 of each decade."""
    getattr(panel, f"set_{which}scale")("log", subs=[2, 5])
    axis = panel.xaxis if which == "x" else panel.yaxis
    axis.set_major_formatter(label)
    axis.set_minor_formatter(label)


def draw_curves(panel: "Panel", run: Run, stages: Sequence[StageHistory], pick: Pick) -> None:
    """Each budget's values over the stages, the raw line faint behind its rolling mean, and the stages' names."""
    for stage, budget in product(stages, run.colours):
        steps, values = stage.curve(budget, pick)
        if not len(steps):
            continue
        style, width = run.style(budget), max(1, round(SMOOTHING * len(values)))
        if width > 1:
            panel.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.7)
        lone = {} if len(steps) == 1 else {"marker": None}
        panel.plot(steps, rolling_mean(values, width), label=budget, **style | lone)
    start, end = stages[0].first, stages[-1].end
    for stage in stages:
        if stage is not stages[0]:
            panel.axvline(stage.first - 0.5, color=MUTED, linewidth=0.9, linestyle=DASHES)
        if (stage.end - stage.first) / (end - start) > 0.023 * len(stage.name):  # there is room for the name
            where, above = (stage.first - 0.5, 1), panel.get_xaxis_transform()
            panel.annotate(
                stage.name, where, (2, 3), xycoords=above, textcoords="offset points", color=MUTED, fontsize=8
            )
    panel.set_xlim(start - 0.5, end - 0.5)
    panel.locator_params(axis="x", integer=True, min_n_ticks=1)
    panel.xaxis.set_major_formatter(count_tick)


def rolling_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the `width` values around each, of fewer at the ends."""
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
