"""What of the shared workspace nobody needs any more, by what the runs of all hosts have listed (usage.py).

Results that no needed run lists go when they are old enough, and with them every file that no other result names. A
step that is told of a file just before it goes finds it missing, and its result is made again.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from tasks.artifacts.documents import documents, read_document
from tasks.running.usage import Use, needed, parse_use, uses
from tasks.running.workspace import Workspace

KEY_LENGTH = 64  # of a step's key, before ".json"

# What is listed of the workspace: the bytes of each object and when it was written last, by key.
Listed = dict[str, tuple[int, datetime]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stale:
    """Objects of one sort that may go."""

    what: str
    keys: tuple[str, ...]
    size: int


def stale(home: Path, shared: Workspace, aliased: Collection[str], before: datetime) -> list[Stale]:
    """What no run needs and nobody has written since a time; nothing where no run has left a list.

    `aliased` are the registrations of candidates and champions.
    """
    there = documents(shared.store, shared.root)
    found = _all_uses(home, shared, there, before)
    if not found:
        return []
    kept = needed(found, aliased)
    going_on = min((datetime.fromtimestamp(use.began, UTC) for use in kept if use.open), default=before)
    keys = {key for use in kept for key in use.keys}
    old = {key: entry for key, entry in there.items() if entry[1] < min(before, going_on)}
    results = {key: entry for key, entry in old.items() if _of(shared, key, "results") and _step_key(key) not in keys}
    staying = [key for key in there if _of(shared, key, "results") and key not in results]
    named = {digest for key in staying for digest in _named(shared, key)}
    blobs = {key: entry for key, entry in old.items() if _of(shared, key, "blobs") and _last(key) not in named}
    lists = {use.file.name for use in found if use not in kept and use.began < before.timestamp()}
    others = {
        key: entry
        for key, entry in old.items()
        if _of(shared, key, "leases") or (_of(shared, key, "runs") and _last(key) in lists)
    }
    sorts = [("results of steps", results), ("files that no result names", blobs), ("leases and lists of runs", others)]
    sorts += [(f"checkpoints of {stage}", files) for stage, files in _old_checkpoints(shared, there, old)]
    return [
        Stale(what=what, keys=tuple(entries), size=sum(size for size, _ in entries.values()))
        for what, entries in sorts
        if entries
    ]


def _all_uses(home: Path, shared: Workspace, there: Listed, before: datetime) -> list[Use]:
    """What the runs of this host and of all others used.

    One may be going on whose list, or the lease of a step on it, was written since a time: a stage takes weeks.
    """
    here = {use.file.name: use for use in uses(home)}
    beating = {_step_key(key) for key, (_, at) in there.items() if _of(shared, key, "leases") and at >= before}
    others = []
    for key, (_, written) in there.items():
        if _of(shared, key, "runs") and _last(key) not in here:
            text = (read_document(shared.store, key) or b"").decode(errors="replace")
            if (use := parse_use(Path(_last(key)), text, running=written >= before)) is not None:
                others.append(replace(use, running=use.running or bool(use.keys & beating)))
    return [*here.values(), *others]


def _named(shared: Workspace, key: str) -> Iterator[str]:
    """Everything in a result that may be the SHA-256 of a file."""
    waiting = [json.loads(read_document(shared.store, key) or b"null")] if key else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _old_checkpoints(shared: Workspace, there: Listed, old: Listed) -> Iterator[tuple[str, Listed]]:
    """The checkpoints of each stage of which nothing was written since."""
    stages: dict[str, Listed] = {}
    for key, entry in there.items():
        if _of(shared, key, "checkpoints"):
            stages.setdefault(key.removeprefix(shared.root).split("/")[2], {})[key] = entry
    yield from ((stage, files) for stage, files in stages.items() if files.keys() <= old.keys())


def _of(shared: Workspace, key: str, sort: str) -> bool:
    return key.startswith(f"{shared.root}{sort}/")


def _last(key: str) -> str:
    return key.rpartition("/")[2]


def _step_key(key: str) -> str:
    return key.removesuffix(".json")[-KEY_LENGTH:]
