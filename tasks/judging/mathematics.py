"""Whether two mathematical answers are the same: math-verify, in a process of its own that may be killed.

An answer such as 9^{9^{9^9}} keeps sympy busy for ever, or takes all memory. So that process has a limit of memory, and
is replaced where it does not answer in time.
"""

import logging
import multiprocessing
import re
import resource
from multiprocessing.connection import Connection
from threading import Lock
from types import TracebackType
from typing import Self

START_SECONDS = 120.0  # until sympy is imported, on a busy machine
ANSWER_SECONDS = 20.0  # math-verify itself gives a comparison, and each of the two parses, five
MEMORY_BYTES = 4 << 30
LONGEST = 2000  # characters; no answer of a benchmark is nearly as long

# Between two digits a space parts two numbers.
_GAP = r"(?:\\[,;:! ]|\\q?quad|~|\s+)+"
_SPACE = re.compile(rf"(?<!\d){_GAP}|{_GAP}(?!\d)")
_WORDS = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_PERCENT_OR_DEGREES = re.compile(r"\\?%|\^\s*\{?\s*\\circ\s*\}?|\\degree")
_GROUP_MARK = re.compile(r"(?<=\d)(?:\{,\}|\\,|\\!)(?=\d{3})")
# A number alone, maybe with a unit: in a pair or a list the comma parts two numbers.
_GROUPED = re.compile(r"(-?(?:\\\$)?[1-9]\d{0,2}(?:,\d{3})+)(?=$|\s|\.\d|\\)")
_MIXED = re.compile(r"(-?)(\d+)\s*(\\[dt]?frac\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d))")

logger = logging.getLogger(__name__)


class Mathematician:
    """Compares answers with math-verify. One comparison at a time; close it, or use it as a context."""

    def __init__(self, *, seconds: float = ANSWER_SECONDS) -> None:
        self.seconds = seconds
        self._lock = Lock()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start the process now, not with the first comparison; ValueError where math-verify is missing."""
        with self._lock:
            self._connection = self._connection or self._started()

    def same(self, expected: str, answer: str) -> bool:
        """Whether an answer equals the expected one, both in LaTeX or plain text.

        An answer that cannot be read, or whose comparison takes too long or too much memory, is not the same.
        """
        readings = [(normalised(expected), normalised(answer))]
        as_lists = normalised(expected, grouped=False), normalised(answer, grouped=False)
        if as_lists != readings[0]:
            readings.append(as_lists)
        if any(_bare(one) == _bare(other) for one, other in readings):
            return True
        if len(answer) > LONGEST:
            return False
        with self._lock:
            return any(self._asked(one, other) for one, other in readings)

    def close(self) -> None:
        """End the process; the next comparison would start another."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _asked(self, expected: str, answer: str) -> bool:
        for _ in range(2):  # the second time where the first process died, of whatever
            connection = self._connection or self._started()
            try:
                connection.send((expected, answer))
                if connection.poll(self.seconds):
                    return bool(connection.recv())
            except (EOFError, BrokenPipeError, ConnectionResetError):
                self.close()
                continue
            logger.warning("comparing %.80r with %.80r took over %.0f s: not the same", answer, expected, self.seconds)
            self.close()
            return False
        logger.warning("comparing %.80r with %.80r ended math-verify twice: not the same", answer, expected)
        return False

    def _started(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(target=_compare, args=(theirs,), name="mathematician", daemon=True)
        self._process.start()
        theirs.close()
        try:
            ready = ours.poll(START_SECONDS) and ours.recv()
        except EOFError:
            ready = False
        self._connection = ours
        if ready is not True:
            self.close()
            raise ValueError(ready or "math-verify did not start; see the lines above")
        return ours


def normalised(answer: str, *, grouped: bool = True) -> str:
    r"""An answer without what does not change it: dollar signs, 1{,}000's commas, signs of percent and degrees.

    A mixed number such as 3\frac{1}{2} becomes the sum that it is; to math-verify it is a product. Where digits are
    `grouped`, 100,200 is one number, else the list 100, 200.
    """
    text = answer.strip().rstrip(".").strip()
    if text.startswith("$") and text.endswith("$") and not text.endswith("\\$"):
        text = text.strip("$").strip().rstrip(".")
    text = _GROUP_MARK.sub("", text)
    if groups := _GROUPED.match(text):
        text = groups[0].replace(",", "" if grouped else ", ") + text[groups.end() :]
    if mixed := _MIXED.fullmatch(text):
        text = f"{mixed[1]}({mixed[2]}+{mixed[3]})"
    return _PERCENT_OR_DEGREES.sub("", text).strip()


def _bare(answer: str) -> str:
    if words := _WORDS.fullmatch(answer):
        answer = words[1]
    return _SPACE.sub("", answer).replace("\\left", "").replace("\\right", "").replace("dfrac", "frac")


def _compare(connection: Connection) -> None:
    """The process: pairs come in, verdicts go out, until the other end closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    try:
        from math_verify import parse, verify
    except ImportError:
        connection.send("math-verify is not installed; pip install 'elastic-family[eval]'")
        return
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an answer that cannot be read is no news
    connection.send(True)
    while True:
        try:
            expected, answer = connection.recv()
        except EOFError:
            return
        try:
            connection.send(verify(parse(f"${expected}$"), parse(f"${answer}$")))
        except (MemoryError, RecursionError):
            connection.send(False)
