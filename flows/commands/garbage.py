"""What `elastic gc` does: find what is of no use in the bucket and in the state directory, show it, remove it."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elastic_core.budget import bytes_text
from tasks import artifacts, tracking
from tasks.artifacts.staging import left_overs, remove_left_over
from tasks.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Something that may go, and the way to remove it, which says whether it went."""

    kind: str
    what: str
    files: int
    size: int
    remove: Callable[[], bool]


def collect(settings: Settings, *, older_than_days: float, delete: bool) -> None:
    """Print a table of what nothing was written to for so many days and is of no use; remove it if `delete`."""
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    store = artifacts.open_store(settings)
    points_to = partial(tracking.pointed_to, settings.tracking_uri)
    with closing(store.client):
        found = [
            Found(
                kind=garbage.kind,
                what=garbage.uri,
                files=garbage.objects,
                size=garbage.size,
                remove=partial(artifacts.remove_garbage, store, garbage, points_to, before),
            )
            for garbage in artifacts.find_garbage(store, points_to(), before)
        ]
        found += [
            _left_over(path, before)
            for directory in (settings.home, settings.home / "workspace")
            for path in left_overs(directory, before)
        ]
        outcomes = [("removed" if one.remove() else "kept: in use again") if delete else "found" for one in found]
    _print(found, outcomes)
    if found and not delete:
        Console().print("nothing was removed; --delete removes it")


def _left_over(path: Path, before: datetime) -> Found:
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]

    def remove() -> bool:
        useless = path in left_overs(path.parent, before)
        if useless:
            remove_left_over(path)
        return useless

    size = sum(file.stat().st_size for file in files)
    return Found(kind="staging", what=str(path), files=len(files), size=size, remove=remove)


def _print(found: list[Found], outcomes: list[str]) -> None:
    table = Table("kind", "what")
    for title in ("files", "size"):
        table.add_column(title, justify="right")
    table.add_column("outcome")
    for one, outcome in zip(found, outcomes, strict=True):
        table.add_row(one.kind, one.what, str(one.files), bytes_text(one.size), outcome)
    total = bytes_text(sum(one.size for one in found))
    table.add_section()
    table.add_row("total", f"{len(found)}", str(sum(one.files for one in found)), total, "")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
