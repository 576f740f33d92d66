"""Programs judged by tests, as LiveCodeBench judges them: by what they print, or by what a function of theirs returns.

What is expected never enters the sandbox: the output comes out and is compared here.
"""

import json
from decimal import Decimal, InvalidOperation
from typing import Literal

from tasks.judging.problems import Cases
from tasks.judging.sandbox import Sandbox

Fault = Literal["failed", "slow", "large", "wrong"]


def fault(program: str, cases: Cases, sandbox: Sandbox) -> Fault | None:
    """How a program fails the first test that it does not pass; None where it passes every one."""
    compare = same_text if cases.function is None else same_value
    for case in cases.all:
        outcome = sandbox.run(program, case.given, function=cases.function)
        if outcome.ending != "ended":
            return outcome.ending
        if not compare(outcome.output, case.expected):
            return "wrong"
    return None


def same_text(output: str, expected: str) -> bool:
    """Whether two outputs have the same lines, less white space around each, or lines of the same numbers."""
    ours, theirs = _lines(output), _lines(expected)
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def same_value(output: str, expected: str) -> bool:
    """Whether two texts are the same value in JSON; True is not 1, but 1.0 is."""
    try:
        ours, theirs = json.loads(output), json.loads(expected)
        return bool(ours == theirs) and _truths(ours) == _truths(theirs)
    except (ValueError, RecursionError):
        return False


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_line(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    try:
        return [Decimal(word) for word in ours.split()] == [Decimal(word) for word in theirs.split()]
    except InvalidOperation:
        return False


def _truths(value: object) -> object:
    """The places of true and false in a value, which Python takes for 1 and 0."""
    match value:
        case dict():
            return {key: _truths(each) for key, each in value.items()}
        case list():
            return [_truths(each) for each in value]
        case _:
            return isinstance(value, bool)
