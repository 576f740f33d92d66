"""Fetching a part of a version, or plain objects: in parallel, resumably, verified, whole or not at all."""

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

from tasks.artifacts import nested
from tasks.artifacts.connection import Meter, Progress, Store, explained, head, manifest_bytes, objects_below, parse_uri
from tasks.artifacts.manifest import MANIFEST_NAME, TOMBSTONE, FileRecord, Manifest, check_paths, parse_manifest
from tasks.artifacts.signing import verify
from tasks.artifacts.staging import beside, holds_exactly, inside, occupied, staged
from tasks.settings import ServiceError

READ_BYTES = 1 << 20
STREAM_ATTEMPTS = 5  # botocore retries requests, not bodies that break off

_log = logging.getLogger(__name__)


def read_manifest(store: Store, uri: str) -> Manifest:
    """Read and check the manifest at s3://.../families/FAMILY/VERSION/manifest.json."""
    body = manifest_bytes(store, uri)
    if body is None:
        raise ServiceError(f"{uri} does not exist: no such version, or its upload never finished")
    if body == TOMBSTONE:
        raise ServiceError(f"{uri} is being removed by elastic gc: nothing in the registry pointed to it")
    manifest = parse_manifest(body, uri)
    if not uri.endswith(f"/families/{manifest.family}/{manifest.version}/{MANIFEST_NAME}"):
        raise ServiceError(
            f"{uri} says it is version {manifest.version!r} of {manifest.family!r}: it was copied or edited"
        )
    if store.verification_key is not None:
        verify(manifest, store.verification_key, uri)
    return manifest


class Corrupt(ServiceError):
    """What the object at `uri` holds is not what was recorded of it."""

    def __init__(self, message: str, uri: str) -> None:
        super().__init__(message)
        self.uri = uri


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """An object to fetch and what is known of it: its digest (from a manifest) or its ETag (from a listing)."""

    bucket: str
    key: str
    path: str
    size: int
    sha256: str | None = None
    etag: str | None = None

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


def fetch(store: Store, uri: str, part: str, directory: Path, *, progress: Progress | None = None) -> Manifest:
    """Bring one part of the version whose manifest is at `uri` to `directory`, every digest verified.

    The directory appears when it is whole; an interrupted fetch is continued by the next. Nothing is done where the
    directory already holds exactly these files. A smaller part of the same nested version is replaced, and only what
    is added to it is fetched. A ServiceError where the directory holds anything else.
    """
    directory = directory.absolute()
    manifest = read_manifest(store, uri)
    files = manifest.part(part)
    if not files:
        raise ServiceError(f"{uri} has no part {part!r}; it has {', '.join(manifest.parts)}")
    base = None
    if occupied(directory):
        if directory.is_dir() and holds_exactly(directory, files):
            return manifest
        base = nested.smaller_in(directory, manifest, part)
        if base is None:
            raise ServiceError(
                f"{directory} exists and is not {part!r} of {uri}; remove it or choose another directory"
            )
    bucket, key = parse_uri(uri)
    store, root = replace(store, bucket=bucket), key.removesuffix(MANIFEST_NAME)
    _refuse_unlisted(store, root, manifest)
    with staged(directory, _identity(repr((uri, part, files)))) as work:
        if not holds_exactly(work, files):
            _bring(store, root, nested.plan(manifest, part, base, directory), work, progress)
        shutil.rmtree(beside(work), ignore_errors=True)
    return manifest


def _refuse_unlisted(store: Store, root: str, manifest: Manifest) -> None:
    """An object that the manifest does not know means that someone else writes there."""
    uri = f"s3://{store.bucket}/{root}"
    listed = {f"{root}{path}" for path in (MANIFEST_NAME, *(file.path for file in manifest.files))}
    with explained(uri):
        for entry in objects_below(store, root):
            if entry["Key"] not in listed:
                raise ServiceError(f"s3://{store.bucket}/{entry['Key']} is not in the manifest of {uri}: remove it")


def _bring(store: Store, root: str, plan: nested.Plan, work: Path, progress: Progress | None) -> None:
    """Fetch, copy and put together what the plan says into `work`."""

    def wanted(objects: Mapping[str, FileRecord]) -> list[_Wanted]:
        return [
            _Wanted(bucket=store.bucket, key=f"{root}{file.path}", path=path, size=file.size, sha256=file.sha256)
            for path, file in objects.items()
        ]

    shells, made = beside(work), sum(file.size for file in plan.assembled)
    if plan.aside:
        shells.mkdir(exist_ok=True)
    items = {work: wanted(plan.files), shells: wanted(plan.aside)}
    _check_space(items, more=made)
    meter = Meter(progress, sum(file.size for file in plan.objects) + made)
    _fill(store, items, meter)
    for path, source in plan.copied.items():
        shutil.copyfile(source, inside(work, path))
    if plan.assembled:
        chain = [shells / directory for directory in plan.chain]
        nested.put_together(work, chain, plan.assembled, f"s3://{store.bucket}/{root}", meter.advance())
    meter.finish()


def download_prefix(
    store: Store, uri: str, directory: Path, *, progress: Progress | None = None
) -> tuple[FileRecord, ...]:
    """Bring what `list_objects` lists (a teacher, a data set) to a new directory.

    Like `fetch`, but without a manifest: sizes and ETags come from the listing, and the digests are of what arrived,
    returned for the caller to record.
    """
    if occupied(directory):
        raise ServiceError(f"{directory} exists and is not empty; remove it or choose another directory")
    return _download(store, _listed(store, uri), directory, progress)


@dataclass(frozen=True, slots=True)
class ListedObject:
    """An object as S3 lists it; `path` is relative to the prefix that was listed."""

    uri: str
    path: str
    size: int
    etag: str


def list_objects(store: Store, uri: str) -> list[ListedObject]:
    """Every object below an s3:// prefix, or the one object that is meant, by its name; in order of path."""
    return [ListedObject(item.uri, item.path, item.size, item.etag or "") for item in _listed(store, uri)]


def _listed(store: Store, uri: str) -> list[_Wanted]:
    bucket, key = parse_uri(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    with explained(uri):
        found = [*objects_below(replace(store, bucket=bucket), prefix)]
        if not found and key and (one := head(replace(store, bucket=bucket), key)) is not None:
            prefix = key.rpartition("/")[0]
            prefix = f"{prefix}/" if prefix else ""
            found = [{"Key": key, "Size": one["ContentLength"], "ETag": one["ETag"]}]
    if not found:
        raise ServiceError(f"{uri} holds no objects; check the prefix")
    wanted = [
        _Wanted(bucket=bucket, key=e["Key"], path=e["Key"].removeprefix(prefix), size=e["Size"], etag=e["ETag"])
        for e in found
    ]
    try:
        check_paths((item.path for item in wanted), uri)
    except ValueError as error:
        raise ServiceError(str(error)) from error
    return sorted(wanted, key=lambda item: item.path)


def get_file(store: Store, uri: str, path: Path, *, progress: Progress | None = None) -> FileRecord:
    """Bring one object to `path`, which appears (or is replaced) when it is whole."""
    bucket, key = parse_uri(uri)
    with explained(uri):
        found = head(replace(store, bucket=bucket), key)
    if found is None:
        raise ServiceError(f"{uri} does not exist")
    size, etag = found["ContentLength"], found["ETag"]
    partial = path.with_name(f".{path.name}.{_identity(etag)}.partial")
    item = _Wanted(bucket=bucket, key=key, path=partial.name, size=size, etag=etag)
    record = _download_file(store, item, path.parent, Meter(progress, size), threading.Event())
    os.replace(partial, path)
    return FileRecord(path=path.name, size=record.size, sha256=record.sha256)


def fetch_recorded(
    store: Store, objects: Mapping[str, tuple[str, str]], directory: Path, *, progress: Progress | None = None
) -> None:
    """Bring objects to a directory, which appears when it is whole, in the place of what was there.

    `objects` has, by path in the directory, the key of each object and the SHA-256 on record. An interrupted fetch is
    continued by the next. Raises Corrupt for other bytes, and a ServiceError for an object that is not there.
    """
    wanted = []
    for path, (key, sha256) in sorted(objects.items()):
        uri = f"s3://{store.bucket}/{key}"
        with explained(uri):
            found = head(store, key)
        if found is None:
            raise ServiceError(f"{uri} does not exist")
        size = found["ContentLength"]
        wanted.append(_Wanted(bucket=store.bucket, key=key, path=path, size=size, sha256=sha256))
    directory.parent.mkdir(parents=True, exist_ok=True)
    _download(store, wanted, directory, progress)


def _download(
    store: Store, wanted: Sequence[_Wanted], directory: Path, progress: Progress | None
) -> tuple[FileRecord, ...]:
    with staged(directory, _identity(repr(wanted))) as work:
        _check_space({work: wanted})
        return _fill(store, {work: wanted}, Meter(progress, sum(item.size for item in wanted)))


def _fill(store: Store, wanted: Mapping[Path, Sequence[_Wanted]], meter: Meter) -> tuple[FileRecord, ...]:
    """Bring what is wanted to each directory."""
    stop = threading.Event()
    with ThreadPoolExecutor(store.workers) as pool:
        futures = [
            pool.submit(_download_file, store, item, work, meter, stop)
            for work, items in wanted.items()
            for item in items
        ]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return tuple(future.result() for future in futures)


def _download_file(store: Store, item: _Wanted, work: Path, meter: Meter, stop: threading.Event) -> FileRecord:
    path = inside(work, item.path)
    with explained(item.uri):
        digest, resumed = _complete(store, item, path, meter, stop)
        if resumed and item.sha256 not in (None, digest):
            path.unlink()  # what an earlier attempt left may be rotten; the object gets a chance of its own
            digest, _ = _complete(store, item, path, meter, stop)
    if item.sha256 not in (None, digest):
        path.unlink()
        raise Corrupt(f"{item.uri} is corrupt: its SHA-256 is {digest}, and {item.sha256} on record", item.uri)
    return FileRecord(path=item.path, size=item.size, sha256=digest)


def _complete(store: Store, item: _Wanted, path: Path, meter: Meter, stop: threading.Event) -> tuple[str, int]:
    """Fetch what `path` lacks of an object; returns the SHA-256 of the whole and the bytes that were there before."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o666), "r+b") as file:
        if os.fstat(file.fileno()).st_size > item.size:
            file.truncate(0)
        digest = hashlib.sha256()
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
        resumed = file.tell()
        meter.add(resumed)
        stalled = 0
        while True:
            before = file.tell()
            try:
                _append(store, item, file, digest, meter, stop)
                break
            except (HTTPClientError, IncompleteReadError) as error:
                stalled = stalled + 1 if file.tell() == before else 0
                if stalled == STREAM_ATTEMPTS or stop.wait(0.1 * 2**stalled):
                    raise
                _log.info("%s broke off after %d bytes (%s), continuing", item.uri, file.tell(), type(error).__name__)
            except FlexibleChecksumError as error:
                path.unlink()
                raise Corrupt(f"{item.uri} is corrupt: {error}", item.uri) from error
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), resumed


def _append(
    store: Store, item: _Wanted, file: BinaryIO, digest: "hashlib._Hash", meter: Meter, stop: threading.Event
) -> None:
    have = file.tell()
    if have == item.size > 0:
        return
    request = {"Bucket": item.bucket, "Key": item.key}
    if have:
        request["Range"] = f"bytes={have}-"
    if item.etag:
        request["IfMatch"] = item.etag
    answer = store.client.get_object(**request)
    with closing(answer["Body"]) as body:
        size = have + answer["ContentLength"]
        if size != item.size:
            raise ServiceError(f"{item.uri} has {size} bytes, not the expected {item.size}: it is corrupt")
        for chunk in body.iter_chunks(READ_BYTES):
            file.write(chunk)
            digest.update(chunk)
            meter.add(len(chunk))
            if stop.is_set():
                raise ServiceError(f"{item.uri}: stopped, since another file failed", transient=True)


def _check_space(wanted: Mapping[Path, Sequence[_Wanted]], more: int = 0) -> None:
    """A ServiceError where the disk has no room for what is wanted in each directory, and `more`."""
    there = sum(path.stat().st_size for work in wanted for path in work.rglob("*") if path.is_file())
    need = sum(item.size for items in wanted.values() for item in items) + more - there
    work = next(iter(wanted))
    free = shutil.disk_usage(work).free
    if need > free:
        raise ServiceError(
            f"{work.parent} has {free} bytes free, {need} more are needed: free some space", transient=True
        )


def _identity(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
