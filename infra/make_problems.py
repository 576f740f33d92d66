"""Write the reasoning problems of the tiny recipe: `problems-train-*.jsonl` and `problems-heldout.jsonl`.

Run once, in an environment of its own, because the generator needs a C compiler and nothing else here needs it:

    pip install reasoning-gym==0.1.25 && python infra/make_problems.py

The same version writes the same bytes. Questions and answers are reasoning-gym's, put tersely: a model of a million
parameters, minutes old, cannot afford words. No question appears twice, in one file or in two.
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import reasoning_gym

HERE = Path(__file__).parents[1] / "flows/recipes/tiny"
SEED = 7
DRAWS = 20_000
TRAIN_PER_TASK, HELDOUT_PER_TASK = 2_300, 50
# Two files, each well below the megabyte above which repositories and reviews refuse a file.
TRAIN_FILES = 2

# One-digit whole numbers: every digit is one token.
DIGITS = {"min_value": 0, "max_value": 9, "min_decimals": 0, "max_decimals": 0}
LIST_OF_DIGITS = {"min_numbers": 3, "max_numbers": 4, **DIGITS}


def digits(numbers: Iterable[Any]) -> str:
    return "".join(str(int(float(number))) for number in numbers)


def matrix(rows: Iterable[Iterable[int]]) -> str:
    return "/".join(digits(row) for row in rows)


def equation(item: dict[str, Any]) -> tuple[str, str]:
    return f"solve {item['metadata']['equation'].replace(' ', '')}", item["answer"]


def sorting(item: dict[str, Any]) -> tuple[str, str]:
    data = item["metadata"]
    return f"sort {data['direction']} {digits(data['original_numbers'])}", digits(data["sorted_numbers"])


def filtering(item: dict[str, Any]) -> tuple[str, str]:
    data = item["metadata"]
    verb, side = data["operation"].split("_")
    question = f"{verb} {side} than {data['filter_value']}: {digits(data['original_numbers'])}"
    return question, digits(data["result"]) or "none"


def mirror(item: dict[str, Any]) -> tuple[str, str] | None:
    """Four ways to mirror; the generator's other transforms cannot be turned off, and are left out here."""
    (operation,) = item["metadata"]["operations"]
    if not operation["transform"].endswith("mirror"):
        return None
    return f"{operation['transform']} {matrix(item['metadata']['matrix'])}", matrix(item["metadata"]["solution"])


def rotation(item: dict[str, Any]) -> tuple[str, str]:
    return f"rotate {matrix(item['metadata']['matrix'])}", matrix(item["metadata"]["solution"])


def spiral(item: dict[str, Any]) -> tuple[str, str]:
    return f"spiral {matrix(item['metadata']['matrix'])}", digits(item["metadata"]["solution"])


TASKS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], tuple[str, str] | None]]] = {
    "simple_equations": (
        {
            "min_terms": 2,
            "max_terms": 2,
            "min_value": 1,
            "max_value": 9,
            "operators": ("+", "-"),
            "operators_weights": [0.5, 0.5],
        },
        equation,
    ),
    "number_sorting": (LIST_OF_DIGITS, sorting),
    "number_filtering": (LIST_OF_DIGITS, filtering),
    "manipulate_matrix": (
        {"min_rows": 2, "max_rows": 2, "min_cols": 2, "max_cols": 2, "min_transforms": 1, "max_transforms": 1},
        mirror,
    ),
    "rotate_matrix": ({"min_n": 2, "max_n": 2, "min_rotations": 1, "max_rotations": 1}, rotation),
    "spiral_matrix": ({"min_n": 2, "max_n": 2}, spiral),
}


def problems(task: str) -> list[str]:
    """All different problems among `DRAWS`, shuffled, as JSONL rows."""
    options, phrase = TASKS[task]
    items = reasoning_gym.create_dataset(task, size=DRAWS, seed=SEED, **options)
    answers = dict(problem for problem in map(phrase, items) if problem)
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "task": task}
        for q, a in answers.items()
    ]
    random.Random(SEED).shuffle(rows)
    return [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]


def main() -> None:
    heldout, train = [], []
    for task in TASKS:
        rows = problems(task)
        heldout += rows[:HELDOUT_PER_TASK]
        train += rows[HELDOUT_PER_TASK : HELDOUT_PER_TASK + TRAIN_PER_TASK]
    # Interleaved, so that the first rows of either kind of file hold every task.
    random.Random(SEED).shuffle(heldout)
    random.Random(SEED).shuffle(train)
    (HERE / "problems-heldout.jsonl").write_text("".join(heldout), encoding="ascii")
    for i in range(TRAIN_FILES):
        (HERE / f"problems-train-{i + 1}.jsonl").write_text("".join(train[i::TRAIN_FILES]), encoding="ascii")


if __name__ == "__main__":
    main()
