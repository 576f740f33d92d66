"""The plots of a run's report, from its quality against size to the anatomy of its members."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from elastic_core.cost import subnet_params
from elastic_core.geometry import AXIS_NAMES, ModelConfig
from elastic_core.layers.kinds import kind_names, sizes_text
from elastic_core.subnet import Subnet, full_subnet, sizes_at
from tasks.reporting.drawing import (
    COLUMN,
    DASHES,
    DOT,
    GROUND,
    INK,
    LINE,
    MUTED,
    PALE,
    THEME,
    WIDE,
    Run,
    count_tick,
    draw_curves,
    legend,
    logarithmic,
    new_figure,
    report_style,
    to_svg,
)
from tasks.reporting.history import Pick, StageHistory
from tasks.reporting.numbers import human_bytes, percent
from tasks.reporting.summary import above_teacher, cut_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _draw_quality(run: Run) -> "Figure":
    teacher, loss = run.evaluation.teacher_params, run.evaluation.teacher_cross_entropy
    sizes = [budget.params for budget in run.budgets]
    figure = new_figure(COLUMN, 5.4)
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
        text = f"{budget.budget} {above_teacher(run.evaluation, budget):+.3f}"
        where, colour = (budget.params, budget.cross_entropy), run.style(budget.budget)["color"]
        close.annotate(text, where, (8, 6), textcoords="offset points", color=colour)
    close.margins(y=0.3)
    close.set_title("close up: the family against its teacher")
    close.set_xlim(min(sizes) - 0.12 * teacher, 1.25 * teacher)
    close.set_xlabel("parameters")
    close.xaxis.set_major_formatter(count_tick)
    legend(figure, whole)
    return figure


def _draw_frontier(run: Run) -> "Figure | None":
    measured = {name: seen for name, seen in run.shapes.budgets.items() if len(seen) > 1} if run.shapes else {}
    if not measured:
        return None
    figure = new_figure(COLUMN, 3.4)
    panel = figure.subplots()
    for name, candidates in measured.items():
        colour = run.style(name)["color"]
        sizes = [subnet_params(run.model, candidate.subnet) for candidate in candidates]
        panel.plot(sizes, [c.loss for c in candidates], ".", color=colour, markersize=4, alpha=0.45, clip_on=False)
        chosen = next(c for c in candidates if c.subnet == run.subnets[name])
        size = subnet_params(run.model, chosen.subnet)
        panel.plot(size, chosen.loss, label=name, **run.style(name) | DOT)
    logarithmic(panel, "y")
    panel.set_ylabel("nats a token")
    panel.set_xlabel("parameters")
    panel.xaxis.set_major_formatter(count_tick)
    legend(figure, panel)
    return figure


def _draw_loss(run: Run) -> "Figure | None":
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
    figure = new_figure(COLUMN, 0.8 + 2.2 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (title, values) in zip(panels, shown.items(), strict=True):
        draw_curves(panel, run, run.stages, picks[title])
        panel.set_title(title, pad=16)
        panel.set_ylabel("nats a token")
        # The first steps after a cut lie far above the rest, and the first KL of a full model next to zero.
        low, high = np.quantile(values, (0.02, 1))
        if high > 4 * low:
            logarithmic(panel, "y")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_ylim(low / 1.1, high * 1.1)
    panels[-1].set_xlabel("optimizer steps")
    legend(figure, panels[0])
    return figure


def _routed(run: Run) -> list[StageHistory]:
    """The stages in which the router makes choices."""
    return [s for s in run.stages if any(budget.choices for m in s.metrics for budget in m.budgets.values())]


def _share_chosen(axis: str, full: int) -> Pick:
    """The router's expected size on an axis as a share of the full size."""
    return lambda budget: budget.choices[axis] / full if budget.choices else None


def _draw_router(run: Run) -> "Figure | None":
    stages = _routed(run)
    elastic = [axis for axis in run.axes.names if len(run.axes.choices(axis)) > 1]
    if not stages or not elastic:
        return None
    columns = min(3, len(elastic))
    rows = math.ceil(len(elastic) / columns)
    figure = new_figure(WIDE, 0.6 + 2.3 * rows)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for panel in panels[len(elastic) :]:
        panel.remove()
    for panel, axis in zip(panels, elastic, strict=False):
        choices = run.axes.choices(axis)
        full, span = choices[0], 1 - choices[-1] / choices[0]
        for name in run.colours:
            panel.plot(stages[-1].end - 0.5, run.size(name, axis) / full, label=name, **run.style(name) | DOT)
        draw_curves(panel, run, stages, _share_chosen(axis, full))
        panel.set_title(AXIS_NAMES[axis], pad=16)
        ticks = [c for i, c in enumerate(choices) if i == 0 or (choices[i - 1] - c) / full > 0.08 * span]
        panel.set_yticks([c / full for c in ticks], [f"{c} ({percent(c / full)})" for c in ticks], fontsize=8)
        panel.set_ylim(1 - 1.1 * span, 1 + 0.1 * span)
        panel.tick_params(labelbottom=True)
    figure.supxlabel("optimizer steps", color=MUTED, fontsize=9)
    legend(figure, panels[0])
    return figure


def _draw_params(run: Run) -> "Figure | None":
    stages = _routed(run)
    if not stages:
        return None
    figure = new_figure(COLUMN, 3.4)
    panel = figure.subplots()
    targets = {budget.name: budget.params for budget in run.recipe.budgets}
    for budget in run.budgets:
        style, target = run.style(budget.budget), targets.get(budget.budget)
        panel.plot(stages[-1].end - 0.5, budget.params, label=budget.budget, **style | DOT)
        if target is not None:
            panel.axhline(target, color=style["color"], linewidth=1, linestyle=DASHES)
    panel.plot([], [], color=MUTED, linewidth=1, linestyle=DASHES, label="target")
    draw_curves(panel, run, stages, lambda b: b.expected_params if b.choices else None)
    panel.set_ylabel("parameters")
    panel.yaxis.set_major_formatter(count_tick)
    panel.set_xlabel("optimizer steps")
    legend(figure, panel)
    return figure


def _draw_experts(run: Run) -> "Figure | None":
    if not any(budget.experts for stage in run.stages for m in stage.metrics for budget in m.budgets.values()):
        return None
    figure = new_figure(COLUMN, 5.0)
    load, entropy = figure.subplots(2, 1, sharex=True)
    draw_curves(load, run, run.stages, lambda b: b.experts.get("expert_load"))
    load.set_title("tokens of the most chosen expert over the mean", pad=16)
    draw_curves(entropy, run, run.stages, lambda b: b.experts.get("expert_entropy"))
    entropy.set_title("entropy of a token's scores", pad=16)
    entropy.set_ylabel("nats")
    entropy.set_xlabel("optimizer steps")
    legend(figure, load)
    return figure


def _draw_storage(run: Run) -> "Figure":
    ways = run.storage()
    figure = new_figure(COLUMN, 2.6)
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


def _draw_anatomy(run: Run) -> "Figure":
    pattern = run.model.hybrid_override_pattern
    names = list(run.colours)
    figure = new_figure(WIDE, 1.2 + 0.55 * len(names))
    panel = figure.subplots()
    layers = range(len(pattern))
    kept_by_all = set(layers).intersection(*(subnet.layers for subnet in run.subnets.values()))
    heights = [1 if layer in kept_by_all else 1 - rank / len(pattern) for rank, layer in enumerate(run.layer_ranking)]
    panel.bar(run.layer_ranking, [0.8 * height for height in heights], color=MUTED)
    for row, name in enumerate(names, start=1):
        subnet = run.subnets[name]
        dropped = [layer for layer in layers if layer not in subnet.layers]
        shares = [0.8 * _width_share(run.model, subnet, layer) for layer in subnet.layers]
        panel.bar(dropped, 0.8, bottom=-row, color="none", edgecolor=LINE)
        panel.bar(subnet.layers, 0.8, bottom=-row, color=PALE)
        panel.bar(subnet.layers, shares, bottom=-row, color=run.style(name)["color"])
        panel.annotate(
            _widths(run, subnet),
            (len(pattern) - 0.5, 0.4 - row),
            (8, 0),
            textcoords="offset points",
            annotation_clip=False,
            va="center",
            fontsize=8,
        )
    panel.set_yticks([0.4 - row for row in range(len(names) + 1)], ["layer importance", *names], color=INK)
    panel.set_xticks(layers, list(pattern), fontsize=min(9, 480 / len(pattern)), color=INK)
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    panel.set_xlim(-0.6, len(pattern) - 0.4)
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.set_xlabel(", ".join(f"{kind} {title}" for kind, title in kind_names(run.model).items()))
    return figure


def _width_share(model: ModelConfig, subnet: Subnet, layer: int) -> float:
    """A kept layer's width as a share of the full model's: of heads and their channels, experts and their neurons."""
    kept, full = sizes_at(subnet, model, layer), sizes_at(full_subnet(model), model, layer)
    return math.prod(kept[axis] / full[axis] for axis in model.axes_of(model.hybrid_override_pattern[layer])[:2])


def _widths(run: Run, subnet: Subnet) -> str:
    """A subnet's shape in two lines, for a label."""
    of_kinds = [f"{name} {sizes}" for name, sizes in sizes_text(run.model, subnet).items()]
    return f"{subnet.depth} layers, hidden {subnet.hidden}, {of_kinds[0]}\n{', '.join(of_kinds[1:])}"


def _draw_orders(run: Run) -> "Figure | None":
    cuts = run.orders.cuts
    shown = [v for cut in cuts for v in (cut.by_importance, *cut.at_random) if math.isfinite(v) and v > 0]
    if not shown:
        return None
    least = max(min(shown), max(shown) / 1e4)  # what loses less, or nothing, is drawn here, at the left edge
    figure = new_figure(COLUMN, 1.3 + 0.32 * len(cuts))
    panel = figure.subplots()
    for row, cut in enumerate(cuts):
        at_random = [max(value, least) for value in cut.at_random]
        panel.plot(at_random, [row] * len(at_random), "+", color=MUTED, markersize=8, label="random orders")
        colour = THEME["c0" if cut.beats_random else "c1"][0]
        panel.plot(max(cut.by_importance, least), row, "o", color=colour, markersize=7, label="by importance", **DOT)
    logarithmic(panel, "x")
    panel.set_yticks(range(len(cuts)), [cut_title(cut) for cut in cuts], color=INK)
    panel.invert_yaxis()
    panel.set_xlabel("KL to the teacher, nats a token")
    legend(figure, panel)
    return figure


def _draw_accuracy(run: Run) -> "Figure | None":
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
    figure = new_figure(WIDE, 3.2)
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
    legend(figure, panel)
    return figure


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot of the report; `draw` returns None for a run without the data for it."""

    name: str
    title: str
    caption: str
    draw: Callable[[Run], "Figure | None"]
    wide: bool = False


PLOTS = (
    Plot(
        "quality",
        "Quality against size",
        "Trained members of the family, and the teacher cut to the same shapes with no training.",
        _draw_quality,
    ),
    Plot(
        "orders",
        "The order of importance",
        "KL to the teacher where one axis of it is cut with no training. Orange: importance is no better than random.",
        _draw_orders,
    ),
    Plot(
        "frontier",
        "The shapes that were measured",
        "KL to the teacher of each shape within a budget, cut with no training. The markers are the chosen ones.",
        _draw_frontier,
    ),
    Plot("loss", "Loss by budget", "The faint line is every step, the full line its rolling mean.", _draw_loss),
    Plot(
        "router",
        "The router's choices",
        "Expected size on each elastic axis, by budget. The marker at the end is the size deployed.",
        _draw_router,
        wide=True,
    ),
    Plot(
        "params",
        "Expected parameters",
        "The router's expected parameters; dashed, the budget's target; the marker at the end, the size deployed.",
        _draw_params,
    ),
    Plot(
        "experts",
        "Experts",
        "How the tokens of a step spread over the experts that a budget keeps, as means over its layers.",
        _draw_experts,
    ),
    Plot(
        "storage", "Storage", "Bytes that the weights of all sizes take, in three ways of storing them.", _draw_storage
    ),
    Plot(
        "anatomy",
        "Anatomy",
        "The layers each budget keeps. A bar's height is the layer's width as a share of the full one's.",
        _draw_anatomy,
        wide=True,
    ),
    Plot("accuracy", "Accuracy by kind of problem", "Held-out problems answered exactly.", _draw_accuracy, wide=True),
)


def draw_all(run: Run, directory: Path) -> list[tuple[Plot, Markup]]:
    """Every plot that the run has data for: a PNG in `directory`, and the SVG to put in the page."""
    drawn = []
    with report_style():
        for plot in PLOTS:
            figure = plot.draw(run)
            if figure is not None:
                figure.savefig(directory / f"{plot.name}.png", dpi=180)
                figure.set_layout_engine("none")  # it is laid out now, and need not be again
                drawn.append((plot, to_svg(figure)))
    return drawn
