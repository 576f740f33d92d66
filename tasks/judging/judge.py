"""Judge a model on a benchmark: ask what was not asked yet, then score all of it."""

from pathlib import Path

from tasks.judging.benchmarks import Benchmark, Sampling, read_benchmark
from tasks.judging.endpoint import Client, Endpoint
from tasks.judging.mathematics import Mathematician
from tasks.judging.programs import Cases
from tasks.judging.samples import fill, open_samples, requests
from tasks.judging.sandbox import Sandbox, require_isolation
from tasks.judging.scorers import Expression
from tasks.judging.scores import Score, score
from tasks.running.limits import cores


def judge(
    benchmark: Benchmark,
    sampling: Sampling,
    endpoint: Endpoint,
    samples: Path,
    *,
    model: str,
    unsafe_code: bool = False,
) -> Score:
    """The score of the endpoint's model on a benchmark; a killed run goes on from the file of its samples.

    `model` tells this model from others of its name, as its digest does. ValueError, before anything is asked, where
    programs cannot be isolated here and `unsafe_code` does not allow them without, math-verify is missing, or the
    server has no such model.
    """
    problems = read_benchmark(benchmark)
    if not unsafe_code and any(isinstance(problem.key, Cases) for problem in problems):
        require_isolation()
    wanted = requests(problems, benchmark.runs, model, sampling)
    client = Client(endpoint)
    with Mathematician() as mathematician, open_samples(samples) as made:
        if any(isinstance(problem.key, Expression) for problem in problems):
            mathematician.start()
        if any(request.digest() not in made for _, _, request in wanted):
            client.check()
        fill(made, wanted, client.complete, endpoint.concurrency)
        sandbox = Sandbox(isolated=not unsafe_code)
        return score(wanted, made, mathematician, sandbox, cores())
