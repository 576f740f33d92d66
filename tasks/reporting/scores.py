"""The scores of a family: in the model cards that are published, and in words for the registry.

A card is written with its files, which are evaluated afterwards. Its section of scores is filled when the files are
published. What decides whether two versions hold the same is the card as it was written.
"""

import json
from dataclasses import asdict, replace

from elastic_core.budget import WHOLE
from tasks.records import BudgetEvaluation, EvaluationRecord
from tasks.reporting.benchmarks import PASS_AT_1, benchmark_table, notes
from tasks.reporting.numbers import fixed, percent
from tasks.reporting.summary import markdown_table, summary_table

_HEADING, _NEXT = "## Scores\n", "\n## "
# No times: those differ at each attempt.
_COLUMNS = ("budget", "parameters", "cut", "loss", "KL", "accuracy", "recovered")


def scored(card: str, part: str, evaluation: EvaluationRecord) -> str:
    """A part's card with what was measured: of a slice its own row, of the whole family every budget's."""
    rows = [
        {column: row[column] for column in _COLUMNS}
        for row in summary_table(evaluation)
        if part == WHOLE or row["budget"] in ("teacher", part)
    ]
    measured = [
        {"measured on": name.replace("_", " "), "": value if isinstance(value, str) else json.dumps(value)}
        for name, value in asdict(evaluation.conditions).items()
    ]
    before, after = _around(card)
    return before + "\n".join(
        [
            _HEADING,
            markdown_table(rows),
            "Loss is cross-entropy on held-out text, cut the loss before training, and KL is to the teacher, in nats",
            f"a token. Accuracy is the share of {evaluation.problems:,} held-out problems answered. Recovered is the",
            "share of what the cut lost that training won back. This was measured when these files were first",
            "published; what was measured of them later is with the later versions in the registry.",
            "",
            markdown_table(measured) + _benchmarks(evaluation, part) + after,
        ]
    )


def _benchmarks(evaluation: EvaluationRecord, part: str) -> str:
    """The scores on benchmarks beside the teacher's and the references'; of the whole family every budget's."""
    others = {budget.budget for budget in evaluation.budgets} - {part}
    scores = [score for score in evaluation.scores if part == WHOLE or score.model not in others]
    shown = replace(evaluation, scores=tuple(scores))
    if not scores:
        return ""
    return "\n" + "\n".join([markdown_table(benchmark_table(shown)), "\n".join([PASS_AT_1, *notes(shown)])]) + "\n"


def differ_in_scores_alone(card: str, other: str) -> bool:
    """Whether two cards are the same but for what their section of scores says."""
    return _around(card) == _around(other)


def _around(card: str) -> tuple[str, str]:
    """What stands before and after the section of scores; a ValueError where a card has none, or two."""
    before, heading, rest = card.partition(_HEADING)
    _, following, after = rest.partition(_NEXT)
    if not heading or not following or _HEADING in after:
        raise ValueError("the model card has no section of scores, or two, to write what was measured into")
    return before, following + after


def score_line(evaluation: EvaluationRecord, budget: BudgetEvaluation) -> str:
    """The scores of a budget, and on what they were measured, in one sentence."""
    accuracy = f", accuracy {percent(budget.accuracy, 1)} of {evaluation.problems:,} problems"
    return (
        f"Cross-entropy {fixed(budget.cross_entropy, 4)} (the teacher's {fixed(evaluation.teacher_cross_entropy, 4)}) "
        f"and KL to the teacher {fixed(budget.kl, 4)} nats a token on {evaluation.heldout_tokens:,} held-out tokens"
        f"{accuracy if budget.accuracy is not None else ''}, in {evaluation.conditions.dtype} on "
        f"{evaluation.conditions.device}."
    )
