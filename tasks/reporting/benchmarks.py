"""Scores on benchmarks as tables for people: pass@1 by model and benchmark, and what each was measured from."""

from collections.abc import Mapping

from elastic_core.judging import Endpoint
from tasks.judging.contamination import DIFFERENT, N
from tasks.records import BenchmarkScore, EvaluationRecord
from tasks.reporting.numbers import fixed, percent

PASS_AT_1 = (
    "pass@1 in percent: the mean over problems of the share of runs that are right, ± its standard error, were other "
    "problems of the kind drawn."
)


CONTAMINATION = (
    f"A problem stands in the training data where a run of {N} of its tokens does, at least {DIFFERENT} of them "
    "different. One that is there in other words, case or white space is not found."
)


def benchmark_table(evaluation: EvaluationRecord) -> list[dict[str, str]]:
    """pass@1 of each model on each benchmark, as rows of text by column title; none where nothing was judged."""
    benchmarks = list(dict.fromkeys(score.benchmark for score in evaluation.scores))
    rows = dict.fromkeys(_row(score) for score in evaluation.scores)
    return [
        {"model": row} | {name: _cell(scores.get(name)) for name in benchmarks}
        for row in rows
        if (scores := {score.benchmark: score for score in evaluation.scores if _row(score) == row})
    ]


def answers_table(evaluation: EvaluationRecord) -> list[dict[str, str]]:
    """What each score that was measured here was measured from, as rows of text by column title."""
    return [
        {
            "benchmark": score.benchmark,
            "model": score.model,
            "pass@1": percent(score.accuracy, 1),
            "standard error": percent(score.score.standard_error, 1),
            "error of the runs": percent(score.score.run_error, 1),
            "without an answer": percent(score.score.unanswered, 1),
            "cut off": percent(score.score.cut, 1),
            "too slow": percent(score.score.slow, 1),
            "tokens a solution": fixed(score.score.tokens, 0),
            "problems": f"{score.score.problems:,}",
            "runs": f"{score.score.runs}",
            "answered by": score.engine,
        }
        for score in sorted(evaluation.scores, key=lambda score: score.benchmark)
        if score.score is not None
    ]


def contamination_table(evaluation: EvaluationRecord) -> list[dict[str, str]]:
    """How much of each benchmark stands in the training data, as rows of text by column title."""
    return [
        {
            "benchmark": each.benchmark,
            "problems": f"{each.problems:,}",
            "in the training data": f"{each.found:,}",
            "share": percent(each.found / each.problems, 1),
            "too short to tell": f"{each.short:,}",
        }
        for each in evaluation.contamination
    ]


def notes(evaluation: EvaluationRecord, endpoint: Endpoint | None = None) -> list[str]:
    """Where the scores that were published stand, and whether those that an endpoint answered are of these weights."""
    sources = {score.model: score.source for score in evaluation.scores if score.source}
    doubts = [f"Warning: {endpoint.doubt}."] if endpoint is not None and endpoint.doubt else []
    return [f"{model}: published, {source}." for model, source in sources.items()] + doubts


def benchmark_metrics(scores: Mapping[str, BenchmarkScore]) -> dict[str, float]:
    """A model's measured scores as metrics of MLflow, by names such as `math-500.accuracy`."""
    return {
        f"{name}.{metric}": value
        for name, judged in scores.items()
        if (score := judged.score) is not None
        for metric, value in (
            ("accuracy", score.accuracy),
            ("standard_error", score.standard_error),
            ("unanswered", score.unanswered),
            ("tokens", score.tokens),
        )
        if value is not None
    }


def _row(score: BenchmarkScore) -> str:
    return f"{score.model} (published)" if score.source else score.model


def _cell(score: BenchmarkScore | None) -> str:
    if score is None:
        return "-"
    error = score.score.standard_error if score.score else None
    return fixed(score.accuracy * 100, 1) + (f" ± {fixed(error * 100, 1)}" if error is not None else "")
