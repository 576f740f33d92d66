"""The page of a race: what each way reaches, and the tokens that the others need for what the elastic run reaches."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.reporting.drawing import COLUMN, MARKERS, THEME, count_tick, legend, new_figure, report_style
from tasks.reporting.numbers import human_count
from tasks.reporting.summary import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The page keeps what stands outside these lines.
BEGIN, END = "<!-- results of make race -->", "<!-- end of results -->"
WAYS = ("elastic", "alone", "explored", "from scratch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Held-out KL, nats a token, that one way reached for one budget with these tokens of training.

    `explored` are the tokens that were spent on finding its shape before.
    """

    way: str
    budget: str
    seed: int
    tokens: int
    kl: float
    explored: int = 0


def tokens_for(kl: float, points: Iterable[tuple[int, float]]) -> float:
    """Tokens that reach `kl` on the line through the two nearest of (tokens, KL), both in logarithms.

    Beyond the first and the last point it is the line through the two at that end. Infinite where the KL does not fall.
    """
    logs = sorted((math.log(tokens), math.log(reached)) for tokens, reached in points)
    wanted = math.log(kl)
    pairs = list(pairwise(logs))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if pair[1][1] <= wanted), pairs[-1])
    return math.exp(x0 + (x1 - x0) * (wanted - y0) / (y1 - y0)) if y1 < y0 else math.inf


def write_page(page: Path, name: str, entries: Sequence[Entry]) -> None:
    """Put the results into the page, whose other text stays, and their picture beside it."""
    picture = page.with_name(f"{page.stem}-{name}.png")
    with report_style():
        _draw(entries).savefig(picture, dpi=150)
    results = "\n\n".join((BEGIN, f"![KL against tokens]({picture.name})", reached(entries), needed(entries), END))
    text = page.read_text() if page.exists() else f"# The race\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    page.write_text(before + results + rest.partition(END)[2])


def reached(entries: Sequence[Entry]) -> str:
    """A table of the KL that each way reaches: mean, and least and most over the seeds."""
    rows = []
    for way in WAYS:
        for budget, tokens in dict.fromkeys((e.budget, e.tokens) for e in entries if e.way == way):
            found = [e.kl for e in entries if (e.way, e.budget, e.tokens) == (way, budget, tokens)]
            rows.append(
                {
                    "way": way,
                    "size": budget,
                    "tokens": human_count(tokens),
                    "KL": f"{sum(found) / len(found):.4f}",
                    "over seeds": f"{min(found):.4f} to {max(found):.4f}" if len(found) > 1 else "one seed",
                }
            )
    return markdown_table(rows)


def needed(entries: Sequence[Entry]) -> str:
    """A table, seed by seed, of the tokens that each size needs alone for the KL that the elastic run reaches.

    With exploration: the tokens of the exploration, and those that the shape it found needs. These are read off the
    same curve, moved by the quotient of the two shapes' KL at equal tokens.
    """
    rows = []
    for seed in dict.fromkeys(entry.seed for entry in entries):
        mine = [entry for entry in entries if entry.seed == seed]
        elastic = {entry.budget: entry for entry in mine if entry.way == "elastic"}
        alone, explored = dict[str, float](), dict[str, float]()
        for found in (entry for entry in mine if entry.way == "explored"):
            name, wanted = found.budget, elastic[found.budget].kl
            points = {e.tokens: e.kl for e in mine if (e.way, e.budget) == ("alone", name)}
            alone[name] = tokens_for(wanted, points.items())
            moved = wanted * points[found.tokens] / found.kl
            explored[name] = found.explored + tokens_for(moved, points.items())
        spent = next(iter(elastic.values())).tokens
        rows.append(
            {
                "seed": str(seed),
                "elastic, all sizes": human_count(spent),
                **{f"{name} alone": human_count(tokens) for name, tokens in alone.items()},
                **{f"{name} explored": human_count(tokens) for name, tokens in explored.items()},
                "elastic / alone": f"{spent / sum(alone.values()):.2f}",
                "elastic / explored": f"{spent / sum(explored.values()):.2f}",
            }
        )
    return markdown_table(rows)


def _draw(entries: Sequence[Entry]) -> "Figure":
    """KL against tokens, a panel a size: a curve for a size alone, and a point of each seed for the other ways."""
    sizes = list(dict.fromkeys(entry.budget for entry in entries if entry.way == "alone"))
    figure = new_figure(COLUMN * max(1, len(sizes)) / 1.2, 3.6)
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for panel, size in zip(panels, sizes, strict=True):
        for index, way in enumerate(WAYS):
            points = sorted((e.tokens + e.explored, e.kl) for e in entries if (e.way, e.budget) == (way, size))
            style = {"color": THEME[f"c{index}"][0], "marker": MARKERS[index], "label": way, "markersize": 6}
            panel.plot(*zip(*points, strict=True), **style, linestyle="none")
            if way == "alone":
                tokens = sorted({x for x, _ in points})
                means = [sum(y for x, y in points if x == t) / sum(x == t for x, _ in points) for t in tokens]
                panel.plot(tokens, means, color=style["color"], linewidth=1.2)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_title(f"{size}: held-out KL to the teacher")
        panel.set_xlabel("tokens of training, exploration included")
        panel.xaxis.set_major_formatter(count_tick)
    panels[0].set_ylabel("nats a token")
    legend(figure, panels[0])
    return figure
