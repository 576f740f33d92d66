"""Publishing a version once: files first, resumably, each checked by the server; the manifest last."""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from botocore.exceptions import BotoCoreError, ClientError

from elastic_core.schema import checked_name
from tasks.artifacts.connection import (
    FAMILIES,
    Meter,
    Progress,
    Store,
    abort_upload,
    code_of,
    explained,
    head,
    in_base64,
    manifest_bytes,
    manifest_uri,
    objects_below,
    parse_uri,
    status_of,
    uploads_below,
    version_uri,
)
from tasks.artifacts.manifest import (
    MANIFEST_NAME,
    MAX_OBJECT_BYTES,
    TOMBSTONE,
    FileRecord,
    Manifest,
    NestedPart,
    check_paths,
    manifest_json,
    parse_manifest,
)
from tasks.artifacts.signing import sign
from tasks.artifacts.staging import sha256_of
from tasks.settings import ServiceError

MAX_PARTS = 10_000  # S3's own limit
UNFINISHED = timedelta(days=1)  # after which an upload is taken for one that was killed
READ_BYTES = 1 << 20


class NotAsRecorded(ServiceError):
    """A file that was to be published is not the one that its maker recorded."""


def publish(
    store: Store,
    *,
    family: str,
    version: str,
    directories: Mapping[str, Path],
    metadata: Mapping[str, Any],
    recorded: Mapping[str, Mapping[str, str]] | None = None,
    nested: Sequence[NestedPart] = (),
    instead: Mapping[str, Path] | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Upload each part's directory, then the manifest. Repeating it with the same content succeeds and sends nothing.

    A retry continues: objects that already hold the right bytes are skipped, and those that were lost are sent again.
    `metadata` must not change between retries (no clock in it). Other content under a version that exists, or was
    begun, is a ServiceError. `nested` says what the directories hold where they are shells. `recorded` has the SHA-256
    of each file by part, as its maker recorded it; for shells, of the files that they make up. Other bytes are
    NotAsRecorded, and are not published. `instead` has files that take the place of the directories' own, by path in
    the version.
    """
    target = manifest_uri(store.bucket, family, version)
    root = f"{FAMILIES}{family}/{version}"
    sources = [
        (place := f"{checked_name('part', part)}/{relative}", (instead or {}).get(place, path))
        for part, directory in sorted(directories.items())
        for relative, path in _local_files(directory)
    ]
    expected = _expected(sources, recorded or {}, nested)
    published = manifest_bytes(store, target)
    if published == TOMBSTONE:
        raise ServiceError(f"{target} is being removed by elastic gc; try again when that is done", transient=True)
    if published is not None and not _missing(store, root, parse_manifest(published, target).files):
        records = tuple(
            _as_recorded(FileRecord(path=relative, size=path.stat().st_size, sha256=sha256_of(path)), path, expected)
            for relative, path in sources
        )
    else:
        records = _upload(store, root, sources, progress, expected)
        _check_complete(store, root, records)
    manifest = Manifest(family=family, version=version, files=records, metadata=metadata, nested=tuple(nested))
    if store.signing_key is not None:
        manifest = sign(manifest, store.signing_key)
    _put_manifest(store, target, manifest, published)
    return manifest


def put_first(store: Store, family: str, version: str, path: str, body: bytes) -> bytes:
    """Put a small object into a version that is not published yet, unless it is there; the bytes that are there then.

    Who comes first decides, whoever publishes at the same time or after an interruption.
    """
    bucket, key = parse_uri(uri := f"{version_uri(store.bucket, family, version)}/{path}")
    with explained(uri):
        try:
            store.client.put_object(
                Bucket=bucket,
                Key=key,
                Body=body,
                ChecksumSHA256=in_base64(hashlib.sha256(body).digest()),
                IfNoneMatch="*",
                **store.put_options,
            )
            return body
        except ClientError as error:
            if status_of(error) != 412:
                raise
    there = manifest_bytes(store, uri)
    if there is None:
        raise ServiceError(f"{uri} was removed by elastic gc meanwhile; try again", transient=True)
    return there


def published(store: Store, family: str, version: str) -> Manifest | None:
    """The manifest of a version that is there as a whole, every object that it names included.

    None where there is none yet, objects were lost, or `elastic gc` removes it.
    """
    uri = manifest_uri(store.bucket, family, version)
    body = manifest_bytes(store, uri)
    if body in (None, TOMBSTONE):
        return None
    manifest = parse_manifest(body, uri)
    return None if _missing(store, f"{FAMILIES}{family}/{version}", manifest.files) else manifest


def _expected(
    sources: Sequence[tuple[str, Path]], recorded: Mapping[str, Mapping[str, str]], nested: Sequence[NestedPart]
) -> dict[str, str]:
    """The recorded SHA-256 by path in the version, of what is published whole; shells are compared here and now."""
    shells = {part.name: {file.path: file.sha256 for file in part.files} for part in nested}
    whole = {part: files for part, files in recorded.items() if part not in shells}
    expected = {f"{part}/{name}": digest for part, files in whole.items() for name, digest in files.items()}
    found = {relative for relative, _ in sources if relative.partition("/")[0] in whole}
    different = found ^ expected.keys()
    for part in recorded.keys() & shells.keys():
        different |= {f"{part}/{name}" for name, _ in recorded[part].items() ^ shells[part].items()}
    if different:
        raise NotAsRecorded(f"{min(different)} is not as it was recorded; nothing is published: run again")
    return expected


def _as_recorded(record: FileRecord, path: Path, expected: Mapping[str, str]) -> FileRecord:
    if (digest := expected.get(record.path, record.sha256)) != record.sha256:
        raise NotAsRecorded(
            f"{path} is damaged: its SHA-256 is {record.sha256[:12]}, and {digest[:12]} on record; it is not "
            "published: run again"
        )
    return record


def is_published(store: Store, manifest: Manifest) -> bool:
    """Whether the version is there as this manifest says."""
    uri = manifest_uri(store.bucket, manifest.family, manifest.version)
    return manifest_bytes(store, uri) == manifest_json(manifest)


def upload_directory(
    store: Store, directory: Path, uri: str, *, progress: Progress | None = None
) -> tuple[FileRecord, ...]:
    """Upload a directory's files under an s3:// prefix, resumably; returns their records in order of path."""
    bucket, key = parse_uri(uri)
    return _upload(replace(store, bucket=bucket), key.rstrip("/"), _local_files(directory), progress)


def put_file(store: Store, path: Path, uri: str, *, progress: Progress | None = None) -> FileRecord:
    """Upload one file to a key that is free or already holds the same bytes."""
    return put_recorded(store, path, uri, None, Meter(progress, path.stat().st_size))


def put_recorded(store: Store, path: Path, uri: str, sha256: str | None, meter: Meter) -> FileRecord:
    """`put_file`, for a file whose SHA-256 is on record: other bytes are NotAsRecorded, and never become an object."""
    bucket, key = parse_uri(uri)
    with explained(uri):
        recorded = {} if sha256 is None else {path.name: sha256}
        return _upload_file(replace(store, bucket=bucket), path, key, path.name, meter, recorded)


def published_versions(store: Store, family: str) -> tuple[str, ...]:
    """The versions of a family that have a manifest, in order of name."""
    root = f"{FAMILIES}{checked_name('family', family)}/"
    where = f"s3://{store.bucket}/{root}"
    with explained(where):
        pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=root, Delimiter="/")
        begun = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ())]
        named = [prefix for prefix in begun if head(store, f"{prefix}{MANIFEST_NAME}") is not None]
    return tuple(sorted(prefix.removeprefix(root).rstrip("/") for prefix in named))


def _check_complete(store: Store, root: str, records: Sequence[FileRecord]) -> None:
    """A manifest names only what is there, whatever was removed while the files were sent."""
    for path in _missing(store, root, records):
        raise ServiceError(
            f"s3://{store.bucket}/{root}/{path} went away while the version was published; try again", transient=True
        )


def _missing(store: Store, root: str, records: Sequence[FileRecord]) -> list[str]:
    """The files that are not there in their size."""
    with explained(f"s3://{store.bucket}/{root}"):
        found = {entry["Key"]: entry["Size"] for entry in objects_below(store, f"{root}/")}
    return [record.path for record in records if found.get(f"{root}/{record.path}") != record.size]


def _put_manifest(store: Store, uri: str, manifest: Manifest, published: bytes | None) -> None:
    body = manifest_json(manifest)
    if published is None:
        with explained(uri):
            try:
                store.client.put_object(
                    Bucket=store.bucket,
                    Key=parse_uri(uri)[1],
                    Body=body,
                    ContentType="application/json",
                    ChecksumSHA256=in_base64(hashlib.sha256(body).digest()),
                    IfNoneMatch="*",
                    **store.put_options,
                )
            except ClientError as error:
                if status_of(error) != 412:
                    raise
                published = manifest_bytes(store, uri)  # another publisher, or our own put whose answer was lost
    if published is not None and published != body:
        raise ServiceError(f"{uri} exists with other content, and a version is never overwritten: publish as a new one")


def _local_files(directory: Path) -> list[tuple[str, Path]]:
    """Each regular file below `directory` with its relative path, in order of path. Links and devices are refused."""
    found: list[tuple[str, Path]] = []
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a regular file; publish a directory of plain files")
        found.append((path.relative_to(directory).as_posix(), path))
    if not found:
        raise ValueError(f"{directory} holds no file to upload")
    check_paths([relative for relative, _ in found], str(directory))
    return found


def _upload(
    store: Store,
    root: str,
    sources: Sequence[tuple[str, Path]],
    progress: Progress | None,
    expected: Mapping[str, str] | None = None,
) -> tuple[FileRecord, ...]:
    meter = Meter(progress, sum(path.stat().st_size for _, path in sources))
    records = []
    for relative, path in sources:
        key = f"{root}/{relative}"
        with explained(f"s3://{store.bucket}/{key}"):
            records.append(_upload_file(store, path, key, relative, meter, expected or {}))
    return tuple(records)


def _upload_file(
    store: Store, path: Path, key: str, relative: str, meter: Meter, expected: Mapping[str, str]
) -> FileRecord:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_OBJECT_BYTES:
            raise ValueError(f"{path} has {size} bytes; S3 takes {MAX_OBJECT_BYTES} at most")
        stored = head(store, key)
        if stored is None:

            def check(sha256: str) -> None:
                _as_recorded(FileRecord(path=relative, size=size, sha256=sha256), path, expected)

            sent = _send(store, file, key, size, meter, check)
            if sent is not None:
                return _unchanged(FileRecord(path=relative, size=size, sha256=sent), file, path)
            stored = head(store, key) or {}
            file.seek(0)
        digest, checksum = _digests(file, _part_bytes(store, size))
        record = _as_recorded(
            _unchanged(FileRecord(path=relative, size=size, sha256=digest), file, path), path, expected
        )
        if not _holds(store, key, stored, record, checksum):
            raise ServiceError(
                f"s3://{store.bucket}/{key} holds other bytes than {path}; nothing is overwritten: use a new version"
            )
        meter.add(size)
        return record


def _unchanged(record: FileRecord, file: BinaryIO, path: Path) -> FileRecord:
    if file.tell() != record.size or file.read(1):
        raise ServiceError(f"{path} changed size while it was being read; publish when nothing writes to it")
    return record


Check = Callable[[str], None]  # raises where it is not this SHA-256 that is wanted


def _send(store: Store, file: BinaryIO, key: str, size: int, meter: Meter, check: Check) -> str | None:
    """Send a file, reading it once; returns its SHA-256, or None where the key turned out to be taken.

    What `check` refuses never becomes an object.
    """
    part_bytes = _part_bytes(store, size)
    try:
        if size > part_bytes:
            return _send_parts(store, file, key, part_bytes, meter, check)
        body = file.read(size)
        digest = hashlib.sha256(body)
        check(digest.hexdigest())
        store.client.put_object(
            Bucket=store.bucket,
            Key=key,
            Body=body,
            ChecksumSHA256=in_base64(digest.digest()),
            IfNoneMatch="*",
            **store.put_options,
        )
        meter.add(size)
        return digest.hexdigest()
    except ClientError as error:
        # A repeated request whose first answer was lost ends here too.
        if status_of(error) == 412 or (code_of(error) == "NoSuchUpload" and head(store, key) is not None):
            return None
        raise


def _send_parts(store: Store, file: BinaryIO, key: str, part_bytes: int, meter: Meter, check: Check) -> str:
    """Multipart upload with at most `workers` parts in memory, each checked by the server against its own SHA-256."""
    client, whole = store.client, hashlib.sha256()
    target = {"Bucket": store.bucket, "Key": key}
    _abort_unfinished(store, key)
    begun = client.create_multipart_upload(**target, ChecksumAlgorithm="SHA256", **store.put_options)
    target["UploadId"] = begun["UploadId"]

    def send(number: int, body: bytes) -> dict[str, Any]:
        checksum = in_base64(hashlib.sha256(body).digest())
        answer = client.upload_part(**target, PartNumber=number, Body=body, ChecksumSHA256=checksum)
        meter.add(len(body))
        return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumSHA256": checksum}

    parts: list[dict[str, Any]] = []
    try:
        with ThreadPoolExecutor(store.workers) as pool:
            flying: deque[Future[dict[str, Any]]] = deque()
            for number, body in enumerate(iter(lambda: file.read(part_bytes), b""), start=1):
                if len(flying) == store.workers:
                    parts.append(flying.popleft().result())
                flying.append(pool.submit(send, number, body))
                whole.update(body)
            parts.extend(future.result() for future in flying)
        check(whole.hexdigest())
        client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
    except BaseException:
        with suppress(ClientError, BotoCoreError):
            client.abort_multipart_upload(**target)
        raise
    return whole.hexdigest()


def _abort_unfinished(store: Store, key: str) -> None:
    """Free the parts that a killed upload left behind: they cost storage and never become an object.

    A younger one may be another host's, which sends the same and would begin again.
    """
    before = datetime.now(UTC) - UNFINISHED
    for upload in [upload for upload in uploads_below(store, key) if upload["Key"] == key]:
        if upload["Initiated"] < before:
            abort_upload(store, upload)


def _part_bytes(store: Store, size: int) -> int:
    part_bytes = store.part_bytes
    while size > part_bytes * MAX_PARTS:
        part_bytes *= 2
    return part_bytes


def _digests(file: BinaryIO, part_bytes: int) -> tuple[str, str]:
    """A file's SHA-256 in hex, and as S3 gives it: base64; for n parts that of the parts' digests, then "-n"."""
    whole, parts, part, room = hashlib.sha256(), [], hashlib.sha256(), part_bytes
    while chunk := file.read(min(READ_BYTES, room)):
        whole.update(chunk)
        part.update(chunk)
        room -= len(chunk)
        if room == 0:
            parts.append(part.digest())
            part, room = hashlib.sha256(), part_bytes
    if room < part_bytes:
        parts.append(part.digest())
    if len(parts) <= 1:
        return whole.hexdigest(), in_base64(whole.digest())
    return whole.hexdigest(), f"{in_base64(hashlib.sha256(b''.join(parts)).digest())}-{len(parts)}"


def _holds(store: Store, key: str, stored: Mapping[str, Any], record: FileRecord, checksum: str) -> bool:
    """Whether an object holds a file's bytes: by its checksum, or read back where that was taken over other parts."""
    if stored.get("ContentLength") != record.size:
        return False
    kept = stored.get("ChecksumSHA256", "")
    if kept == checksum:
        return True
    if kept and kept.partition("-")[2] == checksum.partition("-")[2]:
        return False
    whole = hashlib.sha256()
    with closing(store.client.get_object(Bucket=store.bucket, Key=key)["Body"]) as body:
        for chunk in body.iter_chunks(READ_BYTES):
            whole.update(chunk)
    return whole.hexdigest() == record.sha256
