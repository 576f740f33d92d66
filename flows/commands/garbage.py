"""What `elastic gc` does: find what is of no use in the bucket and in the state directory, show it, remove it."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from elastic_core.budget import bytes_text
from tasks import artifacts, tracking
from tasks.artifacts.documents import abort_unfinished, remove_objects, unfinished
from tasks.artifacts.staging import left_overs, remove_left_over, size_of
from tasks.running import cache, usage
from tasks.running.stale import Stale, stale
from tasks.running.workspace import shared_workspace
from tasks.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Something that may go, and the way to remove it, which says whether it went; or why it is `kept`."""

    kind: str
    what: str
    files: int
    size: int
    remove: Callable[[], bool]
    kept: str = ""


def collect(
    settings: Settings,
    *,
    older_than_days: float,
    max_bytes: int | None,
    delete: bool,
    confirm: Callable[[str], bool],
) -> None:
    """Print a table of what was not used for so many days and is of no use; remove it if `delete`.

    What is superseded in the workspace goes earlier, the least recently used first, until that has `max_bytes`.
    Versions that were published are removed only where `confirm` says yes to a question about them.
    """
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    store = artifacts.open_store(settings)
    with closing(store.client):
        found = [
            *_in_bucket(store, settings, before),
            *(
                _left_over(path, before)
                for name in (".", "workspace", cache.CACHE, cache.SERVED)
                for path in left_overs(settings.home / name, before)
            ),
            *_in_workspace(settings, before, max_bytes),
            *_brought("superseded", cache.CACHE, before),
            *_brought("served", cache.SERVED, before),
            *_in_shared_workspace(settings, before),
        ]
        if not delete:
            _print(found, [f"kept: {one.kept}" if one.kept else "found" for one in found])
            if found:
                Console().print("nothing was removed; --delete removes it")
            return
        published = [one for one in found if one.kind == "version"]
        if published:
            _print(published, ["found" for _ in published])
            size = bytes_text(sum(one.size for one in published))
            if not confirm(f"Remove {len(published)} published version(s), {size}, from s3://{settings.bucket}?"):
                found = [replace(one, kept="not confirmed") if one.kind == "version" else one for one in found]
        _print(found, [_outcome(one) for one in found])


def _in_bucket(store: artifacts.Store, settings: Settings, before: datetime) -> list[Found]:
    registry, points_to = tracking.identity(settings.registry), partial(tracking.pointed_to, settings.registry)
    return [
        Found(
            kind=garbage.kind,
            what=garbage.uri,
            files=garbage.objects,
            size=garbage.size,
            remove=partial(artifacts.remove_garbage, store, garbage, points_to, before),
            kept=garbage.owner,
        )
        for garbage in artifacts.find_garbage(store, registry, points_to(), before)
    ]


def _in_workspace(settings: Settings, before: datetime, max_bytes: int | None) -> list[Found]:
    def find() -> usage.Superseded:
        return usage.superseded(settings.home, tracking.aliased(settings.registry), before.timestamp(), max_bytes)

    def remove_entry(path: Path) -> bool:
        if path not in find().entries:
            return False
        if path.is_dir():
            gone = path.with_name(f".{path.name}.partial")  # a name that no step looks for, and that the next gc finds
            path.rename(gone)
            remove_left_over(gone)
        else:
            path.unlink()
        return True

    def remove_records() -> bool:
        there = find()
        for path in (*there.results, *there.lists, *(file.with_suffix(".lock") for file in there.lists)):
            path.unlink(missing_ok=True)
        return True

    found = find()
    rows = [
        Found(
            kind="superseded",
            what=str(path),
            files=sum(1 for file in (path, *path.rglob("*")) if file.is_file()),
            size=size_of(path),
            remove=partial(remove_entry, path),
        )
        for path in found.entries
    ]
    records = (*found.results, *found.lists)
    if records:
        size = sum(map(size_of, records))
        what = f"results and lists of runs in {settings.home}"
        rows.append(Found(kind="superseded", what=what, files=len(records), size=size, remove=remove_records))
    return rows


def _brought(kind: str, holder: str, before: datetime) -> list[Found]:
    """What was brought here, to be brought again where it is needed."""
    return [
        Found(
            kind=kind,
            what=str(path),
            files=sum(1 for file in path.rglob("*") if file.is_file()),
            size=size_of(path),
            remove=partial(cache.remove, path),
        )
        for path in cache.unused(holder, before.timestamp())
    ]


def _in_shared_workspace(settings: Settings, before: datetime) -> list[Found]:
    """What no run of any host needs of the workspace that they share."""
    if (shared := shared_workspace()) is None:
        return []

    def find() -> dict[str, Stale]:
        there = stale(settings.home, shared, tracking.aliased(settings.registry), before)
        return {one.what: one for one in there}

    def remove(found: Stale) -> bool:
        now = find().get(found.what)
        going = set(found.keys) & set(now.keys if now is not None else ())
        remove_objects(shared.store, going)
        return bool(going)

    def free() -> bool:
        abort_unfinished(shared.store, shared.root, before)
        return True

    rows = [
        Found(
            kind="superseded",
            what=f"{settings.workspace}: {one.what}",
            files=len(one.keys),
            size=one.size,
            remove=partial(remove, one),
        )
        for one in find().values()
    ]
    if uploads := [*unfinished(shared.store, shared.root, before)]:
        rows.append(Found(kind="upload", what=str(settings.workspace), files=len(uploads), size=0, remove=free))
    return rows


def _outcome(found: Found) -> str:
    if found.kept:
        return f"kept: {found.kept}"
    return "removed" if found.remove() else "kept: in use again"


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
