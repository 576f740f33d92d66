"""Laws of the scorers: the right verdict for answers in the forms that models write; nothing that they write harms."""

from collections.abc import Iterator

import pytest

from tasks.judging.answers import boxed, code_block, letter, without_thought
from tasks.judging.mathematics import Mathematician
from tasks.judging.problems import Choice, Expression, Key, Text
from tasks.judging.sandbox import Sandbox
from tasks.judging.scorers import Verdict, judged

pytest.importorskip("math_verify", reason="math-verify comes with the extra `eval`")


@pytest.fixture(scope="module")
def mathematician() -> Iterator[Mathematician]:
    with Mathematician() as one:
        yield one


# Expected answer, what is in the box, whether it is right.
EXPRESSIONS = [
    # Numbers
    ("42", "42", True),
    ("42", "42.0", True),
    ("042", "42", True),
    ("42", "43", False),
    ("42", "4 2", False),
    ("-3", "3", False),
    ("1000", "1{,}000", True),
    ("1,000", "1000", True),
    ("1234567", "1,234,567", True),
    ("12,000", "12\\,000", True),
    ("1,250.5", "1250.50", True),
    ("-1,000", "-1000", True),
    ("0.5", "0.50", True),
    ("12", "12.5", False),
    ("1.5\\times10^{3}", "1500", True),
    ("2^{10}", "1024", True),
    ("120", "5!", True),
    ("5", "5!", False),
    ("7", "$7$", True),
    ("7", "7.", True),
    # Fractions
    ("\\frac{1}{2}", "0.5", True),
    ("\\frac12", "1/2", True),
    ("\\frac{1}{2}", "\\dfrac{1}{2}", True),
    ("\\frac{14}{3}", "\\frac{28}{6}", True),
    ("\\frac{14}{3}", "\\frac{3}{14}", False),
    ("3\\frac{1}{2}", "7/2", True),
    ("3\\frac{1}{2}", "3 \\frac{1}{2}", True),
    ("-3\\frac{1}{2}", "-3.5", True),
    ("-3\\frac{1}{2}", "-2.5", False),
    ("\\frac{1}{3}", "0.33", False),
    # Roots, constants, algebra
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("11\\sqrt2", "11\\sqrt{2}", True),
    ("\\pi", "3.14", False),
    ("x^2+2x+1", "(x+1)^2", True),
    ("x^2+2x+1", "(x-1)^2", False),
    ("p-q", "q-p", False),
    ("2k+1", "2n+1", False),
    ("5", "x=5", True),
    ("x=5", "5", True),
    ("6+9i", "9i + 6", True),
    # Intervals, sets, pairs, matrices
    ("[0,1)", "[0, 1)", True),
    ("[0,1)", "[0,1]", False),
    ("(-\\infty,3]", "\\left(-\\infty, 3\\right]", True),
    ("x \\in [-2,7]", "[-2,7]", True),
    ("\\{1,2\\}", "\\{2,1\\}", True),
    ("1,2", "2,1", True),
    ("1,2", "1", False),
    ("(1,2)", "(2,1)", False),
    ("(0,100)", "(0, 100)", True),
    ("[0,100]", "\\left[0, 100\\right]", True),
    ("100, 200", "200, 100", True),
    ("100,200", "100, 200", True),
    ("100, 200", "200,100", True),
    ("100,200", "100200", True),
    ("100, 200", "100200", False),
    ("100,200", "100, 201", False),
    ("1\\,2", "1 2", True),
    ("12", "1\\ 2", False),
    ("1 \\pm \\sqrt{19}", "1-\\sqrt{19},1+\\sqrt{19}", True),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", True),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}", False),
    # Units, money, percent, degrees, words
    ("10", "10\\text{ cm}", True),
    ("10\\text{ cm}", "10", True),
    ("\\frac{3}{4}", "\\frac{3}{4}\\text{ hours}", True),
    ("\\$18.90", "18.90", True),
    ("18.90", "18.90\\$", True),
    ("1000", "\\$1,000", True),
    ("1000", "1,000\\text{ miles}", True),
    ("50\\%", "50", True),
    ("30^\\circ", "30", True),
    ("30^{\\circ}", "60^\\circ", False),
    ("\\text{Monday}", "Monday", True),
    ("even", "odd", False),
    ("\\text{June 20}", "June 20", True),
    ("\\text{A-}", "A-", True),
    ("\\text{A-}", "A+", False),
    ("\\text{(C)}", "C", True),
    # What is no answer
    ("5", "(((((", False),
    ("5", "\\text{I do not know}", False),
]


@pytest.mark.parametrize(("expected", "said", "right"), EXPRESSIONS)
def test_mathematics_is_judged_by_its_value(
    expected: str, said: str, right: bool, mathematician: Mathematician
) -> None:
    verdict = judged(f"So it is \\boxed{{{said}}}.", Expression(expected), mathematician, Sandbox())
    assert (verdict.answer, verdict.right) == (said, right)


B, FIVE, PARIS = Choice("B", 4), Expression("5"), Text("Paris")
COMPLETIONS: list[tuple[str, Key, str | None, bool]] = [
    # Boxes in prose
    (r"We get $x=\boxed{5}$ after division.", FIVE, "5", True),
    (r"\[ \boxed{ 5 } \]", FIVE, "5", True),
    (r"First \boxed{3}, but on reflection \boxed{5}.", FIVE, "5", True),
    (r"First \boxed{5}, but on reflection \boxed{3}.", FIVE, "3", False),
    (r"It is \boxed{\frac{10}{2}}", FIVE, r"\frac{10}{2}", True),
    (r"It is \fbox{5}", FIVE, "5", True),
    (r"It is \boxed 5", FIVE, "5", True),
    (r"It is \boxed{5} and then \boxed{6", FIVE, "5", True),
    (r"It is 5.", FIVE, None, False),
    (r"It is \boxed{}", FIVE, None, False),
    (r"It is \boxed{5", FIVE, None, False),
    (r"\boxed{\{5\}}", Expression(r"\{5\}"), r"\{5\}", True),
    # Thoughts
    (r"<think>Maybe \boxed{4}</think>It is \boxed{5}", FIVE, "5", True),
    (r"<think>It is \boxed{5}</think>I cannot say.", FIVE, None, False),
    (r"<think>It is \boxed{5}, or is it", FIVE, None, False),
    (r"<think>a</think>\boxed{4}<think>no, \boxed{5}</think>\boxed{5}", FIVE, "5", True),
    # Choices
    (r"Answer: \boxed{B}", B, "B", True),
    (r"Answer: \boxed{C}", B, "C", False),
    (r"Answer: \boxed{\text{B}}", B, "B", True),
    (r"Answer: \boxed{\textbf{(B)}}", B, "B", True),
    (r"Answer: \boxed{B. Paris}", B, "B", True),
    (r"Answer: \boxed{(B) A capital}", B, "B", True),
    (r"Answer: \boxed{The answer is B}", B, "B", True),
    (r"Answer: \boxed{B or C}", B, None, False),
    (r"Answer: \boxed{Berlin}", B, None, False),
    (r"Answer: \boxed{b}", B, None, False),
    (r"Answer: \boxed{J}", B, None, False),
    (r"Answer: \boxed{J}", Choice("J", 10), "J", True),
    (r"The answer is B, a city.", B, None, False),
    (r"A good question. B", B, None, False),
    (r"\boxed{A}, no: \boxed{B}", B, "B", True),
    # Exact match
    ("Paris", PARIS, "Paris", True),
    (" Paris\n", PARIS, "Paris", True),
    ("paris", PARIS, "paris", False),
    ("It is Paris", PARIS, "It is Paris", False),
    ("<think>Rome?</think>\n\nParis", PARIS, "Paris", True),
    ("<think>Paris", PARIS, None, False),
    ("", PARIS, None, False),
]


@pytest.mark.parametrize(("completion", "key", "found", "right"), COMPLETIONS)
def test_an_answer_is_found_where_it_stands(
    completion: str, key: Key, found: str | None, right: bool, mathematician: Mathematician
) -> None:
    after = without_thought(completion, thinking=False)
    assert judged(after, key, mathematician, Sandbox()) == Verdict(found, right)


@pytest.mark.parametrize(("completion", "key", "found", "right"), COMPLETIONS)
def test_a_model_that_thinks_scores_as_its_answers_alone_would(
    completion: str, key: Key, found: str | None, right: bool, mathematician: Mathematician
) -> None:
    thought = r"Is it \boxed{77}, or \boxed{D}, or Rome?"
    begun_in_prompt = without_thought(f"{thought}</think>{completion}", thinking=True)
    assert judged(begun_in_prompt, key, mathematician, Sandbox()) == Verdict(found, right)
    never_ended = without_thought(f"{thought} {completion.rpartition('</think>')[2]}", thinking=True)
    assert judged(never_ended, key, mathematician, Sandbox()) == Verdict(None, False)


def test_an_answer_that_cannot_be_computed_is_wrong_and_the_next_is_judged() -> None:
    with Mathematician(seconds=1) as hurried:
        for said in ("9^{9^{9^9}}", "{" * 1000, "1" * 100_000):
            assert not hurried.same("5", said)
        hurried.seconds = 60  # the first comparison of a new process takes longest
        assert hurried.same("5", "10/2")


def test_a_comparison_is_made_again_when_its_process_dies() -> None:
    with Mathematician() as one:
        assert one.same("5", "10/2")
        assert one._process is not None
        one._process.kill()
        one._process.join()
        assert one.same("5", "15/3")


def test_boxes_and_letters_and_code_are_none_where_there_are_none() -> None:
    assert boxed("") is boxed("boxed{5}") is None
    assert letter("", 4) is None
    assert code_block("") is code_block("```python\nprint(1)") is None


def test_the_last_block_of_python_is_the_program() -> None:
    text = "First:\n```python\nprint(1)\n```\nBetter:\n```py\nprint(2)\n```\nIt prints:\n```text\n2\n```\n"
    assert code_block(text) == "print(2)\n"
    assert code_block("```python\nprint(1)\n```\nRun it:\n```bash\npython x.py\n```\n") == "print(1)\n"
    assert code_block("```\nprint(3)\n```") == "print(3)\n"
    assert code_block("1. So:\n   ```python\n   print(4)\n   ```\n") == "print(4)\n"


def test_a_text_that_repeats_itself_is_read_once() -> None:
    """A second for each of these would be days for a benchmark; where every opening is followed to the end, minutes."""
    assert boxed("\\boxed{" * 200_000) is None
    assert boxed("\\boxed{" * 200_000 + "5}") == "5"
    assert boxed("\\boxed{" * 200_000 + "5" + "}" * 200_000) == "5"
    assert code_block("```python\n" * 200_000) is None
    assert code_block("```python\n" * 200_000 + "print(5)\n```") == "print(5)\n"


def test_a_choice_that_is_none_of_the_options_is_refused() -> None:
    with pytest.raises(ValueError, match="'E' is the letter of none of 4 options"):
        Choice("E", 4)
