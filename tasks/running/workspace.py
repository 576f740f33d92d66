"""The workspace that hosts share through the object store, where ELASTIC_WORKSPACE names one.

    s3://BUCKET/PREFIX/blobs/SHA256            a file of an artifact
    s3://BUCKET/PREFIX/results/STEP-KEY.json   the record of a step, written when all files that it names are there
    s3://BUCKET/PREFIX/leases/STEP-KEY         which host does the step now
    s3://BUCKET/PREFIX/checkpoints/KEY/...     of stages in training (travelling.py)
    s3://BUCKET/PREFIX/runs/...                what each run used (usage.py)

The paths in a record are those of the host that made it. An artifact that is not at its path here is brought to the
cache (cache.py) when a step is about to read it, and not before.
"""

import json
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from elastic_core.files.locks import held
from elastic_core.schema import build, to_dict
from tasks import artifacts
from tasks.artifacts.blobs import Blobs
from tasks.artifacts.documents import documents, read_document, remove_objects, write_document
from tasks.artifacts.leases import Lease
from tasks.artifacts.manifest import check_paths, directory_digest
from tasks.records import Artifact, StageRecord
from tasks.running.bars import bar
from tasks.running.cache import SIDE, in_use, make_room, one_fetch, place_of
from tasks.running.digests import damage, difference, forget, is_of_the_user, recorded, relocated, remedy
from tasks.running.patience import patiently
from tasks.settings import WORKSPACE, ServiceError, Settings, home_directory

FORMAT = 1
LOOKS = (1.0, 10.0)  # seconds between looks at what another host does, at first and at last
SECONDS_BETWEEN_LINES = 600.0
LARGE = ".safetensors"  # what the names of weights and tokens end with

Made = Artifact | StageRecord

_SHA256 = re.compile(r"[0-9a-f]{64}")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The store, what every key of the workspace begins with, and what this host keeps of it at most."""

    store: artifacts.Store
    root: str
    cache_bytes: int

    @property
    def blobs(self) -> Blobs:
        return Blobs(store=self.store, root=f"{self.root}blobs/")

    def result(self, step: str, key: str) -> str:
        return f"{self.root}results/{step}-{key}.json"

    def lease(self, step: str, key: str) -> str:
        return f"{self.root}leases/{step}-{key}"

    def checkpoints(self, key: str) -> str:
        return f"{self.root}checkpoints/{key[:16]}/"

    @property
    def runs(self) -> str:
        return f"{self.root}runs/"


def shared_workspace() -> Workspace | None:
    """The workspace that the environment names; None where each host has its own."""
    if not os.environ.get(WORKSPACE):
        return None
    settings = Settings.from_environment(need_bucket=False)
    assert settings.workspace is not None
    bucket, prefix = artifacts.parse_uri(settings.workspace)
    store = _opened(replace(settings, home=Path(), workspace=None, cache_bytes=0))
    return Workspace(store=replace(store, bucket=bucket), root=f"{prefix}/", cache_bytes=settings.cache_bytes)


@cache
def _opened(settings: Settings) -> artifacts.Store:
    """One client for the process: its threads and steps share its connections."""
    return artifacts.open_store(settings)


# Results


def stored_result(step: str, key: str, hint: Any) -> Any:
    """The record, of the type `hint`, that any host stored of a step; None unless all files that it names are there."""
    if (shared := shared_workspace()) is None:
        return None
    body = patiently(step, partial(read_document, shared.store, shared.result(step, key)))
    if body is None:
        return None
    try:
        record = _parsed(body, step, key, hint)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s: its record in the workspace, %s, is damaged (%s); it is made again", step, key, error)
        return None
    if missing := _missing(shared, record, step):
        logger.warning("%s: %d of its files left the workspace; it is made again", step, len(missing))
        return None
    return _moved(record, _with_path_here)


def is_stored(record: Made) -> bool:
    """Whether every file of a record is in the workspace that hosts share, so that it need not be here."""
    shared = shared_workspace()
    return shared is not None and not is_of_the_user(record) and not _missing(shared, record, "workspace")


def store_result(step: str, key: str, record: Any, *, made: bool) -> None:
    """Store what a step made: files that are not there yet, and after them its record.

    A record that was just `made` replaces one that is there, whose files were lost; the checkpoints on the way go.
    What names a directory of the user's own is not stored: nothing but what steps made leaves this host.
    """
    if (shared := shared_workspace()) is None or any(map(is_of_the_user, recorded(record))):
        return
    missing = set(_missing(shared, record, step))
    for directory, files in _directories(record):
        wanted = {name: digest for name, digest in files.items() if digest in missing}
        if wanted:
            with bar(f"storing {step}") as report:
                try:
                    patiently(step, partial(shared.blobs.put, directory, wanted, progress=report))
                except artifacts.NotAsRecorded:
                    forget(directory)  # so that the next look finds the damage, and the step is done again
                    raise
    key_of_result = shared.result(step, key)
    if made or patiently(step, partial(read_document, shared.store, key_of_result)) is None:
        body = json.dumps({"format": FORMAT, "step": step, "key": key, "result": to_dict(record)})
        patiently(step, partial(write_document, shared.store, key_of_result, body.encode()))
    if made:
        there = patiently(step, partial(documents, shared.store, shared.checkpoints(key)))
        patiently(step, partial(remove_objects, shared.store, there))


def store_list(file: Path) -> None:
    """Store the list of what a run uses, for whoever collects garbage on another host."""
    if (shared := shared_workspace()) is not None:
        body = file.read_bytes()
        patiently("listing what the run uses", partial(write_document, shared.store, f"{shared.runs}{file.name}", body))


def _missing(shared: Workspace, record: Any, what: str) -> list[str]:
    digests = [digest for _, files in _directories(record) for digest in files.values()]
    there = patiently(what, partial(shared.blobs.sizes, digests))
    return [digest for digest in digests if digest not in there]


def _directories(record: Any) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """The directories of a step's result, and in each the SHA-256 of the files that belong to it."""
    for made in recorded(record):
        if isinstance(made, StageRecord):
            metrics = _metrics(made)
            yield Path(made.family.path), made.family.files
            yield Path(metrics.path), metrics.files
        else:
            yield Path(made.path), made.files


def _parsed(body: bytes, step: str, key: str, hint: Any) -> Any:
    document = json.loads(body)
    if [document["format"], document["step"], document["key"]] != [FORMAT, step, key]:
        raise ValueError("it is of another step")
    record = build(hint, document["result"], step)
    for _, files in _directories(record):
        check_paths(files, step)
        if not all(map(_SHA256.fullmatch, files.values())):
            raise ValueError("it names a file without its SHA-256")
    for made in recorded(record):
        artifact = made.family if isinstance(made, StageRecord) else made
        if directory_digest(artifact.files.items()) != artifact.digest:
            raise ValueError("a digest in it is not that of its files")
    return record


# Leases


@contextmanager
def claimed(step: str, key: str, is_done: Callable[[], bool]) -> Iterator[None]:
    """Hold a step against all other hosts for as long as the block runs, or wait until one of them has done it."""
    if (shared := shared_workspace()) is None:
        yield
        return
    lease = Lease(shared.store, shared.lease(step, key), host=_this_host())
    pause, last = LOOKS
    told: float | None = None
    while (holder := patiently(step, lease.claim)) and not is_done():
        if told is None or time.monotonic() - told > SECONDS_BETWEEN_LINES:
            logger.info("waiting for %s, which %s is making", step, holder)
            told = time.monotonic()
        time.sleep(pause)
        pause = min(1.5 * pause, last)
    if holder:
        yield
        return
    with lease.kept():
        yield


def _this_host() -> str:
    """What tells this state directory on this machine from those of other hosts."""
    file = home_directory() / "host"
    with held(home_directory() / "locks" / "host", patience=60.0):
        if not file.exists():
            file.write_text(secrets.token_hex(16))
    return f"{file.read_text()}@{socket.gethostname()}"


# Artifacts


@contextmanager
def at_hand(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A step's inputs with every artifact as it was recorded, and here for as long as the block runs.

    What is not at its path is brought from the workspace. A ServiceError names the file that is damaged everywhere.
    """
    with ExitStack() as uses:
        yield _moved(dict(inputs), partial(_here, uses))


def small_files(record: Artifact) -> Path:
    """A directory with an artifact's small files, all but weights and tokens; its own, where it is here as recorded.

    A directory of the user's own is where each host has it, and one may have another there: a ServiceError then.
    """
    shared, own = shared_workspace(), Path(record.path)
    small = {name: digest for name, digest in record.files.items() if not name.endswith(LARGE)}
    if own.is_dir():
        spoiled = next(filter(None, (difference(own / name, digest) for name, digest in small.items())), "")
        if not spoiled:
            return own
        if shared is None or is_of_the_user(record):
            raise ServiceError(f"{spoiled}; {remedy(record)}")
    if shared is None:
        return own
    place = place_of(record.digest)
    directory = place.with_name(f"{place.name}{SIDE}")
    with one_fetch(directory):
        if not directory.is_dir():
            patiently(own.name, partial(shared.blobs.fetch, small, directory))
    os.utime(directory)
    return directory


def _here(uses: ExitStack, record: Made) -> Made:
    """A record whose files are here; of a stage's the metrics alone, since its family is an artifact of its own."""
    needed = record if isinstance(record, Artifact) else _metrics(record)
    place = place_of(needed.digest)
    in_cache = Path(needed.path) == place
    if not in_cache and not (spoiled := damage(record)):
        return record
    if not in_cache and not is_stored(record):
        raise ServiceError(f"{spoiled}; {remedy(record)}")
    _bring(uses, needed, place)
    if isinstance(record, StageRecord):
        return replace(record, metrics=str(place / Path(record.metrics).name))
    return replace(record, path=str(place))


def _metrics(record: StageRecord) -> Artifact:
    """The file of a stage's metrics as an artifact of its own."""
    metrics, sha256 = Path(record.metrics), record.metrics_sha256
    return Artifact(path=str(metrics.parent), digest=sha256, files={metrics.name: sha256})


def _bring(uses: ExitStack, record: Artifact, place: Path) -> None:
    """Have an artifact in the cache as it was recorded, and keep it there for as long as `uses` lasts."""
    shared = shared_workspace()
    if shared is not None:
        uses.callback(make_room, 0, shared.cache_bytes)  # when it is not used any more
    uses.enter_context(in_use(place))
    with one_fetch(place):
        if not (spoiled := damage(replace(record, path=str(place)))):
            return
        if shared is None:
            raise ServiceError(f"{spoiled}; set {WORKSPACE} as when it was brought here, or run again")
        sizes = patiently(place.name, partial(shared.blobs.sizes, list(record.files.values())))
        make_room(sum(sizes.values()), shared.cache_bytes)
        with bar(f"bringing {Path(record.path).name}") as report:
            patiently(place.name, partial(shared.blobs.fetch, record.files, place, progress=report))


def _with_path_here(record: Made) -> Made:
    """A record of another host with paths of this one: the same, where something is there, or in the cache."""
    if isinstance(record, StageRecord):
        metrics = Path(record.metrics)
        if not metrics.is_file():
            metrics = place_of(record.metrics_sha256) / metrics.name
        family = _with_path_here(record.family)
        assert isinstance(family, Artifact)
        return replace(record, family=family, metrics=str(metrics))
    return record if Path(record.path).is_dir() else replace(record, path=str(place_of(record.digest)))


def to_this_home(value: Any) -> Any:
    """A step's result with its artifacts where they are, should the state directory have been moved since."""

    def of(record: Artifact) -> Artifact:
        return replace(record, path=relocated(record.path))

    def move(record: Made) -> Made:
        if isinstance(record, Artifact):
            return of(record)
        return replace(record, family=of(record.family), metrics=relocated(record.metrics))

    return _moved(value, move)


def _moved(value: Any, move: Callable[[Made], Made]) -> Any:
    """A value with each artifact in it moved; the value itself, where none is."""
    if isinstance(value, Artifact | StageRecord):
        return move(value)
    if is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
        moved = {name: _moved(entry, move) for name, entry in inner.items()}
        changed = {name: entry for name, entry in moved.items() if entry is not inner[name]}
        return replace(value, **changed) if changed else value
    if isinstance(value, Mapping):
        return {key: _moved(entry, move) for key, entry in value.items()} if any(recorded(value)) else value
    if isinstance(value, list | tuple):
        return type(value)(_moved(entry, move) for entry in value) if any(recorded(value)) else value
    return value
