"""Whether a completion answers a problem: by mathematics, a choice's letter, exact match, or a program's tests."""

from dataclasses import dataclass

from tasks.judging.answers import boxed, code_block, letter
from tasks.judging.mathematics import Mathematician
from tasks.judging.problems import Cases, Choice, Expression, Key, Text
from tasks.judging.programs import fault
from tasks.judging.sandbox import Sandbox


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer that was found in a completion, None without one, and whether it is right.

    `slow`: it is a program that was stopped because of its time.
    """

    answer: str | None
    right: bool
    slow: bool = False


def judged(answer: str | None, key: Key, mathematician: Mathematician, sandbox: Sandbox) -> Verdict:
    """The verdict on what a completion says after its last thought; None is a thought that does not end.

    A program of the answer is run in the sandbox.
    """
    if answer is None:
        return Verdict(None, False)
    match key:
        case Expression(value):
            found = boxed(answer)
            return Verdict(found, found is not None and mathematician.same(value, found))
        case Choice(right, options):
            found = letter(answer, options)
            return Verdict(found, found == right)
        case Text(value):
            return Verdict(answer or None, answer == value.strip())
        case Cases():
            found = code_block(answer)
            if found is None:
                return Verdict(None, False)
            fails = fault(found, key, sandbox)
            return Verdict(found, fails is None, slow=fails == "slow")
