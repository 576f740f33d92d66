"""What a run says of its steps: a line each, with the title and the time it took, or that it was cached."""

import re

STEP = re.compile(r"^(\S.*?) {2,}(?:cached|([\d.]+) s)$", re.MULTILINE)


def steps_in(said: str) -> list[tuple[str, bool]]:
    """The titles of the steps that ended, in order, and whether each was cached."""
    return [(title, not seconds) for title, seconds in STEP.findall(said)]
