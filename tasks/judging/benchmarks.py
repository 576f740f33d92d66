"""A benchmark as a recipe spells it: a file of problems, how they are asked, and how often."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from elastic_core.recipe import DataSource
from elastic_core.schema import Strict, checked_name, positive
from tasks.corpus.documents import iter_rows, parse_row
from tasks.judging.formats import FORMATS, Problem

Format = Literal["math", "choice", "gpqa", "livecodebench", "exact"]
PROBLEM = "{problem}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling(Strict):
    """How completions are drawn. The defaults are those that NVIDIA judges Nemotron Nano v2 by."""

    temperature: float = 0.6
    """What the logits are divided by; 0 takes the most likely token. Example: `0.6`."""
    top_p: float = 0.95
    """The share of probability, from the most likely token on, that is drawn from. Example: `0.95`."""
    max_new_tokens: int = 32_768
    """Tokens in a completion at most, its thought included. Example: `32768`."""
    system: str | None = "/think"
    """The system message; unset, none. Example: `/no_think`."""
    thinking: bool = True
    """Whether the chat template, told so by the system message, has the completion begin inside a thought, so that one
    whose thought does not end has no answer. Example: `false`."""

    def __post_init__(self) -> None:
        positive(self, "max_new_tokens")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature} must be at least 0, top_p={self.top_p} above 0 and up to 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark(Strict):
    """Problems that a model answers several times each."""

    name: str
    """What the benchmark is called, once in a recipe. Example: `aime-2025`."""
    path: str
    """A JSONL or Parquet file, or a directory or glob of such files. Example: `aime_2025.jsonl`."""
    format: Format
    """How its rows are read and its answers judged: `math` (MATH-500, AIME), the boxed answer mathematically; `choice`
    (MMLU-Pro), the boxed letter; `gpqa`, the same, from GPQA's columns; `livecodebench`, a program by its tests;
    `exact`, the whole answer word for word. Example: `math`."""
    runs: int = 8
    """Completions of each problem. Example: `4`."""
    prompt: str | None = None
    """What is asked, with `{problem}` where the problem stands; unset, the format's own words.
    Example: `Solve this, and box the answer: {problem}`."""
    max_problems: int | None = None
    """Problems to ask at most, the first ones; unset, all. Example: `100`."""
    since: str | None = None
    """With `livecodebench`, the first day of contest whose problems count. Example: `2024-07-01`."""
    until: str | None = None
    """With `livecodebench`, the last such day. Example: `2024-12-31`."""

    def __post_init__(self) -> None:
        checked_name("benchmark", self.name)
        positive(self, "runs")
        if self.max_problems is not None:
            positive(self, "max_problems")
        if self.prompt is not None and PROBLEM not in self.prompt:
            raise ValueError(f"prompt={self.prompt!r} has no {PROBLEM}, where the problem is to stand")
        if self.format != "livecodebench" and (self.since or self.until):
            raise ValueError("since and until are days of contests; only format livecodebench has them")


def read_benchmark(benchmark: Benchmark) -> list[Problem]:
    """The problems of a benchmark, as they are asked. ValueError names the row and the remedy."""
    problems = list(islice(_problems(benchmark), benchmark.max_problems))
    if not problems:
        raise ValueError(
            f"{benchmark.path} holds no problem of benchmark {benchmark.name}; correct its path, or its days"
        )
    twice = [which for which, count in Counter(problem.id for problem in problems).items() if count > 1]
    if twice:
        raise ValueError(f"{benchmark.path} holds the problem {twice[0]!r} twice; remove one")
    return problems


def _problems(benchmark: Benchmark) -> Iterator[Problem]:
    path = Path(benchmark.path)
    if not path.exists() and not any(path.parent.glob(path.name)):
        raise ValueError(f"{path}: No such file; correct the path of benchmark {benchmark.name}")
    form = FORMATS[benchmark.format]
    words = benchmark.prompt or form.prompt
    with TemporaryDirectory() as work:
        rows = iter_rows(DataSource(path=str(path)), fetch=lambda uri, to: to, directory=Path(work))
        for where, row in rows:
            fields, _ = parse_row(row, where)
            if _in_time(str(fields.get("contest_date", "")), benchmark):
                question = form.read(fields, where)
                yield Problem(
                    id=question.id, prompt=words.replace(PROBLEM, question.text), key=question.key, where=where
                )


def _in_time(day: str, benchmark: Benchmark) -> bool:
    since, until = benchmark.since or "", benchmark.until or "9999"
    return benchmark.format != "livecodebench" or since <= day[: len("2024-07-01")] <= until
