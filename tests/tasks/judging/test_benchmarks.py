"""Laws of the benchmarks' formats: rows as they are on the Hub become problems; the problems here are our own."""

import base64
import json
import pickle
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from elastic_core.judging import Benchmark
from elastic_core.schema import build
from tasks.judging.benchmarks import read_benchmark
from tasks.judging.problems import Case, Cases, Choice, Expression, Problem, Text

TESTS = [{"input": "1 2", "output": "3", "testtype": "stdin"}, {"input": "2 2", "output": "4", "testtype": "stdin"}]
HIDDEN = [{"input": "5 5", "output": "10", "testtype": "stdin"}]

MATH_500 = {
    "problem": "What is $1+1$?",
    "solution": "",
    "answer": "2",
    "subject": "Algebra",
    "unique_id": "test/a/1.json",
}
AIME_2024 = {"id": 60, "problem": "Find $n$.", "solution": "", "answer": "204", "url": "", "year": "2024"}
AIME_2025 = {"id": "0", "problem": "Find $m$.", "answer": 70, "solution": "", "year": "2025"}
GPQA = {
    "Question": "Which is noble?\n",
    "Correct Answer": "neon ",
    "Incorrect Answer 1": "iron",
    "Incorrect Answer 2": "zinc",
    "Incorrect Answer 3": "lead",
    "Record ID": "rec1",
}
MMLU_PRO = {
    "question_id": 7,
    "question": "The third?",
    "options": ["one", "two", "three", "four", "five"],
    "answer": "C",
    "answer_index": 2,
    "cot_content": "",
    "category": "math",
}
LIVECODEBENCH = {
    "question_title": "Sum",
    "question_content": "Add two numbers.",
    "question_id": "abc_a",
    "contest_date": "2024-08-03T00:00:00",
    "starter_code": "",
    "public_test_cases": json.dumps(TESTS),
    "private_test_cases": json.dumps(HIDDEN),
    "metadata": "{}",
}


def packed(value: object) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def read(directory: Path, rows: Sequence[dict[str, Any]], form: str, **fields: Any) -> list[Problem]:
    file = directory / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_benchmark(build(Benchmark, {"name": "b", "path": str(file), "format": form, **fields}))


def test_math_500_and_aime_are_problems_of_mathematics(tmp_path: Path) -> None:
    found = read(tmp_path, [MATH_500, AIME_2024, AIME_2025], "math")
    assert [(problem.id, problem.key) for problem in found] == [
        ("test/a/1.json", Expression("2")),
        ("60", Expression("204")),
        ("0", Expression("70")),
    ]
    assert found[0].prompt.endswith("inside \\boxed{}.\n\nWhat is $1+1$?")
    assert found[2].where.endswith("problems.jsonl line 3")


def test_mmlu_pro_has_a_letter_for_each_option(tmp_path: Path) -> None:
    (problem,) = read(tmp_path, [MMLU_PRO], "choice")
    assert problem.key == Choice("C", 5)
    assert problem.prompt.endswith("The third?\n\nA) one\nB) two\nC) three\nD) four\nE) five")


def test_gpqa_stands_in_an_order_of_the_questions_own(tmp_path: Path) -> None:
    def letter_of(rows: list[dict[str, str]]) -> str:
        problem = read(tmp_path, rows, "gpqa")[-1]
        assert isinstance(problem.key, Choice)
        assert problem.key.options == 4
        assert f"\n{problem.key.letter}) neon" in problem.prompt
        assert all(f") {other}" in problem.prompt for other in ("iron", "zinc", "lead"))
        return problem.key.letter

    others = [GPQA | {"Question": f"Which is noble, {i}?", "Record ID": f"rec-{i}"} for i in range(40)]
    assert letter_of([GPQA]) == letter_of([*others, GPQA])  # whatever else is in the file
    assert {letter_of([other]) for other in others} == set("ABCD")


def test_livecodebench_has_public_tests_and_hidden_ones(tmp_path: Path) -> None:
    whole = Cases((Case("1 2", "3"), Case("2 2", "4"), Case("5 5", "10")))
    method = {
        "question_id": "two",
        "starter_code": "class Solution:\n    def add(self, a):\n        ",
        "private_test_cases": packed(json.dumps(HIDDEN)),
        "metadata": json.dumps({"func_name": "add"}),
    }
    program, function = read(tmp_path, [LIVECODEBENCH, LIVECODEBENCH | method], "livecodebench")
    assert program.key == whole
    assert function.key == Cases(whole.all, "add")
    assert program.prompt.endswith("Read the input from standard input, and print the output.")
    assert function.prompt.endswith("```python\nclass Solution:\n    def add(self, a):\n```")


def test_livecodebench_counts_the_contests_of_its_days(tmp_path: Path) -> None:
    days = ["2024-06-30", "2024-07-01", "2024-12-31", "2025-01-01"]
    rows = [LIVECODEBENCH | {"question_id": day, "contest_date": f"{day}T00:00:00"} for day in days]
    found = read(tmp_path, rows, "livecodebench", since="2024-07-01", until="2024-12-31")
    assert [problem.id for problem in found] == days[1:3]


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('the pickle was run')",)


@pytest.mark.parametrize("tests", [packed(Runs()), packed([1]), packed(("[]", "[]")), "not base64!", packed("{")])
def test_tests_that_are_no_packed_text_of_json_are_refused_and_never_run(tmp_path: Path, tests: str) -> None:
    with pytest.raises(ValueError, match=r"problems\.jsonl line 1: its tests cannot be read \(.*; mend or remove it"):
        read(tmp_path, [LIVECODEBENCH | {"private_test_cases": tests}], "livecodebench")


def test_ones_own_benchmark_is_a_file_and_five_lines(tmp_path: Path) -> None:
    rows = [{"question": "Capital of France?", "answer": "Paris"}, {"question": "Of Italy?", "answer": "Rome"}]
    found = read(tmp_path, rows, "exact", prompt="In one word: {problem}", max_problems=1)
    assert [(problem.prompt, problem.key) for problem in found] == [("In one word: Capital of France?", Text("Paris"))]
    assert len(found[0].id) == 16


def test_the_defaults_are_nvidias() -> None:
    asked = Benchmark(name="aime-2025")
    drawn = asked.sampling
    assert asked.runs == 8
    assert (drawn.temperature, drawn.top_p, drawn.max_new_tokens, drawn.system) == (0.6, 0.95, 32768, "/think")


@pytest.mark.parametrize(
    ("rows", "form", "fields", "fault"),
    [
        ([{"answer": "2"}], "math", {}, r"line 1 has no 'problem' or 'question', a text; mend or remove it"),
        ([{"problem": "?", "answer": None}], "math", {}, r"line 1 has no 'answer'"),
        ([MMLU_PRO | {"options": None}], "choice", {}, r"line 1 has no 'options', a list of texts"),
        ([MMLU_PRO | {"answer": "D"}], "choice", {}, r"answer 'D' is not its answer_index, 2; mend"),
        ([MMLU_PRO | {"answer_index": "x"}], "choice", {}, r"answer 'C' is not its answer_index, x; mend"),
        ([LIVECODEBENCH | {"metadata": "{"}], "livecodebench", {}, r"line 1: its metadata cannot be read"),
        ([LIVECODEBENCH | {"metadata": "[]"}], "livecodebench", {}, r"line 1: its metadata cannot be read"),
        ([MMLU_PRO | {"answer": "F", "answer_index": None}], "choice", {}, r"'F' is the letter of none of 5 options"),
        ([MATH_500, MATH_500], "math", {}, r"holds the problem 'test/a/1.json' twice; remove one"),
        ([LIVECODEBENCH | {"public_test_cases": "", "private_test_cases": ""}], "livecodebench", {}, "has no tests"),
        (
            [LIVECODEBENCH],
            "livecodebench",
            {"since": "2025-01-01"},
            "holds no problem of benchmark b",
        ),
        ([MATH_500], "math", {"since": "2025-01-01"}, "only format livecodebench has them"),
        ([MATH_500], "math", {"prompt": "Solve this"}, r"has no \{problem\}"),
        ([MATH_500], "maths", {}, "format"),
        ([MATH_500], "math", {"runs": 0}, "runs"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, rows: list[dict[str, Any]], form: str, fields: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        read(tmp_path, rows, form, **fields)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: No such file; correct the path of benchmark b"):
        read_benchmark(Benchmark(name="b", path=str(tmp_path / "none.jsonl"), format="math"))
