"""The way to S3: addresses, the connection, and what its errors mean."""

import base64
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from elastic_core.schema import checked_name
from tasks.artifacts.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from tasks.settings import BUCKET, ENDPOINT, ENDPOINT_S3, WORKSPACE, ServiceError, Settings, redact, remedy

Progress = Callable[[int, int], None]  # bytes done, bytes in all

FAMILIES = "families/"
REPORTS = "mlflow/"  # of runs, where MLflow is a database of ours
CHECKS = 3  # an unreachable server is told within half a minute
PROBE = f"{FAMILIES}.probe-"  # a version's family has a name, which begins with no dot

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
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
    """An open connection to S3. `put_options` (encryption) go with every write; workers x part_bytes bounds memory.

    The keys are files: manifests are signed by the one, and read only where signed for the other.
    """

    client: Any
    bucket: str
    endpoint: str
    put_options: Mapping[str, str] = field(default_factory=dict)
    signing_key: Path | None = None
    verification_key: Path | None = None
    workers: int = 4
    part_bytes: int = 16 << 20


# Addresses


def parse_uri(uri: str) -> tuple[str, str]:
    """Split s3://bucket/key into bucket and key; ValueError for anything else, and what servers read differently."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not _BUCKET.fullmatch(bucket):
        raise ValueError(f"{redact(uri)!r:.200} is not an S3 URI; write s3://bucket/key")
    if any(part in ("", ".", "..") for part in key.removesuffix("/").split("/")[key == "" :]) or not key.isprintable():
        raise ValueError(
            f"{redact(uri)!r:.200} has an empty, '.' or '..' component or a control character; write s3://bucket/key"
        )
    return bucket, key


def version_uri(bucket: str, family: str, version: str) -> str:
    """The directory of a version; a part of it is `version_uri(...)/PART`."""
    return f"s3://{bucket}/{FAMILIES}{checked_name('family', family)}/{checked_name('version', version)}"


def manifest_uri(bucket: str, family: str, version: str) -> str:
    return f"{version_uri(bucket, family, version)}/{MANIFEST_NAME}"


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
    with explained(endpoint):
        # Not boto3.client: its session is the process's, with the credentials of the first call for ever.
        client = boto3.Session().client("s3", endpoint_url=settings.endpoint_url, config=config)
    return Store(
        client=client,
        bucket=settings.bucket,
        endpoint=endpoint,
        put_options=options,
        signing_key=settings.signing_key,
        verification_key=settings.verification_key,
    )


def check_bucket(settings: Settings) -> None:
    """Raise a ServiceError unless the bucket stores and gives back, under the rule that nothing is overwritten."""
    for _ in range(CHECKS - 1):
        try:
            return _check_once(settings)
        except ServiceError as error:
            if not error.transient:
                raise
    _check_once(settings)


def _check_once(settings: Settings) -> None:
    store = open_store(settings, attempts=2)
    where = f"s3://{store.bucket} at {store.endpoint}"
    probe = {"Bucket": store.bucket, "Key": f"{PROBE}{uuid.uuid4().hex}"}
    with closing(store.client) as client, explained(where):
        client.put_object(**probe, Body=b"probe", IfNoneMatch="*", **store.put_options)
        try:
            client.get_object(**probe)["Body"].read()
            client.put_object(**probe, Body=b"probe", IfNoneMatch="*", **store.put_options)
        except ClientError as error:
            if status_of(error) != 412:
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
    with closing(store.client) as client, explained(f"s3://{store.bucket} at {store.endpoint}"):
        try:
            client.head_bucket(Bucket=store.bucket)
        except ClientError as error:
            if status_of(error) != 404:
                raise
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=store.bucket)


# Shared


class Meter:
    """Adds up bytes from many threads and tells the caller's progress function."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done = min(self._done + count, self._total)
            if self._progress is not None:
                self._progress(self._done, self._total)

    def advance(self) -> Progress:
        """A progress function for work that goes on from here."""
        before = self._done
        return lambda done, _: self.add(before + done - self._done)

    def finish(self) -> None:
        """The rest, such as headers that nobody counted."""
        self.add(self._total - self._done)


def head(store: Store, key: str) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = store.client.head_object(Bucket=store.bucket, Key=key, ChecksumMode="ENABLED")
    except ClientError as error:
        if status_of(error) == 404:
            return None
        raise
    return answer


def objects_below(store: Store, prefix: str) -> Iterator[dict[str, Any]]:
    """What S3 lists of every object whose key begins with `prefix`, in order of key; directories' markers are none."""
    pages = store.client.get_paginator("list_objects_v2").paginate(Bucket=store.bucket, Prefix=prefix)
    return (entry for page in pages for entry in page.get("Contents", ()) if not entry["Key"].endswith("/"))


def uploads_below(store: Store, prefix: str) -> Iterator[dict[str, Any]]:
    """What S3 lists of every multipart upload that is not complete, to a key that begins with `prefix`."""
    pages = store.client.get_paginator("list_multipart_uploads").paginate(Bucket=store.bucket, Prefix=prefix)
    return (upload for page in pages for upload in page.get("Uploads", ()))


def abort_upload(store: Store, upload: Mapping[str, Any]) -> None:
    with suppress(store.client.exceptions.NoSuchUpload):
        store.client.abort_multipart_upload(Bucket=store.bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def manifest_bytes(store: Store, uri: str) -> bytes | None:
    bucket, key = parse_uri(uri)
    with explained(uri):
        try:
            answer = store.client.get_object(Bucket=bucket, Key=key)
        except store.client.exceptions.NoSuchKey:
            return None
        with closing(answer["Body"]) as stream:
            body = bytes(stream.read(MAX_MANIFEST_BYTES + 1))
    if len(body) > MAX_MANIFEST_BYTES:
        raise ServiceError(f"{uri} is larger than {MAX_MANIFEST_BYTES} bytes, so it is not a manifest")
    if len(body) < answer["ContentLength"]:  # botocore tells of it only where the whole body is asked for
        raise ServiceError(f"{uri}: the answer broke off; try again", transient=True)
    return body


def in_base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def explained(where: str) -> Iterator[None]:
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
    if isinstance(error, ProxyConnectionError):
        return ServiceError(
            f"{where}: cannot reach S3 through the proxy that the environment names; check HTTPS_PROXY and HTTP_PROXY, "
            "or name the host in no_proxy",
            transient=True,
        )
    if isinstance(error, BotoConnectionError | HTTPClientError | IncompleteReadError):
        return ServiceError(
            f"{where}: cannot reach S3 ({type(error).__name__}); "
            + remedy(ENDPOINT_S3, ENDPOINT, otherwise="check the network"),
            transient=True,
        )
    return ServiceError(f"{where}: {what}")


def _explain_answer(error: ClientError, where: str) -> ServiceError:
    code, status = code_of(error), status_of(error)
    said = f"S3 answers {code} to {error.operation_name}"
    if code in _REJECTED_KEY:
        keys = "check the credentials that boto3 finds in its files or on this machine"
        return ServiceError(
            f"{where}: S3 rejects the key ({code}); "
            + remedy("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", otherwise=keys)
        )
    if code == "NoSuchBucket" or (status == 404 and error.operation_name == "HeadBucket"):
        return ServiceError(
            f"{where}: the bucket does not exist; create it, or name one that does in {BUCKET} or {WORKSPACE}"
        )
    if status == 403:
        return ServiceError(f"{where}: {said}; this key may not do that: ask for the permission, or use another key")
    if status == 404 and error.operation_name in ("HeadObject", "GetObject"):
        return ServiceError(f"{where} does not exist")
    if status in (409, 412, 429) or (status >= 500 and status != 501) or code in _TRANSIENT_CODES:
        return ServiceError(f"{where}: {said}; try again", transient=True)
    message = str(error.response.get("Error", {}).get("Message", ""))
    return ServiceError(f"{where}: {said}: {redact(' '.join(message.split())[:200])}")
