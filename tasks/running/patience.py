"""How a fault that passes is waited out: how often, how long, and what the terminal says meanwhile."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from tasks.settings import DISK_FULL, is_transient, redact

R = TypeVar("R")

# Seconds before each new attempt, the last for all that follow: about an hour in all.
DELAYS = (2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
RETRIES = 64
JITTER = 0.5  # the share by which a delay may differ, so that many runs do not come back at once

logger = logging.getLogger(__name__)


def patiently(what: str, attempt: Callable[[], R]) -> R:
    """The result of `attempt`, tried again after faults that pass; each wait is a line of log that begins with `what`.

    For calls to services outside of steps, which Prefect tries again at the same pace.
    """
    for failed in range(1, RETRIES + 1):
        try:
            return attempt()
        except Exception as error:
            if not is_transient(error):
                raise
            say_waiting(what, error, failed)
            time.sleep(delay_after(failed) * random.uniform(1 - JITTER, 1 + JITTER))
    return attempt()


def say_waiting(what: str, error: BaseException, failed: int) -> None:
    """Tell what failed, for the how many-th time, and when it is tried again."""
    logger.warning(
        "%s: %s; tried again in about %.0f s (attempt %d of %d)",
        what,
        _one_line(error),
        delay_after(failed),
        failed + 1,
        RETRIES + 1,
    )


def delay_after(failed: int) -> float:
    """Seconds to wait, without jitter, when so many attempts have failed."""
    return DELAYS[min(failed, len(DELAYS)) - 1]


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room on the disk"
    text = redact(" ".join(str(error).split())[:300])
    return text or type(error).__name__
