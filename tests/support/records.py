"""Made-up records of measurements, for tests that are not about measuring."""

from dataclasses import replace
from typing import Any

from tasks.records import BenchmarkScore, BudgetEvaluation, Conditions, EvaluationRecord, Score

CONDITIONS = Conditions(
    heldout_sha256="0" * 64,
    tokenizer_sha256="1" * 64,
    sequences=10,
    tokens=400,
    settings={"sequence_length": 40},
    dtype="float32",
    device="cpu",
    code="2" * 64,
)


def measured(budget: str, loss: float) -> BudgetEvaluation:
    """A budget of one parameter that has this cross-entropy."""
    return BudgetEvaluation(
        budget=budget,
        params=1,
        weight_bytes=4,
        memory_bytes=8,
        cross_entropy=loss,
        kl=0.0,
        cut_cross_entropy=loss,
        random_cut_cross_entropy=loss,
        tokens_per_second=1.0,
    )


def judged(model: str, accuracy: float, *, benchmark: str = "sums", **changes: Any) -> BenchmarkScore:
    """A model that has this pass@1 on 100 problems, with a standard error of 2 %."""
    score = Score(
        problems=100,
        runs=8,
        accuracy=accuracy,
        standard_error=0.02,
        run_error=0.01,
        unanswered=0.125,
        cut=0.0625,
        slow=0.03125,
        tokens=4096.0,
    )
    how = {"protocol": "alike", "engine": "vllm 0.99"}
    return replace(BenchmarkScore(model=model, benchmark=benchmark, accuracy=accuracy, score=score, **how), **changes)


def evaluated(*budgets: BudgetEvaluation, **changes: Any) -> EvaluationRecord:
    """What `evaluate` says of these budgets, beside a teacher whose cross-entropy is 1."""
    record = EvaluationRecord(
        conditions=CONDITIONS,
        teacher_params=1,
        teacher_cross_entropy=1.0,
        teacher_accuracy=None,
        heldout_tokens=400,
        problems=0,
        budgets=budgets,
    )
    return replace(record, **changes)
