"""Runs in MLflow: one per run key, their parameters, single metrics, tags, files and pages."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_core.schema import NAME
from tasks.settings import ServiceError, redact
from tasks.tracking.connection import chunks, client_of, explained, is_server, page_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY = "elastic.run_key"
NOTE = "mlflow.note.content"  # MLflow's own: what the run's page shows as its description
MAX_PARAMS, MAX_PARAM_LENGTH = 100, 6000  # MLflow's limits on one call and one value

_SECRET_KEY = re.compile(
    r"(?i)(?:^|[._-])(?:password|passwd|secret|credentials?|(?:api|access|auth|secret|hf)[_-]?(?:key|token))$"
)


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
    with explained(uri, f"opening run {run_name!r}"):
        client = client_of(uri)
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


def rename_run(uri: str, run_id: str, name: str) -> None:
    with explained(uri, f"renaming run {run_id}"):
        client_of(uri).update_run(run_id, name=name)


def tags_of_finished(uri: str, experiment: str, run_key: str) -> dict[str, str] | None:
    """The tags of the run with this key, where it has come to a good end; else None."""
    with explained(uri, f"looking for run {run_key!r}"):
        client = client_of(uri)
        found = client.get_experiment_by_name(experiment)
        query = f"tags.`{RUN_KEY}` = '{run_key}' AND attributes.status = 'FINISHED'"
        runs = client.search_runs([found.experiment_id], query, max_results=1) if found is not None else []
        return dict(runs[0].data.tags) if runs else None


def run_url(uri: str, run_id: str) -> str | None:
    """The run's page; None where MLflow is a database with no server."""
    if not is_server(uri):
        return None
    with explained(uri, f"looking for run {run_id}"):
        experiment = client_of(uri).get_run(run_id).info.experiment_id
    return page_of(uri, f"experiments/{experiment}/runs/{run_id}")


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

    with explained(uri, f"logging parameters to run {run_id}"):
        flat = [Param(key, value) for key, value in flatten(params).items()]
        for chunk in chunks(flat, MAX_PARAMS):
            client_of(uri).log_batch(run_id, params=chunk, synchronous=True)


def params_of(uri: str, run_id: str) -> dict[str, str]:
    """The parameters of a run, as `log_params` logged them."""
    with explained(uri, f"reading run {run_id}"):
        return dict(client_of(uri).get_run(run_id).data.params)


def log_metrics(uri: str, run_id: str, metrics: Mapping[str, float]) -> None:
    """Log single values to the run; the same ones again change nothing."""
    from mlflow.entities import Metric

    with explained(uri, f"logging metrics to run {run_id}"):
        values = [Metric(key, value, int(time.time() * 1000), 0) for key, value in metrics.items()]
        client_of(uri).log_batch(run_id, metrics=values, synchronous=True)


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    with explained(uri, f"tagging run {run_id}"):
        _set_tags(client_of(uri), run_id, tags)


def _set_tags(client: "MlflowClient", run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    for chunk in chunks([RunTag(key, redact(value)) for key, value in tags.items()], MAX_PARAMS):
        client.log_batch(run_id, tags=chunk, synchronous=True)


def log_files(uri: str, run_id: str, directory: Path, artifact_path: str) -> None:
    """Upload a directory of report files (HTML, Markdown, images) below the run's artifacts."""
    with explained(uri, f"uploading {directory} to run {run_id}"):
        client_of(uri).log_artifacts(run_id, str(directory), artifact_path)


def finish_run(uri: str, run_id: str, *, failed: bool = False) -> None:
    with explained(uri, f"finishing run {run_id}"):
        client_of(uri).set_terminated(run_id, status="FAILED" if failed else "FINISHED")
