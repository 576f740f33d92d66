"""The rows of MATH-500, AIME, GPQA, LiveCodeBench and MMLU-Pro as problems, and of one's own file in their form."""

import base64
import hashlib
import json
import pickletools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.corpus.chats import Row, Unusable
from tasks.judging.problems import Case, Cases, Choice, Expression, Key, Text

TESTS_BYTES = 1 << 30  # of one problem, unpacked; LiveCodeBench's largest are under a tenth

MATH = "Solve this mathematical problem. Put the final answer, and nothing else, inside \\boxed{}.\n\n{problem}"
CHOICE = (
    "Answer this multiple-choice question. End with a line of the form 'Answer: \\boxed{LETTER}', "
    "where LETTER is the letter of the right option.\n\n{problem}"
)
CODE = "Write a Python program for this problem. Give it whole, in one block that begins with ```python.\n\n{problem}"
READS = "Read the input from standard input, and print the output."
STARTS = "Complete this code, and keep its names:"


@dataclass(frozen=True, slots=True)
class Question:
    """A row's problem, before the words that ask it."""

    id: str
    text: str
    key: Key


@dataclass(frozen=True, slots=True)
class Form:
    """The words that ask a problem, and how a row is read."""

    prompt: str
    read: Callable[[Row, str], Question]


def _math(row: Row, where: str) -> Question:
    text = _text(row, where, "problem", "question")
    return Question(_id(row, text), text, Expression(_text(row, where, "answer")))


def _exact(row: Row, where: str) -> Question:
    text = _text(row, where, "problem", "question")
    return Question(_id(row, text), text, Text(_text(row, where, "answer")))


def _choice(row: Row, where: str) -> Question:
    text, options = _text(row, where, "question", "problem"), row.get("options")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise Unusable(f"{where} has no 'options', a list of texts; mend or remove it")
    right = _text(row, where, "answer").strip()
    if row.get("answer_index") not in (None, ord(right[0]) - ord("A")):
        raise Unusable(f"{where}: answer {right!r} is not its answer_index, {row['answer_index']}; mend or remove it")
    return Question(_id(row, text), _with_options(text, options), _choice_key(right, len(options), where))


def _gpqa(row: Row, where: str) -> Question:
    text = _text(row, where, "Question").strip()
    right = _text(row, where, "Correct Answer").strip()
    options = [right, *(_text(row, where, f"Incorrect Answer {i}").strip() for i in (1, 2, 3))]
    # In an order of the question's own, so that no letter is right more often and each run asks the same.
    options.sort(key=lambda option: hashlib.sha256(f"{text}\0{option}".encode()).digest())
    key = Choice(_letter(options.index(right)), len(options))
    return Question(_id(row, text), _with_options(text, options), key)


def _livecodebench(row: Row, where: str) -> Question:
    content, starter = _text(row, where, "question_content"), row.get("starter_code") or ""
    public, private = _tests(row.get("public_test_cases"), where), _tests(row.get("private_test_cases"), where)
    if not public and not private:
        raise Unusable(f"{where} has no tests; mend or remove it")
    end = f"{STARTS}\n\n```python\n{starter.rstrip()}\n```" if starter.strip() else READS
    return Question(_id(row, content), f"{content.strip()}\n\n{end}", Cases((*public, *private), _function(row, where)))


FORMATS: Mapping[str, Form] = {
    "math": Form(MATH, _math),
    "exact": Form("{problem}", _exact),
    "choice": Form(CHOICE, _choice),
    "gpqa": Form(CHOICE, _gpqa),
    "livecodebench": Form(CODE, _livecodebench),
}


def _text(row: Row, where: str, *names: str) -> str:
    """The first of these fields that is there, a text or a whole number."""
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
        return str(value)
    raise Unusable(f"{where} has no {' or '.join(map(repr, names))}, a text; mend or remove it")


def _id(row: Row, text: str) -> str:
    """The row's own name, or the digest of its text."""
    names = ("unique_id", "question_id", "Record ID", "id", "ID")
    own = next((row[name] for name in names if row.get(name) is not None), None)
    return str(own) if own is not None else hashlib.sha256(text.encode()).hexdigest()[:16]


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _with_options(text: str, options: list[str]) -> str:
    return "\n".join([text.strip(), "", *(f"{_letter(i)}) {option}" for i, option in enumerate(options))])


def _choice_key(right: str, options: int, where: str) -> Choice:
    try:
        return Choice(right, options)
    except ValueError as error:
        raise Unusable(f"{where}: {error}; mend or remove it") from error


def _function(row: Row, where: str) -> str | None:
    """The name of the function that the tests call; None where they run the program."""
    metadata = row.get("metadata") or {}
    try:
        name = (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")
    except (ValueError, AttributeError) as error:
        raise Unusable(f"{where}: its metadata cannot be read ({error}); mend or remove it") from error
    return str(name) if name else None


def _tests(packed: Any, where: str) -> tuple[Case, ...]:
    """The tests in a column: a list, JSON, or LiveCodeBench's base64 of zlib of a pickled text of JSON."""
    if not packed:
        return ()
    try:
        cases = packed if isinstance(packed, list) else json.loads(packed if packed[0] == "[" else _unpacked(packed))
        return tuple(Case(case["input"], case["output"]) for case in cases)
    except (ValueError, TypeError, KeyError, zlib.error) as error:
        raise Unusable(f"{where}: its tests cannot be read ({error}); mend or remove it") from error


def _unpacked(packed: str) -> str:
    """The text in base64 of zlib of a pickle. The pickle is read, and never run: it may hold one text and no more."""
    inflater = zlib.decompressobj()
    data = inflater.decompress(base64.b64decode(packed, validate=True), TESTS_BYTES)
    if inflater.unconsumed_tail:
        raise ValueError(f"they are larger than {TESTS_BYTES} bytes")
    found: list[str] = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("BINUNICODE", "BINUNICODE8", "SHORT_BINUNICODE"):
            found.append(str(argument))
        elif opcode.name not in ("PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"):
            raise ValueError(f"their pickle does more than hold a text: {opcode.name}")
    if len(found) != 1:
        raise ValueError(f"their pickle holds {len(found)} texts, not one")
    return found[0]
