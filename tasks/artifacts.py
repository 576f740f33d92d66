"""Families in S3: publish a version once, list versions, fetch one and verify it. The only importer of boto3.

    s3://BUCKET/families/FAMILY/VERSION/PART/...       PART is "elastic" or a budget's name
    s3://BUCKET/families/FAMILY/VERSION/manifest.json  written last: a version without it does not exist

Every object is put with If-None-Match, so nothing is ever overwritten: the same bytes again are a success, other bytes
an error. Failures are `ServiceError`s of one line that name the URI; `tasks.settings.is_transient` sorts them.
"""

import base64
import hashlib
import logging
import os
import shutil
import stat
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from tasks.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    MAX_OBJECT_BYTES,
    NAME,
    FileRecord,
    Manifest,
    check_paths,
    manifest_json,
    parse_manifest,
)
from tasks.settings import BUCKET, ENDPOINT_S3, ServiceError, Settings, redact
from tasks.staging import holds_exactly, inside, occupied, sha256_of, staged

Progress = Callable[[int, int], None]  # bytes done, bytes in all

MAX_PARTS = 10_000  # S3's own limit
READ_BYTES = 1 << 20
STREAM_ATTEMPTS = 5  # botocore retries requests, not bodies that break off

_log = logging.getLogger(__name__)
_REJECTED_KEY = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "AuthFailure"}
_TRANSIENT_CODES = {
    "NoSuchUpload",  # another process cleared it away
    "RequestLimitExceeded",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """An open connection to S3. `put_options` (encryption) go with every write; workers x part_bytes bounds memory."""

    client: Any
    bucket: str
    endpoint: str
    put_options: Mapping[str, str] = field(default_factory=dict)
    workers: int = 4
    part_bytes: int = 16 << 20


# Addresses


def parse_uri(uri: str) -> tuple[str, str]:
    """Split s3://bucket/key into bucket and key; ValueError for anything else."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise ValueError(f"{redact(uri)!r} is not an S3 URI; write s3://bucket/key")
    return bucket, key


def version_uri(bucket: str, family: str, version: str) -> str:
    """The directory of a version; a part of it is `version_uri(...)/PART`."""
    return f"s3://{bucket}/families/{_name('family', family)}/{_name('version', version)}"


def manifest_uri(bucket: str, family: str, version: str) -> str:
    return f"{version_uri(bucket, family, version)}/{MANIFEST_NAME}"


def _name(what: str, value: str) -> str:
    if not NAME.fullmatch(value):
        raise ValueError(f"{what} {value!r} is not a name: a letter or digit, then letters, digits, '.', '_' or '-'")
    return value


# Connection


def open_store(settings: Settings, *, attempts: int = 5) -> Store:
    """Connect as the settings and boto3's own credential chain say; nothing is sent yet."""
    options = {} if settings.encryption == "none" else {"ServerSideEncryption": settings.encryption}
    if settings.kms_key_id:
        options["SSEKMSKeyId"] = settings.kms_key_id
    endpoint = redact(settings.endpoint_url or "AWS")
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=16,
        tcp_keepalive=True,
        request_checksum_calculation="when_required",  # we send SHA-256 ourselves
    )
    with _explained(endpoint):
        # Not boto3.client: its session is the process's, with the credentials of the first call for ever.
        client = boto3.Session().client("s3", endpoint_url=settings.endpoint_url, config=config)
    return Store(client=client, bucket=settings.bucket, endpoint=endpoint, put_options=options)


def check_bucket(settings: Settings) -> None:
    """Raise a ServiceError unless the bucket stores and gives back, under the rule that nothing is overwritten."""
    store = open_store(settings, attempts=2)
    where = f"s3://{store.bucket} at {store.endpoint}"
    probe = {"Bucket": store.bucket, "Key": f"families/.probe-{uuid.uuid4().hex}"}
    with closing(store.client) as client, _explained(where):
        client.put_object(**probe, Body=b"probe", IfNoneMatch="*", **store.put_options)
        try:
            client.get_object(**probe)["Body"].read()
            client.put_object(**probe, Body=b"probe", IfNoneMatch="*", **store.put_options)
        except ClientError as error:
            if _status(error) != 412:
                raise
        else:
            raise ServiceError(
                f"{where}: this server ignores If-None-Match, so versions could be overwritten; use another"
            )
        finally:
            with suppress(ClientError):  # a key that may write but not delete is enough
                client.delete_object(**probe)


def ensure_bucket(settings: Settings) -> None:
    """Create the bucket unless it is there (embedded servers start empty)."""
    store = open_store(settings)
    with closing(store.client) as client, _explained(f"s3://{store.bucket} at {store.endpoint}"):
        try:
            client.head_bucket(Bucket=store.bucket)
        except ClientError as error:
            if _status(error) != 404:
                raise
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=store.bucket)


# Publishing


def publish(
    store: Store,
    *,
    family: str,
    version: str,
    directories: Mapping[str, Path],
    metadata: Mapping[str, Any],
    progress: Progress | None = None,
) -> Manifest:
    """Upload each part's directory, then the manifest. Repeating it with the same content succeeds and sends nothing.

    A retry continues: objects that already hold the right bytes are skipped. `metadata` must not change between
    retries (no clock in it). Other content under a version that exists, or was begun, is a ServiceError.
    """
    target = manifest_uri(store.bucket, family, version)
    root = f"families/{family}/{version}"
    sources = [
        (f"{_name('part', part)}/{relative}", path)
        for part, directory in sorted(directories.items())
        for relative, path in _local_files(directory)
    ]
    published = _manifest_bytes(store, target)
    if published is not None:
        records = tuple(
            FileRecord(path=relative, size=path.stat().st_size, sha256=sha256_of(path)) for relative, path in sources
        )
    else:
        records = _upload(store, root, sources, progress)
    manifest = Manifest(family=family, version=version, files=records, metadata=metadata)
    _put_manifest(store, target, manifest, published)
    return manifest


def upload_directory(
    store: Store, directory: Path, uri: str, *, progress: Progress | None = None
) -> tuple[FileRecord, ...]:
    """Upload a directory's files under an s3:// prefix, resumably; returns their records in order of path."""
    bucket, key = parse_uri(uri)
    return _upload(replace(store, bucket=bucket), key.rstrip("/"), _local_files(directory), progress)


def put_file(store: Store, path: Path, uri: str, *, progress: Progress | None = None) -> FileRecord:
    """Upload one file to a key that is free or already holds the same bytes."""
    bucket, key = parse_uri(uri)
    store = replace(store, bucket=bucket)
    with _explained(uri):
        return _upload_file(store, path, key, path.name, _Meter(progress, path.stat().st_size))


def published_versions(store: Store, family: str) -> tuple[str, ...]:
    """The versions of a family that have a manifest, in order of name."""
    root = f"families/{_name('family', family)}/"
    where = f"s3://{store.bucket}/{root}"
    with _explained(where):
        pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=root, Delimiter="/")
        begun = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ())]
        named = [prefix for prefix in begun if _head(store, f"{prefix}{MANIFEST_NAME}") is not None]
    return tuple(sorted(prefix.removeprefix(root).rstrip("/") for prefix in named))


def _put_manifest(store: Store, uri: str, manifest: Manifest, published: bytes | None) -> None:
    body = manifest_json(manifest)
    if published is None:
        with _explained(uri):
            try:
                store.client.put_object(
                    Bucket=store.bucket,
                    Key=parse_uri(uri)[1],
                    Body=body,
                    ContentType="application/json",
                    ChecksumSHA256=_base64(hashlib.sha256(body).digest()),
                    IfNoneMatch="*",
                    **store.put_options,
                )
            except ClientError as error:
                if _status(error) != 412:
                    raise
                published = _manifest_bytes(store, uri)  # another publisher, or our own put whose answer was lost
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
    store: Store, root: str, sources: Sequence[tuple[str, Path]], progress: Progress | None
) -> tuple[FileRecord, ...]:
    meter = _Meter(progress, sum(path.stat().st_size for _, path in sources))
    records = []
    for relative, path in sources:
        key = f"{root}/{relative}"
        with _explained(f"s3://{store.bucket}/{key}"):
            records.append(_upload_file(store, path, key, relative, meter))
    return tuple(records)


def _upload_file(store: Store, path: Path, key: str, relative: str, meter: "_Meter") -> FileRecord:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_OBJECT_BYTES:
            raise ValueError(f"{path} has {size} bytes; S3 takes {MAX_OBJECT_BYTES} at most")
        stored = _head(store, key)
        if stored is None:
            sent = _send(store, file, key, size, meter)
            if sent is not None:
                return _unchanged(FileRecord(path=relative, size=size, sha256=sent), file, path)
            stored = _head(store, key) or {}
            file.seek(0)
        digest, checksum = _digests(file, _part_bytes(store, size))
        record = _unchanged(FileRecord(path=relative, size=size, sha256=digest), file, path)
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


def _send(store: Store, file: BinaryIO, key: str, size: int, meter: "_Meter") -> str | None:
    """Send a file, reading it once; returns its SHA-256, or None where the key turned out to be taken."""
    part_bytes = _part_bytes(store, size)
    try:
        if size > part_bytes:
            return _send_parts(store, file, key, part_bytes, meter)
        body = file.read(size)
        digest = hashlib.sha256(body)
        store.client.put_object(
            Bucket=store.bucket,
            Key=key,
            Body=body,
            ChecksumSHA256=_base64(digest.digest()),
            IfNoneMatch="*",
            **store.put_options,
        )
        meter.add(size)
        return digest.hexdigest()
    except ClientError as error:
        # A repeated request whose first answer was lost ends here too.
        if _status(error) == 412 or (_code(error) == "NoSuchUpload" and _head(store, key) is not None):
            return None
        raise


def _send_parts(store: Store, file: BinaryIO, key: str, part_bytes: int, meter: "_Meter") -> str:
    """Multipart upload with at most `workers` parts in memory, each checked by the server against its own SHA-256."""
    client, whole = store.client, hashlib.sha256()
    target = {"Bucket": store.bucket, "Key": key}
    _abort_unfinished(store, key)
    begun = client.create_multipart_upload(**target, ChecksumAlgorithm="SHA256", **store.put_options)
    target["UploadId"] = begun["UploadId"]

    def send(number: int, body: bytes) -> dict[str, Any]:
        checksum = _base64(hashlib.sha256(body).digest())
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
        client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
    except BaseException:
        with suppress(ClientError, BotoCoreError):
            client.abort_multipart_upload(**target)
        raise
    return whole.hexdigest()


def _abort_unfinished(store: Store, key: str) -> None:
    """Free the parts that a killed upload left behind: they cost storage and never become an object."""
    pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.bucket, Prefix=key)
    uploads = [upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"] == key]
    for upload in uploads:
        with suppress(store.client.exceptions.NoSuchUpload):
            store.client.abort_multipart_upload(Bucket=store.bucket, Key=key, UploadId=upload["UploadId"])


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
        return whole.hexdigest(), _base64(whole.digest())
    return whole.hexdigest(), f"{_base64(hashlib.sha256(b''.join(parts)).digest())}-{len(parts)}"


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


def _manifest_bytes(store: Store, uri: str) -> bytes | None:
    bucket, key = parse_uri(uri)
    with _explained(uri):
        try:
            answer = store.client.get_object(Bucket=bucket, Key=key)
        except store.client.exceptions.NoSuchKey:
            return None
        with closing(answer["Body"]) as stream:
            body = stream.read(MAX_MANIFEST_BYTES + 1)
    if len(body) > MAX_MANIFEST_BYTES:
        raise ServiceError(f"{uri} is larger than {MAX_MANIFEST_BYTES} bytes, so it is not a manifest")
    return bytes(body)


def read_manifest(store: Store, uri: str) -> Manifest:
    """Read and check the manifest at s3://.../families/FAMILY/VERSION/manifest.json."""
    body = _manifest_bytes(store, uri)
    if body is None:
        raise ServiceError(f"{uri} does not exist: no such version, or its upload never finished")
    manifest = parse_manifest(body, uri)
    if not uri.endswith(f"/families/{manifest.family}/{manifest.version}/{MANIFEST_NAME}"):
        raise ServiceError(
            f"{uri} says it is version {manifest.version!r} of {manifest.family!r}: it was copied or edited"
        )
    return manifest


# Fetching


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
    directory already holds exactly these files; a ServiceError where it holds others.
    """
    manifest = read_manifest(store, uri)
    bucket, key = parse_uri(uri)
    root = key.removesuffix(MANIFEST_NAME)
    files = manifest.part(part)
    if not files:
        raise ServiceError(f"{uri} has no part {part!r}; it has {', '.join(manifest.parts)}")
    if occupied(directory):
        if directory.is_dir() and holds_exactly(directory, files):
            return manifest
        raise ServiceError(f"{directory} exists and is not {part!r} of {uri}; remove it or choose another directory")
    wanted = [
        _Wanted(bucket=bucket, key=f"{root}{part}/{file.path}", path=file.path, size=file.size, sha256=file.sha256)
        for file in files
    ]
    _download(store, wanted, directory, progress)
    return manifest


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


def list_objects(store: Store, uri: str) -> list[tuple[str, str]]:
    """Relative path and ETag of every object below an s3:// prefix, or of the one object that is meant; in order."""
    return [(item.path, item.etag or "") for item in _listed(store, uri)]


def _listed(store: Store, uri: str) -> list[_Wanted]:
    bucket, key = parse_uri(uri)
    prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
    with _explained(uri):
        pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [entry for page in pages for entry in page.get("Contents", ()) if not entry["Key"].endswith("/")]
        if not found and key and (one := _head(replace(store, bucket=bucket), key)) is not None:
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
    with _explained(uri):
        found = _head(replace(store, bucket=bucket), key)
    if found is None:
        raise ServiceError(f"{uri} does not exist")
    size, etag = found["ContentLength"], found["ETag"]
    partial = path.with_name(f".{path.name}.{_identity(etag)}.partial")
    item = _Wanted(bucket=bucket, key=key, path=partial.name, size=size, etag=etag)
    record = _download_file(store, item, path.parent, _Meter(progress, size), threading.Event())
    os.replace(partial, path)
    return FileRecord(path=path.name, size=record.size, sha256=record.sha256)


def exists(store: Store, uri: str) -> bool:
    """Whether there is an object at this URI."""
    bucket, key = parse_uri(uri)
    with _explained(uri):
        return _head(replace(store, bucket=bucket), key) is not None


def _download(
    store: Store, wanted: Sequence[_Wanted], directory: Path, progress: Progress | None
) -> tuple[FileRecord, ...]:
    with staged(directory, _identity(repr(wanted))) as work:
        _check_space(work, wanted)
        meter = _Meter(progress, sum(item.size for item in wanted))
        stop = threading.Event()
        with ThreadPoolExecutor(store.workers) as pool:
            futures = [pool.submit(_download_file, store, item, work, meter, stop) for item in wanted]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return tuple(future.result() for future in futures)


def _download_file(store: Store, item: _Wanted, work: Path, meter: "_Meter", stop: threading.Event) -> FileRecord:
    path = inside(work, item.path)
    with _explained(item.uri):
        digest, resumed = _complete(store, item, path, meter, stop)
        if resumed and item.sha256 not in (None, digest):
            path.unlink()  # what an earlier attempt left may be rotten; the object gets a chance of its own
            digest, _ = _complete(store, item, path, meter, stop)
    if item.sha256 not in (None, digest):
        path.unlink()
        raise ServiceError(f"{item.uri} is corrupt: its SHA-256 is {digest}, the manifest says {item.sha256}")
    return FileRecord(path=item.path, size=item.size, sha256=digest)


def _complete(store: Store, item: _Wanted, path: Path, meter: "_Meter", stop: threading.Event) -> tuple[str, int]:
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
            except FlexibleChecksumError:
                path.unlink()
                raise
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), resumed


def _append(
    store: Store, item: _Wanted, file: BinaryIO, digest: "hashlib._Hash", meter: "_Meter", stop: threading.Event
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


def _check_space(work: Path, wanted: Sequence[_Wanted]) -> None:
    there = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    need, free = sum(item.size for item in wanted) - there, shutil.disk_usage(work).free
    if need > free:
        raise ServiceError(
            f"{work.parent} has {free} bytes free, {need} more are needed: free some space", transient=True
        )


def _identity(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Shared


class _Meter:
    """Adds up bytes from many threads and tells the caller's progress function."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done = min(self._done + count, self._total)
            if self._progress is not None:
                self._progress(self._done, self._total)


def _head(store: Store, key: str) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = store.client.head_object(Bucket=store.bucket, Key=key, ChecksumMode="ENABLED")
    except ClientError as error:
        if _status(error) == 404:
            return None
        raise
    return answer


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn boto's errors into ServiceErrors about `where`."""
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise explain(error, where) from error


def explain(error: Exception, where: str) -> ServiceError:
    """One line for any error of boto's: what S3 said about `where`, and what to do."""
    where = redact(where)
    if isinstance(error, ClientError):
        return _explain_answer(error, where)
    if isinstance(error, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
        return ServiceError(
            f"{where}: no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    what = redact(" ".join(str(error).split())[:200])
    if isinstance(error, SSLError):
        return ServiceError(f"{where}: TLS fails ({what}); check the endpoint's certificate and AWS_CA_BUNDLE")
    if isinstance(error, BotoConnectionError | HTTPClientError | IncompleteReadError):
        return ServiceError(
            f"{where}: cannot reach S3 ({type(error).__name__}); check {ENDPOINT_S3} and that the server runs",
            transient=True,
        )
    return ServiceError(f"{where}: {what}")


def _explain_answer(error: ClientError, where: str) -> ServiceError:
    code, status = _code(error), _status(error)
    said = f"S3 answers {code} to {error.operation_name}"
    if code in _REJECTED_KEY:
        return ServiceError(f"{where}: S3 rejects the key ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if code == "NoSuchBucket" or (status == 404 and error.operation_name == "HeadBucket"):
        return ServiceError(f"{where}: the bucket does not exist; create it, or set {BUCKET} to one that does")
    if status == 403:
        return ServiceError(f"{where}: {said}; this key may not do that: ask for the permission, or use another key")
    if status == 404 and error.operation_name in ("HeadObject", "GetObject"):
        return ServiceError(f"{where} does not exist")
    if status in (409, 412, 429) or (status >= 500 and status != 501) or code in _TRANSIENT_CODES:
        return ServiceError(f"{where}: {said}; try again", transient=True)
    message = str(error.response.get("Error", {}).get("Message", ""))
    return ServiceError(f"{where}: {said}: {redact(' '.join(message.split())[:200])}")
