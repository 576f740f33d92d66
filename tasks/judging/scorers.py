"""Whether a completion answers a problem: by mathematics, by the letter of a choice, or by exact match."""

from dataclasses import dataclass

from tasks.judging.answers import boxed, letter
from tasks.judging.mathematics import Mathematician


@dataclass(frozen=True, slots=True)
class Expression:
    """A boxed answer that equals this one mathematically is right."""

    value: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The boxed letter of one of so many options is right."""

    letter: str
    options: int

    def __post_init__(self) -> None:
        letters = [chr(ord("A") + i) for i in range(self.options)]
        if self.letter not in letters:
            raise ValueError(f"{self.letter!r} is the letter of none of {self.options} options")


@dataclass(frozen=True, slots=True)
class Text:
    """The whole answer, less the white space around it, is this text."""

    value: str


Key = Expression | Choice | Text


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer that was found in a completion, None without one, and whether it is right."""

    answer: str | None
    right: bool


def judged(answer: str | None, key: Key, mathematician: Mathematician) -> Verdict:
    """The verdict on what a completion says after its last thought; None is a thought that does not end."""
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
