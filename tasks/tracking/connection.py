"""How MLflow is reached: its client, what it needs of the environment, and its failures as errors of one line."""

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from tasks.settings import REGISTRY_URI, TRACKING_URI, ServiceError, is_transient, redact, remedy

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

# For the owner of the process to set: MLflow's own limits keep a call to a dead server for four minutes, these for six
# seconds. Four requests in a row are lost once in 600 calls where a fifth of all requests is.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what fails is raised as well; tracebacks are not for the terminal
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
CHECK_SECONDS = 5.0
ANSWER_ATTEMPTS = 5


def check_server(uri: str) -> None:
    """Raise a ServiceError, within seconds, unless MLflow answers at this URI and lets us in."""
    with explained(uri, "checking MLflow"):
        parts = urlsplit(uri)
        if is_server(uri):
            _check_health(uri)
        elif parts.hostname:
            _check_port(uri, parts.hostname, parts.port)
        elif parts.scheme == "sqlite":
            _check_sqlite(uri, parts.path[1:])
        client_of(uri).search_experiments(max_results=1)


def is_server(uri: str) -> bool:
    """Whether MLflow is a server; otherwise it is a database that we open ourselves."""
    return uri.startswith(("http://", "https://"))


def _check_health(uri: str) -> None:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3 import Retry

    with requests.Session() as session:
        session.mount(uri, HTTPAdapter(max_retries=Retry(connect=0, read=3, backoff_factor=0.2)))
        try:
            session.get(f"{uri.rstrip('/')}/health", timeout=CHECK_SECONDS, stream=True).close()
        except requests.exceptions.SSLError:
            pass  # it is there; MLflow has settings of its own for TLS
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _unreachable(uri) from error


def _check_port(uri: str, host: str, port: int | None) -> None:
    import socket

    default = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}.get(uri.partition(":")[0].partition("+")[0])
    if port or default:
        try:
            socket.create_connection((host, port or default), timeout=CHECK_SECONDS).close()
        except OSError as error:
            raise _unreachable(uri) from error


def check_database(uri: str) -> None:
    """A ServiceError where a URI names a SQLite database that is not there: to open it would make an empty one."""
    parts = urlsplit(uri)
    if parts.scheme == "sqlite" and not Path(parts.path[1:]).is_file():
        raise ServiceError(f"there is no database {redact(uri)}; correct {TRACKING_URI} or {REGISTRY_URI}")


def _check_sqlite(uri: str, path: str) -> None:
    import sqlite3

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=CHECK_SECONDS)) as database:
            database.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise ServiceError(f"MLflow's database {redact(uri)} cannot be opened ({error}); check its path") from error


def client_of(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return cast("MlflowClient", _Insistent(MlflowClient(tracking_uri=uri, registry_uri=uri)))


class _Insistent:
    """A client that asks again where an answer breaks off: MLflow's own retries end where an answer begins."""

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        from mlflow.exceptions import MlflowException
        from requests.exceptions import ChunkedEncodingError

        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            for _ in range(ANSWER_ATTEMPTS - 1):
                try:
                    return method(*arguments, **named)
                except MlflowException as error:
                    if not isinstance(error.__context__, ChunkedEncodingError):
                        raise
            return method(*arguments, **named)

        return call


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def first_line(error: BaseException) -> str:
    said = str(error).partition("[SQL:")[0]  # SQLAlchemy goes on with the statement
    return redact(" ".join(said.split())[:300])


def _unreachable(uri: str) -> ServiceError:
    from requests.utils import get_environ_proxies

    line = f"MLflow at {redact(uri)} does not answer; {remedy(TRACKING_URI)}"
    if is_server(uri) and (proxy := get_environ_proxies(uri).get(urlsplit(uri).scheme)):
        line += f", and the proxy in between, {redact(proxy)}: it is not asked for hosts that no_proxy names"
    return ServiceError(line, transient=True)


@contextmanager
def explained(uri: str, doing: str) -> Iterator[None]:
    """Turn what MLflow, its database or its file store raises into ServiceErrors of one line."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:
        said = _refusal(error) or first_line(error)
        raise ServiceError(f"MLflow at {redact(uri)}, {doing}: {said}", transient=_is_passing(error)) from error


def _refusal(error: Exception) -> str | None:
    """What to do about a server that is away, wants a login, refuses it, or is not MLflow; None for other errors."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException):
        return None
    if "not in a valid JSON format" in str(error):
        return "the answer is not MLflow's but some page, perhaps of a login; check MLFLOW_TRACKING_URI"
    if "Max retries exceeded" in str(error):
        return f"it does not answer; {remedy(TRACKING_URI)}"
    status = _status_of(error)
    if status == 401:
        return (
            "it wants a login (401); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, to one that it knows"
        )
    if status == 403:
        return "this login may not do that (403); ask for the permission, or use another login"
    return None


def _status_of(error: "MlflowException") -> int:
    """The HTTP status of an answer; MLflow's own errors are given one by their code."""
    answered = re.search(r"failed with error code (\d{3}) !=", str(error))
    return int(answered[1]) if answered else int(error.get_http_status_code())


def _is_passing(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    from tasks.artifacts import explain

    if isinstance(error, MlflowException):
        if "not in a valid JSON format" in str(error):
            return False
        status = _status_of(error)
        return status in (409, 429) or (status >= 500 and status != 501)
    if is_transient(error):
        return True
    return explain(error, "").transient  # MLflow lets errors of the file store through


def page_of(uri: str, path: str) -> str:
    """A page of MLflow's in its view for training; the other, for agents, has no way to the registry."""
    return f"{redact(uri).rstrip('/')}/#/{path}?workflowType=machine_learning"
