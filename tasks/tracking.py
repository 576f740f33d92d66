"""Runs, curves and registered families in MLflow. The only importer of mlflow, and only when a function needs it.

A tracking URI goes into every function: an http(s) server, or a database such as sqlite:///... with no server at all.
Failures are `ServiceError`s of one line that name the redacted URI. Every function may be repeated after a failure.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from tasks.manifest import NAME
from tasks.settings import ServiceError, redact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

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

RUN_KEY = "elastic.run_key"
NUMBER = "{number}"
FAMILY, VERSION, BUDGET, MANIFEST = "elastic.family", "elastic.version", "elastic.budget", "elastic.manifest"
METRIC_PREFIX = "metric."
NOTE = "mlflow.note.content"  # MLflow's own: what the run's page shows as its description
CANDIDATE, CHAMPION = "candidate", "champion"

VERSIONS_A_PAGE = 1000
MAX_METRICS, MAX_PARAMS, MAX_PARAM_LENGTH = 1000, 100, 6000  # MLflow's limits on one call and one value

_log = logging.getLogger(__name__)

_REFERENCE = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:@(?P<alias>[A-Za-z0-9_-]+)|[:/](?P<version>[0-9]{1,9}))?"
)
_SECRET_KEY = re.compile(
    r"(?i)(?:^|[._-])(?:password|passwd|secret|credentials?|(?:api|access|auth|secret|hf)[_-]?(?:key|token))$"
)


# Connection


def check_server(uri: str) -> None:
    """Raise a ServiceError, within seconds, unless MLflow answers at this URI and lets us in."""
    with _explained(uri, "checking MLflow"):
        parts = urlsplit(uri)
        if is_server(uri):
            _check_health(uri)
        elif parts.hostname:
            _check_port(uri, parts.hostname, parts.port)
        elif parts.scheme == "sqlite":
            _check_sqlite(uri, parts.path[1:])
        _client(uri).search_experiments(max_results=1)


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


def _check_sqlite(uri: str, path: str) -> None:
    import sqlite3

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=CHECK_SECONDS)) as database:
            database.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise ServiceError(f"MLflow's database {redact(uri)} cannot be opened ({error}); check its path") from error


def _client(uri: str) -> "MlflowClient":
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


# Runs


def open_run(
    uri: str,
    *,
    experiment: str,
    run_key: str,
    run_name: str,
    tags: Mapping[str, str] | None = None,
    artifact_root: str | None = None,
) -> str:
    """The id of the run with this key, made the first time and set running again after an interruption.

    `artifact_root` (s3://...) says where a new experiment keeps its files; a server decides for itself when it is None.
    """
    if not NAME.fullmatch(run_key):
        raise ValueError(f"run key {run_key!r} is not a name: letters, digits, '.', '_' or '-'")
    query = f"tags.`{RUN_KEY}` = '{run_key}'"
    with _explained(uri, f"opening run {run_name!r}"):
        client = _client(uri)
        experiment_id = _experiment(client, experiment, artifact_root)

        def find() -> list[Any]:
            return list(
                client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"], max_results=1)
            )

        runs = find()
        if not runs:
            client.create_run(experiment_id, run_name=run_name, tags={RUN_KEY: run_key})
            runs = find()  # a create whose answer was lost is sent again: all agree on the first
        run_id: str = runs[0].info.run_id
        if runs[0].info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        _set_tags(client, run_id, tags or {})
        return run_id


def is_finished(uri: str, experiment: str, run_key: str) -> bool:
    """Whether the run with this key has come to a good end."""
    with _explained(uri, f"looking for run {run_key!r}"):
        client = _client(uri)
        found = client.get_experiment_by_name(experiment)
        query = f"tags.`{RUN_KEY}` = '{run_key}' AND attributes.status = 'FINISHED'"
        return found is not None and bool(client.search_runs([found.experiment_id], query, max_results=1))


def run_url(uri: str, run_id: str) -> str | None:
    """The run's page; None where MLflow is a database with no server."""
    if not is_server(uri):
        return None
    with _explained(uri, f"looking for run {run_id}"):
        experiment = _client(uri).get_run(run_id).info.experiment_id
    return _page(uri, f"experiments/{experiment}/runs/{run_id}")


def model_url(uri: str, model: str) -> str | None:
    """The page of a registered version, NAME:VERSION; None where MLflow is a database with no server."""
    if not is_server(uri):
        return None
    return _page(uri, f"models/{model.replace(':', '/versions/')}")


def _page(uri: str, path: str) -> str:
    """A page of MLflow's in its view for training; the other, for agents, has no way to the registry."""
    return f"{redact(uri).rstrip('/')}/#/{path}?workflowType=machine_learning"


def _experiment(client: "MlflowClient", name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_root))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise ServiceError(f"MLflow's experiment {name!r} is deleted; restore it, or give the family another name")
    return str(found.experiment_id)


def flatten(tree: Mapping[str, Any]) -> dict[str, str]:
    """Nested mappings as `a.b.c` to text, secrets hidden, values cut to MLflow's limit."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{below}": text for below, text in flatten(value).items()}
        else:
            plain = value if isinstance(value, str) else json.dumps(value, default=str)
            text = "***" if _SECRET_KEY.search(str(key)) else redact(plain)
            flat[str(key)] = text if len(text) <= MAX_PARAM_LENGTH else f"{text[: MAX_PARAM_LENGTH - 3]}..."
    return flat


def log_params(uri: str, run_id: str, params: Mapping[str, Any]) -> None:
    """Log a (nested) recipe as the run's parameters."""
    from mlflow.entities import Param

    with _explained(uri, f"logging parameters to run {run_id}"):
        flat = [Param(key, value) for key, value in flatten(params).items()]
        for chunk in _chunks(flat, MAX_PARAMS):
            _client(uri).log_batch(run_id, params=chunk, synchronous=True)


def log_metrics(uri: str, run_id: str, metrics: Mapping[str, float]) -> None:
    """Log single values to the run; the same ones again change nothing."""
    from mlflow.entities import Metric

    with _explained(uri, f"logging metrics to run {run_id}"):
        values = [Metric(key, value, int(time.time() * 1000), 0) for key, value in metrics.items()]
        _client(uri).log_batch(run_id, metrics=values, synchronous=True)


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    with _explained(uri, f"tagging run {run_id}"):
        _set_tags(_client(uri), run_id, tags)


def _set_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for chunk in _chunks([RunTag(key, redact(value)) for key, value in tags.items()], MAX_PARAMS):
        client.log_batch(run_id, tags=chunk, synchronous=True)


def log_files(uri: str, run_id: str, directory: Path, artifact_path: str) -> None:
    """Upload a directory of report files (HTML, Markdown, images) below the run's artifacts."""
    with _explained(uri, f"uploading {directory} to run {run_id}"):
        _client(uri).log_artifacts(run_id, str(directory), artifact_path)


def finish_run(uri: str, run_id: str, *, failed: bool = False) -> None:
    with _explained(uri, f"finishing run {run_id}"):
        _client(uri).set_terminated(run_id, status="FAILED" if failed else "FINISHED")


# Curves


class MetricSpool:
    """Metrics on their way to a run: appended to a local file at once, delivered when MLflow is there.

    The file holds one JSON object a line and is the truth of what was measured; MLflow is the truth of what arrived: it
    is asked before the first delivery and after every failure. So each (metric, step) arrives exactly once, over
    outages, kill -9 of either side, and steps that a resumed training runs again. Writer and deliverer may be
    different processes: any process may `record`, one delivers.
    """

    def __init__(self, path: Path, *, uri: str, run_id: str) -> None:
        self.path, self.uri, self.run_id = path, uri, run_id
        self._offset = 0  # what of the file is delivered or was found delivered
        self._arrived: dict[str, set[int]] = {}
        self._lock = threading.Lock()

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step; takes microseconds and never waits for MLflow."""
        line = json.dumps({"step": step, "time": int(time.time() * 1000), "metrics": dict(metrics)})
        with self.path.open("a+b", buffering=0) as file:
            if file.seek(0, os.SEEK_END) and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                line = f"\n{line}"  # a process was killed in the middle of a line
            file.write(f"{line}\n".encode())

    def flush(self) -> int:
        """Deliver all that waits; returns how many metrics were sent. A ServiceError leaves the rest waiting."""
        sent = 0
        with self._lock:
            for metrics, offset in self._waiting():
                sent += self._deliver(metrics)
                self._offset = offset
        return sent

    @contextmanager
    def delivering(self, every_s: float = 5.0) -> Iterator[None]:
        """Deliver in the background while the block runs, and once more at its end; an outage is logged once."""
        stop = threading.Event()
        thread = threading.Thread(target=self._deliver_until, args=(stop, every_s), name="metric-spool", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _deliver_until(self, stop: threading.Event, every_s: float) -> None:
        away, pause, last = False, every_s, False
        while not last:
            last = stop.wait(pause)
            try:
                self.flush()
            except ServiceError as error:
                if not away:
                    _log.warning("%s; metrics wait in %s", error, self.path)
                away, pause = True, min(2 * pause, 60.0)
            else:
                if away:
                    _log.info("MLflow is back, the metrics that waited are delivered")
                away, pause = False, every_s

    def _waiting(self) -> Iterator[tuple[list["Metric"], int]]:
        """Batches of whole lines, each with the offset of its end in the file."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            batch: list[Metric] = []
            for line in file:
                if not line.endswith(b"\n"):
                    break  # still being written
                batch += _metrics_of(line, self.path)
                if len(batch) >= MAX_METRICS:
                    yield batch, file.tell()
                    batch = []
            else:
                line = b""
            yield batch, file.tell() - len(line)

    def _deliver(self, metrics: Sequence["Metric"]) -> int:
        with _explained(self.uri, f"delivering metrics to run {self.run_id}"):
            client = _client(self.uri)
            try:
                for key in {metric.key for metric in metrics} - self._arrived.keys():
                    self._arrived[key] = {metric.step for metric in client.get_metric_history(self.run_id, key)}
                fresh = {
                    (metric.key, metric.step): metric
                    for metric in reversed(metrics)  # of equal ones the first stays
                    if metric.step not in self._arrived[metric.key]
                }
                for chunk in _chunks(list(reversed(fresh.values())), MAX_METRICS):
                    client.log_batch(self.run_id, metrics=chunk, synchronous=True)
                    for metric in chunk:
                        self._arrived[metric.key].add(metric.step)
            except BaseException:
                self._arrived.clear()  # a call that failed may have arrived all the same
                raise
            return len(fresh)


def _metrics_of(line: bytes, path: Path) -> list["Metric"]:
    from mlflow.entities import Metric

    if not line.strip():
        return []
    try:
        entry = json.loads(line)
        step, at = int(entry["step"]), int(entry["time"])
        return [Metric(key, float(value), at, step) for key, value in entry["metrics"].items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        _log.warning("%s: skipped a torn line of %d bytes", path, len(line))
        return []


# Registered families


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One budget to register: the s3:// directory of its checkpoint, and what is known of it.

    In its tags and its description NUMBER stands for the version that MLflow gives it.
    """

    budget: str
    source: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """A version of a registered model as MLflow holds it; `metrics` are read from its tags."""

    name: str
    version: int
    source: str
    run_id: str
    description: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    aliases: tuple[str, ...]


def model_name(family: str, budget: str) -> str:
    """The registered model of a budget; ValueError for names that MLflow or S3 would read differently."""
    for name in (family, budget):
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name: a letter or digit, then letters, digits, '.', '_' or '-'")
    return f"{family}-{budget}"


def register_family(
    uri: str, *, family: str, version: str, manifest_uri: str, run_id: str, members: Sequence[Member]
) -> dict[str, ModelVersion]:
    """Make a version of every budget's model, all or none, and move the alias `candidate` to them; by budget.

    Versions carry the family's version as a tag, so that a repeated call finds what an earlier one made.
    """
    names = {member.budget: model_name(family, member.budget) for member in members}
    if not names or not NAME.fullmatch(version):
        raise ValueError(f"family {family!r} version {version!r} needs a plain version name and at least one budget")
    with _explained(uri, f"registering version {version!r} of family {family!r}"):
        client = _client(uri)
        before = {name: {int(entry.version) for entry in _tagged(client, name, version)} for name in names.values()}
        try:
            made = {
                member.budget: _register(client, names[member.budget], family, version, manifest_uri, run_id, member)
                for member in members
            }
        except BaseException:
            _unregister(client, version, before)
            raise
        candidates = [int(_aliases(client, entry.name).get(CANDIDATE, 0)) for entry in made.values()]
    # A late repetition must not take the alias back from a newer family.
    if any(candidate < entry.version for candidate, entry in zip(candidates, made.values(), strict=True)):
        set_alias(uri, CANDIDATE, {entry.name: entry.version for entry in made.values()})
    return made


def champion(uri: str, name: str) -> ModelVersion | None:
    """The version of a model that the alias `champion` points at, with its metrics; None if there is none."""
    return by_alias(uri, name, CHAMPION)


def by_alias(uri: str, name: str, alias: str) -> ModelVersion | None:
    with _explained(uri, f"looking up {name}@{alias}"):
        client = _client(uri)
        version = _aliases(client, name).get(alias)
        return None if version is None else _model_version(client.get_model_version(name, version))


def set_alias(uri: str, alias: str, versions: Mapping[str, int]) -> None:
    """Move an alias on several models (by name) together: where one cannot be moved, the moved ones go back."""
    with _explained(uri, f"moving alias {alias!r} of {', '.join(versions)}"):
        client = _client(uri)
        before = {name: _aliases(client, name).get(alias) for name in versions}
        try:
            for name, version in versions.items():
                client.set_registered_model_alias(name, alias, str(version))
        except BaseException:
            _put_back(client, alias, before)
            raise


def tag_versions(uri: str, models: Collection[str], tags: Mapping[str, str]) -> None:
    """Set tags on registered versions, each NAME:VERSION."""
    with _explained(uri, f"tagging {', '.join(models)}"):
        client = _client(uri)
        for model in models:
            name, version = model.rsplit(":", 1)
            for key, value in tags.items():
                client.set_model_version_tag(name, version, key, redact(value))


def pointed_to(uri: str) -> set[str]:
    """The URIs that any version of any registered model points to: of its directory and of its family's manifest."""
    found: set[str] = set()
    with _explained(uri, "listing all registered versions"):
        client, token = _client(uri), None
        while True:
            page = client.search_model_versions(max_results=VERSIONS_A_PAGE, page_token=token)
            for entry in page:
                found |= {entry.source, entry.tags.get(MANIFEST)} - {None}
            token = page.token
            if not token:
                return found


def resolve(uri: str, reference: str) -> ModelVersion:
    """The registered version that NAME, NAME@ALIAS or NAME:VERSION means; NAME alone is its champion.

    Its tags MANIFEST and BUDGET say what `artifacts.fetch` needs.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise ValueError(f"{reference!r} is not a model; write NAME, NAME@ALIAS or NAME:VERSION")
    name = match["name"]
    with _explained(uri, f"looking up {reference}"):
        client = _client(uri)
        aliases = _aliases(client, name)
        number = match["version"] or aliases.get(match["alias"] or CHAMPION)
        if number is None:
            known = f"the aliases of {name!r} are {', '.join(sorted(aliases))}" if aliases else f"it has no {name!r}"
            raise ServiceError(f"{reference} is not in MLflow: {known}")
        found = _model_version(client.get_model_version(name, str(number)))
    if not {MANIFEST, BUDGET} <= found.tags.keys():
        raise ServiceError(f"{name} version {number} was not registered by elastic: its tag {MANIFEST} is missing")
    return found


def _register(
    client: "MlflowClient", name: str, family: str, version: str, manifest_uri: str, run_id: str, member: Member
) -> ModelVersion:
    found = _tagged(client, name, version)
    if not found:
        _ensure_model(client, name, f"Budget {member.budget} of the elastic family {family}.")
        identity = {FAMILY: family, VERSION: version, BUDGET: member.budget, MANIFEST: manifest_uri}
        metrics = {f"{METRIC_PREFIX}{key}": repr(float(value)) for key, value in member.metrics.items()}
        client.create_model_version(
            name,
            member.source,
            run_id=run_id,
            tags={**member.tags, **metrics, **identity},
            description=member.description,
            await_creation_for=0,
        )
        found = _tagged(client, name, version)
    _fill_in_number(client, found[0])
    for twin in found[1:]:  # a create whose answer was lost is sent again
        _delete_version(client, name, str(twin.version))
    entry = _model_version(client.get_model_version(name, str(found[0].version)))
    if (entry.source, entry.tags[MANIFEST]) != (member.source, manifest_uri):
        raise ServiceError(f"{name} has a version {version!r} with other files, {entry.source}: use a new version")
    return entry


def _fill_in_number(client: "MlflowClient", entry: Any) -> None:
    """Write its number into the texts of a new version; where that is done already, nothing changes."""
    number = str(entry.version)
    for key, value in entry.tags.items():
        if NUMBER in value:
            client.set_model_version_tag(entry.name, number, key, value.replace(NUMBER, number))
    if NUMBER in (entry.description or ""):
        client.update_model_version(entry.name, number, entry.description.replace(NUMBER, number))


def _unregister(client: "MlflowClient", version: str, before: Mapping[str, set[int]]) -> None:
    """Take back what a failed registration made, by name; what MLflow cannot do now, the next attempt completes."""
    from mlflow.exceptions import MlflowException

    for name, kept in before.items():
        try:
            for entry in _tagged(client, name, version):
                if int(entry.version) not in kept:
                    _delete_version(client, name, str(entry.version))
            if not client.search_model_versions(f"name = '{name}'", max_results=1):
                client.delete_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                _log.warning("%s keeps a version of a failed registration: %s", name, _first_line(error))


def _delete_version(client: "MlflowClient", name: str, version: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.delete_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # as the second answer says where the first was lost
            raise


def _put_back(client: "MlflowClient", alias: str, before: Mapping[str, str | None]) -> None:
    from mlflow.exceptions import MlflowException

    for name, version in before.items():
        try:
            if version is None:
                client.delete_registered_model_alias(name, alias)
            else:
                client.set_registered_model_alias(name, alias, version)
        except MlflowException as error:
            _log.warning("alias %s of %s could not be put back: %s", alias, name, _first_line(error))


def _ensure_model(client: "MlflowClient", name: str, description: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _tagged(client: "MlflowClient", name: str, version: str) -> list[Any]:
    """The versions of a model that carry the family's version, oldest first."""
    query = f"name = '{name}' AND tags.`{VERSION}` = '{version}'"
    return sorted(client.search_model_versions(query), key=lambda entry: int(entry.version))


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def _model_version(entry: Any) -> ModelVersion:
    metrics = {
        key.removeprefix(METRIC_PREFIX): float(value)
        for key, value in entry.tags.items()
        if key.startswith(METRIC_PREFIX)
    }
    return ModelVersion(
        name=entry.name,
        version=int(entry.version),
        source=entry.source,
        run_id=entry.run_id or "",
        description=entry.description or "",
        tags=dict(entry.tags),
        metrics=metrics,
        aliases=tuple(entry.aliases),
    )


# Shared


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _first_line(error: BaseException) -> str:
    said = str(error).partition("[SQL:")[0]  # SQLAlchemy goes on with the statement
    return redact(" ".join(said.split())[:300])


def _unreachable(uri: str) -> ServiceError:
    return ServiceError(f"MLflow at {redact(uri)} does not answer; check MLFLOW_TRACKING_URI", transient=True)


@contextmanager
def _explained(uri: str, doing: str) -> Iterator[None]:
    """Turn what MLflow, its database or its file store raises into ServiceErrors of one line."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:
        raise ServiceError(
            f"MLflow at {redact(uri)}, {doing}: {_first_line(error)}", transient=_is_passing(error)
        ) from error


def _is_passing(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    from tasks.artifacts import explain

    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())
        return status in (409, 429) or (status >= 500 and status != 501)
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return explain(error, "").transient  # MLflow lets errors of the file store through
