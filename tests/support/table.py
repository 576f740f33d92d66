"""The table and the picture of all benchmark rows: python tests/support/table.py ROWS.jsonl TABLE.md

Of rows that measure the same on the same device the latest counts.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from bench import BOUND
from matplotlib.figure import Figure

Row = dict[str, Any]

TICKS = (0.1, 0.2, 0.5, 1)


def latest(lines: list[str]) -> list[Row]:
    rows = [json.loads(line) for line in lines]
    return list({(r["benchmark"], r["shape"], r["alternative"], r["device"]): r for r in rows}.values())


def markdown(rows: list[Row], picture: str) -> str:
    titles = "| benchmark | shape | ours | alternative | theirs | ours / theirs | target | device | commit |"
    lines = [
        f"| {r['benchmark']} | {r['shape']} | {r['ours']:.3g} {r['unit']} | {r['alternative']} "
        f"| {r['theirs']:.3g} {r['unit']} | **{r['ours'] / r['theirs']:.3f}** | {r['target']} | {r['device']} "
        f"| {r['commit']} |"
        for r in rows
    ]
    rule = "| --- | --- | ---: | --- | ---: | ---: | --- | --- | --- |"
    head = "# Benchmarks\n\nBy `make bench`: medians of interleaved runs, ours and the alternative in one run.\n"
    return "\n".join([head, f"![Ratios]({picture})\n", titles, rule, *lines]) + "\n"


def picture(rows: list[Row]) -> Figure:
    """A bar a row on a logarithmic axis: left of 1 ours is less. What bounds us is no alternative, and left out."""
    rows = [row for row in rows if row["target"] != BOUND]
    figure = Figure(figsize=(10, 1.2 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ratios = [r["ours"] / r["theirs"] for r in rows]
    colors = ["tab:blue" if ratio <= 1 else "tab:orange" for ratio in ratios]
    axes.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, color=colors, height=0.6)
    axes.set_yticks(range(len(rows)), [f"{r['benchmark']}\n{r['shape']}, beside {r['alternative']}" for r in rows])
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.margins(y=0.01)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("ours / theirs; less is better")
    axes.invert_yaxis()
    return figure


def main(rows_file: Path, table: Path) -> None:
    rows = latest(rows_file.read_text().splitlines())
    image = table.with_suffix(".png")
    picture(rows).savefig(image, dpi=110)
    table.write_text(markdown(rows, image.name))


if __name__ == "__main__":
    matplotlib.use("Agg")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
