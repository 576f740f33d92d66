"""Fills a file of samples in a process that a test may kill."""

import time
from pathlib import Path

from elastic_core.judging import Sampling
from tasks.judging.problems import Problem, Text
from tasks.judging.samples import Completion, Request, Wanted, fill, open_samples, requests

PROBLEMS = [Problem(id=str(i), prompt=f"{i}?", key=Text(str(i)), where="") for i in range(60)]


def wanted(runs: int = 2) -> list[Wanted]:
    return requests(PROBLEMS, runs, "model", Sampling())


def fill_slowly(path: Path, begun: Path) -> None:
    """Fill the file, a hundredth of a second a sample; each that is begun is a line of `begun`."""

    def complete(request: Request) -> Completion:
        with begun.open("a") as file:
            file.write(request.digest() + "\n")
        time.sleep(0.01)
        return Completion(text=f"<think>…\n\u2028</think>{request.prompt[:-1]}", tokens=3, finish="stop")

    with open_samples(path) as samples:
        fill(samples, wanted(), complete, 4)
