"""Judge a model on a benchmark: have an engine answer what was not answered yet, then score all of it."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from elastic_core.judging import Benchmark, Format
from tasks.judging.benchmarks import read_benchmark
from tasks.judging.mathematics import Mathematician
from tasks.judging.samples import SampleFile, Wanted, missing_from, open_samples, requests, unseen
from tasks.judging.sandbox import Sandbox, require_isolation
from tasks.judging.scores import score
from tasks.records import Score
from tasks.running.bars import Report
from tasks.running.limits import cores


class Answering(Protocol):
    """An engine that answers as one model. `identity` tells its answers from those of every other model and engine."""

    identity: str

    def fill(self, samples: SampleFile, wanted: Sequence[Wanted], report: Report) -> None:
        """Make the samples that are missing."""


def judge(
    benchmark: Benchmark, engine: Answering, samples: Path, *, unsafe_code: bool = False, report: Report = unseen
) -> Score:
    """The engine's score on a benchmark of local files; a killed run goes on from the file of its samples.

    ValueError, before anything is asked, where `require_scorer` raises one.
    """
    require_scorer(benchmark.form, unsafe_code)
    problems = read_benchmark(benchmark)
    wanted = requests(problems, benchmark.runs, engine.identity, benchmark.sampling)
    waits = f"waiting for {samples}, which another run fills"
    with Mathematician() as mathematician, open_samples(samples, waits) as made:
        if benchmark.form == "math":
            mathematician.start()
        if missing_from(made, wanted):
            engine.fill(made, wanted, report)
        sandbox = Sandbox(isolated=not unsafe_code)
        return score(wanted, made, mathematician, sandbox, cores())


def require_scorer(form: Format, unsafe_code: bool) -> None:
    """ValueError, with the remedy, where answers of this form cannot be scored on this machine.

    Programs need a sandbox, unless `unsafe_code` allows them without; mathematics needs math-verify.
    """
    if form == "livecodebench" and not unsafe_code:
        require_isolation()
    if form == "math" and find_spec("math_verify") is None:
        raise ValueError("math-verify, by which mathematics is judged, is missing; pip install 'elastic-family[eval]'")
