"""The problems of a benchmark, from wherever it is."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from elastic_core.judging import PROBLEM, Benchmark
from tasks.corpus.chats import Row
from tasks.corpus.documents import iter_rows, parse_row
from tasks.judging.formats import FORMATS
from tasks.judging.problems import Problem
from tasks.records import Artifact

PROBLEMS_FILE = "problems.jsonl"


def asked_from(problems: Artifact, benchmark: Benchmark) -> Benchmark:
    """The benchmark as it is asked from the directory that `write_problems` wrote its rows to."""
    return replace(benchmark, path=str(Path(problems.path) / PROBLEMS_FILE), format=benchmark.form)


def read_benchmark(benchmark: Benchmark) -> list[Problem]:
    """The problems of a benchmark in local files, as they are asked. ValueError names the row and the remedy."""
    return [problem for problem, _ in _problems(benchmark)]


def write_problems(benchmark: Benchmark, directory: Path) -> int:
    """Write the rows that are asked to a directory, every one of them read and found fit, and say how many."""
    count = 0
    with (directory / PROBLEMS_FILE).open("w", encoding="utf-8") as out:
        for _, row in _problems(benchmark):
            out.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            count += 1
    return count


def _problems(benchmark: Benchmark) -> Iterator[tuple[Problem, Row]]:
    """Each problem as it is asked, and its row; ValueError where there is none, or one is there twice."""
    path, seen = benchmark.source.path, set[str]()
    for problem, row in _dated(benchmark):
        if problem.id in seen:
            raise ValueError(f"{path} holds the problem {problem.id!r} twice; remove one")
        seen.add(problem.id)
        yield problem, row
        if len(seen) == benchmark.max_problems:
            return
    if not seen:
        raise ValueError(f"{path} holds no problem of benchmark {benchmark.name}; correct its path, or its days")


def _dated(benchmark: Benchmark) -> Iterator[tuple[Problem, Row]]:
    """The problems of the benchmark's days, in the order of its rows."""
    source, form = benchmark.source, FORMATS[benchmark.form]
    path = Path(source.path)
    if "://" not in source.path and not path.exists() and not any(path.parent.glob(path.name)):
        raise ValueError(f"{path}: No such file; correct the path of benchmark {benchmark.name}")
    words = benchmark.prompt or form.prompt
    with TemporaryDirectory() as work:
        for where, content in iter_rows(source, Path(work)):
            row, _ = parse_row(content, where)
            if _in_time(str(row.get("contest_date", "")), benchmark):
                question = form.read(row, where)
                prompt = words.replace(PROBLEM, question.text)
                yield Problem(id=question.id, prompt=prompt, key=question.key, where=where), row


def _in_time(day: str, benchmark: Benchmark) -> bool:
    since, until = benchmark.days
    return benchmark.form != "livecodebench" or since <= day[: len("2024-07-01")] <= until
