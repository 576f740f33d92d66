"""What a benchmark's samples amount to: pass@1 with its standard errors, and what there was to judge."""

import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tasks.judging.answers import without_thought
from tasks.judging.mathematics import Mathematician
from tasks.judging.samples import SampleFile, Wanted
from tasks.judging.sandbox import Sandbox
from tasks.judging.scorers import Verdict, judged
from tasks.records import Score


def score(
    wanted: Sequence[Wanted],
    samples: SampleFile,
    mathematician: Mathematician,
    sandbox: Sandbox,
    workers: int,
) -> Score:
    """Judge the samples of all requests, so many at a time. ValueError where one has not been made."""
    missing = sum(request.digest() not in samples for _, _, request in wanted)
    if missing:
        raise ValueError(f"{missing} of {len(wanted)} samples have not been made; run the benchmark to its end")

    def judge(each: Wanted) -> tuple[Verdict, int, bool]:
        problem, _, request = each
        completion = samples[request.digest()].completion
        answer = without_thought(completion.text, thinking=request.sampling.thinking)
        return judged(answer, problem.key, mathematician, sandbox), completion.tokens, completion.finish == "length"

    with ThreadPoolExecutor(workers, thread_name_prefix="judge") as pool:
        verdicts, tokens, cut = zip(*pool.map(judge, wanted), strict=True)
    by_problem: dict[str, list[bool]] = {}
    for (problem, _, _), judgement in zip(wanted, verdicts, strict=True):
        by_problem.setdefault(problem.id, []).append(judgement.right)
    accuracy, standard_error, run_error = pass_at_1(list(by_problem.values()))
    return Score(
        problems=len(by_problem),
        runs=len(wanted) // len(by_problem),
        accuracy=accuracy,
        standard_error=standard_error,
        run_error=run_error,
        unanswered=statistics.fmean(each.answer is None for each in verdicts),
        cut=statistics.fmean(cut),
        slow=statistics.fmean(each.slow for each in verdicts),
        tokens=statistics.fmean(tokens),
    )


def pass_at_1(right: Sequence[Sequence[bool]]) -> tuple[float, float | None, float | None]:
    """pass@1 of each problem's runs, its standard error over problems, and that over runs; see `Score`."""
    runs = len(right[0])
    shares = [statistics.fmean(each) for each in right]
    over_problems = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else None
    over_runs = math.sqrt(sum(p * (1 - p) for p in shares) / (runs - 1)) / len(shares) if runs > 1 else None
    return statistics.fmean(shares), over_problems, over_runs
