r"""What a completion answers: the content of its last \boxed{}, the letter in that, or its last block of code."""

import re
import textwrap

from tasks.corpus.turns import OPEN, last_answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace opens and closes nothing
_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathit|rm|bf)\s*\{([^{}]*)\}")
_LEADING_LETTER = re.compile(r"\(?([A-Z])(?:[.:)]|$)")
_BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_PYTHON = {"", "python", "python3", "py"}


def without_thought(completion: str, *, thinking: bool) -> str | None:
    """What follows the last thought of a completion; None where a thought does not end.

    `thinking`: the prompt left the model in a thought, so that the completion begins inside of it.
    """
    return last_answer(OPEN + completion if thinking else completion)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{} (or \fbox{}) that closes, stripped; None without one."""
    for box in reversed(list(_BOX.finditer(text))):
        content = _content(text, box.end())
        if content is not None:
            return content.strip() or None
    return None


def letter(text: str, options: int) -> str | None:
    """The letter of the choice, of so many `options`, in the last box of a text.

    It is the letter that the box begins with, as in `B`, `(B)` and `B. Paris`, or the only one that stands alone in it.
    """
    content = boxed(text)
    if content is None:
        return None
    bare = _WRAPPER.sub(r" \1 ", content).replace("$", "").strip()
    valid = {chr(ord("A") + i) for i in range(options)}
    leading = _LEADING_LETTER.match(bare)
    if leading and leading[1] in valid:
        return leading[1]
    alone = set(re.findall(r"\b[A-Z]\b", bare)) & valid
    return alone.pop() if len(alone) == 1 else None


def code_block(text: str) -> str | None:
    """The last fenced block of Python in a text, or of no named language; None without one that closes."""
    blocks = [code for language, code in _BLOCK.findall(text) if language.lower() in _PYTHON]
    return textwrap.dedent(blocks[-1]) if blocks else None


def _content(text: str, start: int) -> str | None:
    """What stands in the braces at `start`, or the one token there; None where the braces do not close."""
    if not text.startswith("{", start):
        token = re.compile(r"\\?\w+").match(text, start)
        return token[0] if token else None
    depth = 0
    for mark in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return text[start + 1 : mark.start()]
    return None
