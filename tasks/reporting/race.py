"""The page of a race: what each way reaches, the tokens that the others need for that, and what each setting brings."""

import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

from tasks.reporting.drawing import COLUMN, MARKERS, THEME, count_tick, legend, logarithmic, new_figure, report_style
from tasks.reporting.numbers import human_count
from tasks.reporting.summary import markdown_table
from tasks.running.code import project_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_log = logging.getLogger(__name__)

WAYS = ("elastic", "alone", "explored", "from scratch")
ROWS = ".jsonl"  # of the page, what was found, of which its tables are made
BASE = "as it is"  # the recipe that ablations change
FARTHEST = 4  # times the most tokens of a size alone: its line is not followed beyond


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Held-out KL to the teacher and loss, nats a token, that a way reached for a budget with these tokens of training.

    `explored` are the tokens that were spent on finding its shape before; `commit` is the version of the code that
    found it, in rows from before its commit alone.
    """

    way: str
    budget: str
    seed: int
    tokens: int
    kl: float
    loss: float | None = None  # of rows from before it was kept
    explored: int = 0
    commit: str = ""


class Rows:
    """The entries of one race in a file of rows, one JSON object a line.

    `key` tells what the laps start from, and how they train: what was found otherwise is left alone. The code of the
    laps is no part of it; the commit of what is taken from the file is said here and on the page.
    """

    def __init__(self, file: Path, family: str, key: str) -> None:
        self._file, self._of = file, {"family": family, "key": key[:16]}
        lines = map(json.loads, file.read_text().splitlines()) if file.exists() else []
        mine = [row for row in lines if row.items() >= self._of.items()]
        names = [field.name for field in fields(Entry)]
        self.entries = [Entry(**{name: row[name] for name in names if name in row}) for row in mine]

    def of(self, way: str, seed: int, find: Callable[[], Iterable[Entry]]) -> None:
        """Have the entries of a way and a seed, and all that are found with them: found now, where there are none."""
        known = [entry for entry in self.entries if (entry.way, entry.seed) == (way, seed)]
        if known:
            _log.info("%s, seed %d: taken from %s, found at %s", way, seed, self._file, known[0].commit)
            return
        found = [replace(entry, commit=project_version()) for entry in find()]
        with self._file.open("a") as file:
            file.writelines(json.dumps({**self._of, **asdict(entry)}) + "\n" for entry in found)
        self.entries += found


def tokens_for(kl: float, points: Iterable[tuple[int, float]]) -> float:
    """Tokens that reach `kl` on the line through the two nearest of (tokens, KL), both in logarithms.

    Beyond the first and the last point it is the line through the two at that end. Infinite where the KL does not fall.
    """
    logs = sorted((math.log(tokens), math.log(reached)) for tokens, reached in points)
    wanted = math.log(kl)
    pairs = list(pairwise(logs))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if pair[1][1] <= wanted), pairs[-1])
    return math.exp(x0 + (x1 - x0) * (wanted - y0) / (y1 - y0)) if y1 < y0 else math.inf


class Need(NamedTuple):
    """Tokens that a size needs for a KL; or more than that, where its line would have to be followed too far."""

    tokens: float
    is_least: bool

    @classmethod
    def of(cls, kl: float, points: Mapping[int, float], explored: int = 0) -> "Need":
        """What reaches `kl` by the KL at each number of tokens, and what exploring took before."""
        needed, most = tokens_for(kl, points.items()), FARTHEST * max(points)
        return cls(explored + min(needed, most), needed > most)

    def __str__(self) -> str:
        return "> " * self.is_least + human_count(self.tokens)


def _quotient(spent: int, needs: Collection[Need]) -> str:
    is_most = any(need.is_least for need in needs)
    return "< " * is_most + f"{spent / sum(need.tokens for need in needs):.2f}"


def write_race(page: Path, name: str, entries: Sequence[Entry]) -> None:
    """Put the results of a race into the page, and their picture beside it."""
    picture = page.with_name(f"{page.stem}-{name}.png")
    with report_style():
        _draw(entries).savefig(picture, dpi=150)
    _put(
        page,
        f"race of {name}",
        (f"![KL against tokens]({picture.name})", reached(entries), needed(entries), _found_at(entries)),
    )


def write_ablations(page: Path, name: str, entries: Sequence[Entry], changes: Iterable[str]) -> None:
    """Put into the page how a recipe with each of the named changes compares with the one without."""
    _put(page, f"ablations of {name}", (ablated(entries, changes), _found_at(entries)))


def _found_at(entries: Sequence[Entry]) -> str:
    return f"Found at {', '.join(sorted({entry.commit for entry in entries}))}."


def _put(page: Path, what: str, results: Iterable[str]) -> None:
    """Replace what stands between two lines of the page; where these are missing, they come at its end."""
    begin, end = f"<!-- {what} -->", f"<!-- end of {what} -->"
    text = page.read_text() if page.exists() else "# The race\n"
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    before, _, rest = text.partition(begin)
    if end not in rest:
        raise ValueError(f"{page}: {begin} has no {end} after it; put it where the results are to end")
    page.write_text(before + "\n\n".join((begin, *results, end)) + rest.partition(end)[2])


def reached(entries: Sequence[Entry]) -> str:
    """A table of the KL that each way reaches: mean, and least and most over the seeds; and the mean of the loss."""
    rows = []
    for way in WAYS:
        for budget, tokens in dict.fromkeys((e.budget, e.tokens) for e in entries if e.way == way):
            found = [e for e in entries if (e.way, e.budget, e.tokens) == (way, budget, tokens)]
            kls, losses = [e.kl for e in found], [e.loss for e in found if e.loss is not None]
            rows.append(
                {
                    "way": way,
                    "size": budget,
                    "tokens": human_count(tokens),
                    "KL": f"{fmean(kls):.4f}",
                    "over seeds": f"{min(kls):.4f} to {max(kls):.4f}" if len(kls) > 1 else "one seed",
                    "loss": f"{fmean(losses):.4f}" if losses else "-",
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
        alone, explored = dict[str, Need](), dict[str, Need]()
        for found in (entry for entry in mine if entry.way == "explored"):
            name, wanted = found.budget, elastic[found.budget].kl
            points = {e.tokens: e.kl for e in mine if (e.way, e.budget) == ("alone", name)}
            alone[name] = Need.of(wanted, points)
            explored[name] = Need.of(wanted * points[found.tokens] / found.kl, points, found.explored)
        spent = next(iter(elastic.values())).tokens
        rows.append(
            {
                "seed": str(seed),
                "elastic, all sizes": human_count(spent),
                **{f"{name} alone": str(need) for name, need in alone.items()},
                **{f"{name} explored": str(need) for name, need in explored.items()},
                "elastic / alone": _quotient(spent, alone.values()),
                "elastic / explored": _quotient(spent, explored.values()),
            }
        )
    return markdown_table(rows)


def ablated(entries: Sequence[Entry], changes: Iterable[str]) -> str:
    """A table of the KL of each size and its distance from the recipe without the change, and of the loss.

    The recipe itself has its loss, a change what it adds to that. All are means over the seeds with their standard
    errors; distances are taken between trainings of one seed.
    """
    base = {(e.budget, e.seed): e for e in entries if e.way == BASE}
    sizes = list(dict.fromkeys(size for size, _ in base))
    rows = []
    for way in changes:
        found = {size: [e for e in entries if (e.way, e.budget) == (way, size)] for size in sizes}
        pairs = {size: [(e, base[size, e.seed]) for e in of_size] for size, of_size in found.items()}
        kls = {size: _kl_cell(pairs[size]) for size in sizes}
        losses = {f"loss {size}": _loss_cell(pairs[size]) for size in sizes}
        rows.append({"change": way, **kls, **losses})
    return markdown_table(rows)


def _kl_cell(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    """The KL of entries that stand beside the recipe's own of their seeds."""
    if not pairs:
        return "-"
    text = _mean([entry.kl for entry, _ in pairs], ".4f")
    distances = [entry.kl / base.kl - 1 for entry, base in pairs]
    return text if pairs[0][0].way == BASE else f"{text}, {_mean(distances, '+.0%')}"


def _loss_cell(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    """The loss of the recipe's own, or what the others add to it."""
    losses = [(entry.loss, base.loss) for entry, base in pairs if entry.loss is not None and base.loss is not None]
    if not losses or len(losses) < len(pairs):
        return "-"
    if pairs[0][0].way == BASE:
        return _mean([loss for loss, _ in losses], ".4f")
    return _mean([loss - base for loss, base in losses], "+.4f")


def _mean(values: Sequence[float], form: str) -> str:
    """A mean and its standard error."""
    error = f" ± {format(stdev(values) / math.sqrt(len(values)), form.lstrip('+'))}" if len(values) > 1 else ""
    return format(fmean(values), form) + error


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
        logarithmic(panel, "x", count_tick)
        logarithmic(panel, "y")
        panel.set_title(f"{size}: held-out KL to the teacher")
        panel.set_xlabel("tokens of training, exploration included")
    panels[0].set_ylabel("nats a token")
    legend(figure, panels[0])
    return figure
