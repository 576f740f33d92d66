"""What a model is asked, and the answer that counts; how answers are judged is said in `scorers.py`.

An engine's own code reaches this file and no scorer, so that what was answered stays where scorers change.
"""

from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Case:
    """Standard input and the output that is expected; for a function its arguments, a line of JSON each, and result."""

    given: str
    expected: str


@dataclass(frozen=True, slots=True)
class Cases:
    """Every test must pass. `function`: the name of the function, or method of class Solution, that they call."""

    all: tuple[Case, ...]
    function: str | None = None

    def __post_init__(self) -> None:
        if not self.all:
            raise ValueError("a program without tests cannot be judged")


Key = Expression | Choice | Text | Cases


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a model is asked, the answer that counts, and the row that it comes from."""

    id: str
    prompt: str
    key: Key
    where: str
