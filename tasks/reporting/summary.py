"""What a run achieved, in numbers for people: the budget table of the terminal, of Prefect and of the report."""

import math
from collections.abc import Mapping, Sequence

from elastic_core.comparison import Cut
from elastic_core.geometry import AXIS_NAMES
from tasks.records import BudgetEvaluation, EvaluationRecord, OrderComparison
from tasks.reporting.numbers import fixed, human_bytes, per_second, percent

# The losses of two models on one token differ by about half a nat (standard deviation), so that their means over N
# tokens differ by chance by 0.5 / sqrt(N). A share of a difference below ten times that would be a share of noise.
_DEVIATION, _DEVIATIONS = 0.5, 10
# By what share, and how many of these deviations, a loss is above another where it is said to be worse.
_WORSE, _WORSE_DEVIATIONS = 0.01, 2

# The budget table


def by_size(evaluation: EvaluationRecord) -> list[BudgetEvaluation]:
    """The budgets from the largest to the smallest."""
    return sorted(evaluation.budgets, key=lambda budget: budget.params, reverse=True)


def recovered(evaluation: EvaluationRecord, budget: BudgetEvaluation) -> float | None:
    """The share of what cutting lost that training won back; None where too little was lost to tell it from noise."""
    lost = budget.cut_cross_entropy - evaluation.teacher_cross_entropy
    if budget.params >= evaluation.teacher_params or not lost > smallest_loss(evaluation.heldout_tokens):
        return None
    return (budget.cut_cross_entropy - budget.cross_entropy) / lost


def smallest_loss(tokens: int) -> float:
    """The smallest difference of two losses, in nats a token on so many tokens, that a share is taken of."""
    return _DEVIATIONS * _by_chance(tokens)


def _by_chance(tokens: int) -> float:
    """The standard deviation of the difference of two losses that are means over so many tokens."""
    return _DEVIATION / math.sqrt(max(tokens, 1))


def summary_table(evaluation: EvaluationRecord) -> list[dict[str, str]]:
    """The teacher and every budget, largest first, as rows of text by column title; "-" stands for "not measured".

    `cut` is the loss of the size as it was cut out of the teacher, before training.
    """
    teacher = {
        "budget": "teacher",
        "parameters": f"{evaluation.teacher_params:,}",
        **active_column(evaluation.teacher_active_params),
        "cut": "-",
        "loss": fixed(evaluation.teacher_cross_entropy, 3),
        "KL": "-",
        "accuracy": percent(evaluation.teacher_accuracy, 1),
        "tokens/s": "-",
        "size": "-",
        "recovered": "-",
    }
    rows = [
        {
            "budget": budget.budget,
            "parameters": f"{budget.params:,}",
            **active_column(budget.active_params),
            "cut": fixed(budget.cut_cross_entropy, 3),
            "loss": fixed(budget.cross_entropy, 3),
            "KL": fixed(budget.kl, 4),
            "accuracy": percent(budget.accuracy, 1),
            "tokens/s": per_second(budget.tokens_per_second),
            "size": human_bytes(budget.weight_bytes),
            "recovered": percent(recovered(evaluation, budget), 1),
        }
        for budget in by_size(evaluation)
    ]
    return [teacher, *rows]


def worsened(evaluation: EvaluationRecord) -> list[BudgetEvaluation]:
    """The budgets that were better before training, by more than chance."""
    chance = _WORSE_DEVIATIONS * _by_chance(evaluation.heldout_tokens)
    return [
        budget
        for budget in by_size(evaluation)
        if budget.cross_entropy > budget.cut_cross_entropy + max(chance, _WORSE * budget.cut_cross_entropy)
    ]


def training_warnings(evaluation: EvaluationRecord) -> list[str]:
    """A line for each budget that training made worse."""
    return [
        f"{budget.budget} is worse than before it was trained: loss {fixed(budget.cross_entropy, 3)}, and "
        f"{fixed(budget.cut_cross_entropy, 3)} as it was cut; lower the stages' learning_rate, or train on more tokens"
        for budget in worsened(evaluation)
    ]


def evaluation_warnings(evaluation: EvaluationRecord) -> list[str]:
    """What makes numbers of the evaluation worth less than they look, a line each."""
    cut = {"teacher": evaluation.teacher_cut_answers} | {b.budget: b.cut_answers for b in by_size(evaluation)}
    told = ", ".join(f"{name} {percent(share, 1)}" for name, share in cut.items() if share)
    warning = f"answers to problems were cut off at max_new_tokens ({told}) and count as they stand; raise it"
    return training_warnings(evaluation) + [warning] * bool(told)


def active_column(params: int | None) -> dict[str, str]:
    """A column of models with experts alone."""
    return {} if params is None else {"active": f"{params:,}"}


def summary_lines(evaluation: EvaluationRecord) -> dict[str, str]:
    """What became of each budget, in plain words, by budget."""
    lines = {}
    for budget in by_size(evaluation):
        loss, share = above_teacher(evaluation, budget), recovered(evaluation, budget)
        lines[budget.budget] = (
            f"{percent(budget.params / evaluation.teacher_params)} of the parameters, loss {_beside_teacher(loss)}"
            + (f", {percent(share)} of what cutting lost is recovered" if share is not None else "")
        )
    return lines


def _beside_teacher(difference: float) -> str:
    if difference == 0:
        return "equal to the teacher's"
    return f"{abs(difference):.3f} nats a token {'above' if difference > 0 else 'below'} the teacher's"


def above_teacher(evaluation: EvaluationRecord, budget: BudgetEvaluation) -> float:
    """Cross-entropy above the teacher's, rounded as it is shown, and never minus zero."""
    return round(budget.cross_entropy - evaluation.teacher_cross_entropy, 3) + 0.0


# The order of importance

ORDERS = "KL to the teacher, in nats a token, where one axis of it is cut with no training:"


def cut_title(cut: Cut) -> str:
    """A cut in words: FFN neurons 384 to 192."""
    return f"{AXIS_NAMES[cut.axis]} {cut.full:,} to {cut.size:,}"


def order_table(orders: OrderComparison) -> list[dict[str, str]]:
    """KL to the teacher of each cut, by importance and in random orders, as rows of text by column title."""
    return [
        {
            "cut": cut_title(cut),
            "by importance": fixed(cut.by_importance, 4),
            "at random": _at_random(cut),
            "importance loses less": "yes" if cut.beats_random else "no",
        }
        for cut in orders.cuts
    ]


def order_warnings(orders: OrderComparison) -> list[str]:
    """A line for each cut that loses no less in the order of importance than in a random order."""
    return [
        f"{cut_title(cut)}: the order of importance is no better than a random one; KL to the teacher of the cut "
        f"alone: {fixed(cut.by_importance, 4)}, in random orders {_at_random(cut)}"
        for cut in orders.doubtful
    ]


def _at_random(cut: Cut) -> str:
    return f"{fixed(cut.random_mean, 4)} ± {fixed(cut.random_spread, 4)}"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal columns as a Markdown table; every column but the first is aligned right."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    titles = list(rows[0])
    rule = "|" + "|".join([" --- ", *[" ---: "] * (len(titles) - 1)]) + "|"
    return "\n".join([line(titles), rule, *(line([row[title] for title in titles]) for row in rows)]) + "\n"
