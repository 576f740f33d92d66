r"""What a completion answers: the content of its last \boxed{}, the letter in that, or its last block of code."""

import re
import textwrap

from tasks.corpus.chats import OPEN
from tasks.corpus.turns import last_answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace opens and closes nothing
_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mathit|rm|bf)\s*\{([^{}]*)\}")
_LEADING_LETTER = re.compile(r"\(?([A-Z])(?:[.:)]|$)")
_TOKEN = re.compile(r"\\?\w+")  # \boxed 5
_FENCE = re.compile(r"\s*```\s*(\w*)")
_PYTHON = {"", "python", "python3", "py"}


def without_thought(completion: str, *, thinking: bool) -> str | None:
    """What follows the last thought of a completion; None where a thought does not end.

    `thinking`: the prompt left the model in a thought, so that the completion begins inside of it.
    """
    return last_answer(OPEN + completion if thinking else completion)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{} (or \fbox{}) that closes, stripped; None without one.

    One pass, however often a model that repeats itself opens a box.
    """
    boxes = [box.end() for box in _BOX.finditer(text)]
    closed = {at: token.span() for at in boxes if (token := _TOKEN.match(text, at))}
    after_box, opened = set(boxes), list[int]()
    for mark in _BRACE.finditer(text):
        if mark[0] == "{":
            opened.append(mark.start())
        elif mark[0] == "}" and opened and (start := opened.pop()) in after_box:
            closed[start] = start + 1, mark.start()
    if not closed:
        return None
    begin, end = closed[max(closed)]
    return text[begin:end].strip() or None


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
    """The last fenced block of Python in a text, or of no named language; None without one that closes.

    A fence that names a language begins a block anew, for no block of Python holds one.
    """
    last: str | None = None
    block: list[str] | None = None
    python = False
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if fence is None:
            if block is not None:
                block.append(line + "\n")
        elif block is None or fence[1]:
            block, python = [], fence[1].lower() in _PYTHON
        else:
            last = "".join(block) if python else last
            block = None
    return textwrap.dedent(last) if last is not None else None
