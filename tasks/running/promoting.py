"""One at a time promotes a family: of this state directory by a lock, of all that share a workspace by a lease."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic_core.files.locks import held
from tasks.running.workspace import claimed


@contextmanager
def one_promotion(home: Path, family: str) -> Iterator[None]:
    """Held while a family's champions are compared and moved."""
    lock = home / "locks" / f"promote-{family}"
    with (
        held(lock, waits=f"waiting for {family}, which another run is promoting"),
        claimed("promote", family, lambda: False),
    ):
        yield
