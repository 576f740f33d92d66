"""What differs by machine: where the tracking server, the object store and the state directory are.

Credentials are never fields here: boto3's own chain reads them (environment, profile, instance role); so does MLflow's.
"""

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic_core.budget import parse_bytes

TRACKING_URI = "MLFLOW_TRACKING_URI"
REGISTRY_URI = "MLFLOW_REGISTRY_URI"
ENDPOINT_S3 = "AWS_ENDPOINT_URL_S3"
ENDPOINT = "AWS_ENDPOINT_URL"
BUCKET = "ELASTIC_BUCKET"
HOME = "ELASTIC_HOME"
WORKSPACE = "ELASTIC_WORKSPACE"
CACHE_SIZE = "ELASTIC_CACHE_SIZE"
ENCRYPTION = "ELASTIC_S3_SSE"
KMS_KEY = "ELASTIC_S3_SSE_KMS_KEY_ID"
SIGNING_KEY = "ELASTIC_SIGNING_KEY_FILE"
VERIFICATION_KEY = "ELASTIC_VERIFICATION_KEY_FILE"
PREFECT_API = "PREFECT_API_URL"
# Ours alone: the logs of the servers that elastic started, by the variables that it set to their addresses.
EMBEDDED = "_ELASTIC_EMBEDDED"

LEAST_ROOM = 1 << 20  # bytes; with less nothing of ours can work
DEFAULT_CACHE_SIZE = "200GB"
TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
ENCRYPTIONS = ("none", "AES256", "aws:kms", "aws:kms:dsse")

_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_WORKSPACE_URI = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/[A-Za-z0-9_=-][A-Za-z0-9._=-]*)+")
_TAKEN = ("families", "mlflow")  # the first names of keys that are something else
_USERINFO = re.compile(r"(?<=://)[^\s/?#]*@")
# SQLAlchemy accepts an unescaped "/" in a password; "host:5000/" is a port, not one.
_USERINFO_WITH_SLASH = re.compile(r"(?<=://)[^\s/@:?#]*:(?!\d+(?:/|$))[^\s@]*@")
_SECRET_PARAMETER = re.compile(
    r"(?i)([?&][^=&\s]*(?:signature|credential|token|password|passwd|secret|key|sig)[^=&\s]*=)[^&\s\"']*"
)
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
# A full disk, a disk or a shared file system that fails for a moment (ESTALE: the NFS server has restarted), a network
# that is down.
_PASSING_ERRNOS = DISK_FULL | {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
_PASSING_STATUSES = {408, 425, 429}  # time-out, too early, too many requests; and 5xx
_LASTING_STATUSES = {501, 505}  # the server will never do that

# Classes of other libraries, by name, so that none of them is imported to ask. A subclass counts as its base.
_NETWORK = {
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "requests.exceptions.ChunkedEncodingError",
    "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.TimeoutError",
    "urllib3.exceptions.MaxRetryError",
    "urllib.error.URLError",
    "http.client.IncompleteRead",
    "http.client.BadStatusLine",
    "httpx.TransportError",
    "httpx2.TransportError",  # the Hub's client
    "httpcore.NetworkError",
    "httpcore.ProtocolError",
    "httpcore.TimeoutException",
    "aiohttp.client_exceptions.ClientConnectionError",
    "aiohttp.client_exceptions.ClientPayloadError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError",
}
# They derive from errors of the network, or are raised inside one, and come again at every attempt.
_LASTING = {
    "huggingface_hub.errors.OfflineModeIsEnabled",
    "ssl.SSLCertVerificationError",
    "httpx.UnsupportedProtocol",
    "httpx2.UnsupportedProtocol",
    "requests.exceptions.InvalidProxyURL",
}
# Raised inside an `except` for an error of the network, these are a defect of the handler.
_DEFECTS = (LookupError, TypeError, AttributeError, NameError, AssertionError, ImportError, MemoryError)


class ServiceError(RuntimeError):
    """An outside service (S3, MLflow, an embedded server) failed or refused; one line, free of secrets.

    `transient` tells whether the same call may succeed later: network, 5xx, throttling, a full disk.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


def is_transient(error: BaseException) -> bool:
    """Whether a retry may help. The error decides, or the first of its causes that can.

    Transient: a ServiceError that says so, errors of the network in any library, 408, 425, 429 and 5xx, a full disk,
    EIO and ESTALE. Not transient: offline mode, a certificate that is not trusted, and whatever is not known here.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ServiceError):
            return cause.transient
    if any(not _LASTING.isdisjoint(_class_names(cause)) for cause in causes):
        return False
    return next((verdict for verdict in map(_verdict, causes) if verdict is not None), False)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it was raised from or inside of, in turn."""
    seen: BaseException | None = error
    passed: set[int] = set()
    while seen is not None and id(seen) not in passed:
        yield seen
        passed.add(id(seen))
        if seen.__cause__ is None and (seen.__suppress_context__ or isinstance(seen, _DEFECTS)):
            return
        seen = seen.__cause__ or seen.__context__


def _verdict(error: BaseException) -> bool | None:
    """Whether this error by itself is transient; None where it does not say."""
    status = _http_status(error)
    if status is not None:
        return status in _PASSING_STATUSES or (status >= 500 and status not in _LASTING_STATUSES)
    if isinstance(error, ConnectionError | TimeoutError) or not _NETWORK.isdisjoint(_class_names(error)):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNOS:
        return True
    return None


def _http_status(error: BaseException) -> int | None:
    """The status of the answer that an HTTP client raised as an error: 400 to 599."""
    answer = getattr(error, "response", None)
    found = [getattr(answer, "status_code", None), getattr(error, "status", None)]
    if isinstance(answer, dict):  # botocore's
        found.append(answer.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    return next((status for status in found if type(status) is int and 400 <= status < 600), None)


def _class_names(error: BaseException) -> set[str]:
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}


def redact(text: str) -> str:
    """`text` with the secrets of every URL in it hidden: user and password, signatures and tokens in a query."""
    text = _USERINFO.sub("***@", text)
    text = _USERINFO_WITH_SLASH.sub("***@", text)
    return _SECRET_PARAMETER.sub(r"\1***", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The machine's side of a run. `bucket` is "" where only reading by URI is wanted; no endpoint means AWS itself.

    Models are registered where runs are tracked, unless there is a `registry_uri`.

    Manifests are signed with the private key in the file `signing_key`, and believed only if signed by the key whose
    public half is in `verification_key`; either may be missing.

    `workspace` is the s3:// prefix through which hosts share what steps made, None where that stays in `home`; what is
    brought here from there takes at most `cache_bytes`.
    """

    tracking_uri: str
    bucket: str
    endpoint_url: str | None = None
    home: Path = Path(".elastic")
    encryption: str = "none"
    kms_key_id: str | None = None
    signing_key: Path | None = None
    verification_key: Path | None = None
    registry_uri: str | None = None
    workspace: str | None = None
    cache_bytes: int = parse_bytes(DEFAULT_CACHE_SIZE, CACHE_SIZE)

    def __post_init__(self) -> None:
        for name, uri in ((TRACKING_URI, self.tracking_uri), (REGISTRY_URI, self.registry)):
            _check_mlflow(name, uri)
        if self.bucket and not _BUCKET_NAME.fullmatch(self.bucket):
            raise ValueError(
                f"{BUCKET}={self.bucket!r} is not a bucket name: 3-63 of a-z 0-9 . - and no s3:// before it"
            )
        if self.endpoint_url and not self.endpoint_url.startswith(("http://", "https://")):
            shown = redact(self.endpoint_url)
            raise ValueError(f"{ENDPOINT_S3}={shown!r} is not a URL; write http://host:port or https://host")
        if self.encryption not in ENCRYPTIONS:
            raise ValueError(f"{ENCRYPTION}={self.encryption!r} is unknown; use one of {', '.join(ENCRYPTIONS)}")
        if self.kms_key_id and not self.encryption.startswith("aws:kms"):
            raise ValueError(f"{KMS_KEY} is set but {ENCRYPTION} is {self.encryption!r}; set {ENCRYPTION}=aws:kms")
        if self.workspace is not None:
            _check_workspace(self.workspace)

    @property
    def registry(self) -> str:
        """The URI of MLflow's model registry."""
        return self.registry_uri or self.tracking_uri

    def __repr__(self) -> str:
        endpoint = redact(self.endpoint_url) if self.endpoint_url else None
        return (
            f"Settings(tracking_uri={redact(self.tracking_uri)!r}, bucket={self.bucket!r}, endpoint_url={endpoint!r}, "
            f"home={str(self.home)!r}, encryption={self.encryption!r}, kms_key_id={self.kms_key_id!r}, "
            f"signing_key={self.signing_key}, verification_key={self.verification_key}, "
            f"registry_uri={redact(self.registry_uri) if self.registry_uri else None!r}, workspace={self.workspace!r}, "
            f"cache_bytes={self.cache_bytes})"
        )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ, *, need_bucket: bool = True) -> "Settings":
        """Read the settings; a required variable that is unset or empty is a ValueError that names it and the remedy.

        `need_bucket=False` suits readers (`elastic pull`), to whom the registry gives full s3:// URIs.
        """
        bucket = environ.get(BUCKET, "")
        if need_bucket:
            bucket = _required(environ, BUCKET, "the bucket that holds the families, for example models")
        return cls(
            tracking_uri=_required(environ, TRACKING_URI, "MLflow's URI, for example http://mlflow:5000"),
            bucket=bucket,
            endpoint_url=environ.get(ENDPOINT_S3) or environ.get(ENDPOINT) or None,
            home=home_directory(environ),
            encryption=environ.get(ENCRYPTION) or "none",
            kms_key_id=environ.get(KMS_KEY) or None,
            signing_key=_file(environ, SIGNING_KEY),
            verification_key=_file(environ, VERIFICATION_KEY),
            registry_uri=environ.get(REGISTRY_URI) or None,
            workspace=environ.get(WORKSPACE) or None,
            cache_bytes=parse_bytes(environ.get(CACHE_SIZE) or DEFAULT_CACHE_SIZE, CACHE_SIZE),
        )


def remedy(*variables: str, otherwise: str | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """What to look at when a service fails that one of `variables` names, in the words that end a message.

    That is the log of the server where elastic itself started it, the first of the variables that is set, or
    `otherwise`: nobody is told to check a variable that they never set.
    """
    logs = json.loads(environ.get(EMBEDDED) or "{}")
    for variable in variables:
        if variable in logs:
            return f"elastic started this server, and its log is {logs[variable]}"
    known = next((variable for variable in variables if environ.get(variable)), None)
    return otherwise if known is None and otherwise is not None else f"check {known or variables[0]}"


def home_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """The state directory, absolute, so that processes with other working directories mean the same one."""
    return Path(environ.get(HOME) or ".elastic").expanduser().absolute()


def make_home(environ: Mapping[str, str] = os.environ) -> Path:
    """The state directory, there and ready to be written; a ValueError that names the variable where it cannot be."""
    home = home_directory(environ)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as probe:
            probe.write(bytes(LEAST_ROOM))
    except OSError as error:
        raise ValueError(
            f"the state directory {home} cannot be written ({error.strerror}); make room, or set {HOME} to another"
        ) from error
    return home


def _check_mlflow(name: str, uri: str) -> None:
    """ValueError unless MLflow at this URI can hold what we record and register."""
    scheme, shown = uri.partition(":")[0], redact(uri)
    if scheme in ("databricks", "databricks-uc", "uc"):
        raise ValueError(
            f"{name}={shown!r}: Databricks names experiments by paths of its workspace, and Unity Catalog registers "
            "MLflow's own model format alone and no checkpoint in S3; use an MLflow server or a database of your own"
        )
    if scheme.partition("+")[0] not in TRACKING_SCHEMES or "://" not in uri:
        raise ValueError(f"{name}={shown!r} is not a server or database URI; use http://..., or sqlite:///...")


def _check_workspace(uri: str) -> None:
    """ValueError unless a workspace may lie at this URI."""
    if not _WORKSPACE_URI.fullmatch(uri):
        raise ValueError(
            f"{WORKSPACE}={redact(uri)!r:.200} is not s3://bucket/prefix; unset, the workspace is below {HOME}"
        )
    if (first := uri.split("/")[3]) in _TAKEN:
        raise ValueError(f"{WORKSPACE}={uri!r}: {first}/ holds something else in every bucket; choose another prefix")


def _file(environ: Mapping[str, str], name: str) -> Path | None:
    return Path(environ[name]).expanduser().absolute() if environ.get(name) else None


def _required(environ: Mapping[str, str], name: str, meaning: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise ValueError(
            f"{name} is not set: export {meaning}, or use `elastic run` with no service named: it starts its own"
        )
    return value
