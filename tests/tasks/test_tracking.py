"""Laws of runs, curves and registered families, against a real MLflow store and a real S3 server."""

import base64
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest
from answers import Answer, answering
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from tasks import tracking
from tasks.artifacts import Store, manifest_uri, publish, version_uri
from tasks.settings import ServiceError, Settings, is_transient
from tasks.tracking import (
    BUDGET,
    MANIFEST,
    Member,
    MetricSpool,
    by_alias,
    champion,
    check_server,
    connection,
    finish_run,
    flatten,
    log_files,
    log_params,
    open_run,
    register_family,
    registry,
    resolve,
    runs,
    set_alias,
    set_tags,
)

BUDGETS = ("l", "m", "s")


@pytest.fixture
def family() -> str:
    return f"nano{uuid.uuid4().hex[:10]}"


@pytest.fixture
def client(tracking_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


@pytest.fixture
def run_id(tracking_uri: str, family: str) -> str:
    return open_run(tracking_uri, experiment=family, run_key="a", run_name="a", artifact_root="s3://unused/mlflow")


class Faulty:
    """A client of which one method does something else."""

    def __init__(self, client: MlflowClient, method: str, instead: Callable[..., Any]) -> None:
        self._client, self._method, self._instead = client, method, instead

    def __getattr__(self, name: str) -> Any:
        return self._instead if name == self._method else getattr(self._client, name)


@contextmanager
def faulty(client: MlflowClient, method: str, instead: Callable[..., Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow, "MlflowClient", lambda **_: Faulty(client, method, instead))
        yield


def lost(*_: Any, **__: Any) -> None:
    raise MlflowException("API request to http://u:hunter2@mlflow failed: connection refused\nand more")


# Connection


def test_importing_the_module_imports_no_mlflow() -> None:
    code = "import sys, tasks.tracking; sys.exit(bool({'mlflow', 'boto3', 'prefect'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_database_passes_the_check(tracking_uri: str) -> None:
    check_server(tracking_uri)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "postgresql", "mysql+pymysql"])
def test_a_server_that_is_down_is_one_line_without_the_password(scheme: str) -> None:
    uri = f"{scheme}://user:hunter2@127.0.0.1:{closed_port()}"
    with pytest.raises(ServiceError, match="does not answer; check MLFLOW_TRACKING_URI") as caught:
        check_server(uri)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    assert is_transient(caught.value)


def test_a_server_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CHECK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServiceError, match="does not answer"):
        check_server(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="cannot be opened"):
        check_server(f"sqlite:///{tmp_path}/file/mlflow.db")
    (tmp_path / "mlflow.db").write_bytes(b"no database at all, but rather long " * 100)
    with pytest.raises(ServiceError, match="not a database"):
        check_server(f"sqlite:///{tmp_path}/mlflow.db")


def guarded(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    """An MLflow behind a login: nobody is 401, one who may not is 403."""
    given = headers.get("Authorization", "")
    if given == f"Basic {base64.b64encode(b'ana:hunter2').decode()}":
        return 200, b'{"experiments": []}', {"Content-Type": "application/json"}
    return (403 if given else 401), b"You are not authenticated. Please see the documentation", {}


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {},
            r"it wants a login \(401\); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW",
        ),
        (
            {"MLFLOW_TRACKING_USERNAME": "bob", "MLFLOW_TRACKING_PASSWORD": "x"},
            r"this login may not do that \(403\); ask for the permission, or use another login",
        ),
    ],
    ids=["nobody", "another"],
)
def test_a_registry_that_wants_a_login_says_so_in_one_line_and_is_asked_once(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with answering(guarded) as url, pytest.raises(ServiceError, match=says) as caught:
        check_server(url)
    assert "\n" not in str(caught.value) and not is_transient(caught.value)


def test_a_registry_lets_in_whom_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ana")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    with answering(guarded) as url:
        check_server(url)


def test_a_page_where_mlflow_should_be_is_told_from_it() -> None:
    page = (200, b"<html>Sign in</html>", {"Content-Type": "text/html"})
    with (
        answering(lambda *_: page) as url,
        pytest.raises(ServiceError, match="some page, perhaps of a login") as caught,
    ):
        check_server(url)
    assert "\n" not in str(caught.value) and not is_transient(caught.value)


def test_a_proxy_that_is_away_is_named_and_not_asked_for_hosts_of_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = f"http://user:hunter2@127.0.0.1:{closed_port()}"
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.setenv("no_proxy", "")
    with answering(lambda *_: (200, b'{"experiments": []}', {})) as url:
        with pytest.raises(ServiceError, match="and the proxy in between, http://\\*") as caught:
            check_server(url)
        assert "hunter2" not in str(caught.value) and is_transient(caught.value)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        check_server(url)


# Runs


def test_a_run_is_found_again_by_its_key_and_runs_again(tracking_uri: str, family: str, client: MlflowClient) -> None:
    def start(key: str, **tags: str) -> str:
        return open_run(tracking_uri, experiment=family, run_key=key, run_name="tiny", tags=tags)

    first = start("1f2e", recipe="tiny")
    finish_run(tracking_uri, first, failed=True)
    assert client.get_run(first).info.status == "FAILED"
    assert start("1f2e", attempt="2") == first
    run = client.get_run(first)
    assert run.info.status == "RUNNING" and run.info.run_name == "tiny"
    assert (run.data.tags["recipe"], run.data.tags["attempt"]) == ("tiny", "2")
    assert start("other") != first
    finish_run(tracking_uri, first)
    assert client.get_run(first).info.status == "FINISHED"


def test_a_run_whose_creation_was_answered_by_nobody_is_not_made_twice(
    tracking_uri: str, family: str, client: MlflowClient
) -> None:
    def create_and_lose(*args: Any, **kwargs: Any) -> None:
        client.create_run(*args, **kwargs)
        lost()

    with faulty(client, "create_run", create_and_lose), pytest.raises(ServiceError, match="opening run") as caught:
        open_run(tracking_uri, experiment=family, run_key="k", run_name="n")
    assert is_transient(caught.value)
    run = open_run(tracking_uri, experiment=family, run_key="k", run_name="n")
    experiment = client.get_experiment_by_name(family)
    assert [found.info.run_id for found in client.search_runs([experiment.experiment_id])] == [run]


def test_a_deleted_experiment_is_named(tracking_uri: str, family: str, client: MlflowClient, run_id: str) -> None:
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(ServiceError, match="is deleted; restore it"):
        open_run(tracking_uri, experiment=family, run_key="a", run_name="a")


def test_a_recipe_is_flat_cut_and_without_secrets() -> None:
    recipe = {
        "stage1": {"steps": 100, "budgets": ["l", "s"], "lr": 1e-3},
        "name": "tiny",
        "none": None,
        "eos_token": "</s>",
        "hub": {"hf_token": "hunter2", "api-key": "hunter2"},
        "data": "https://user:hunter2@host/x?X-Amz-Signature=hunter2",
        "nested": [{"url": "http://user:hunter2@host"}],
        "long": "x" * 10_000,
    }
    flat = flatten(recipe)
    assert flat["stage1.steps"] == "100" and flat["stage1.lr"] == "0.001" and flat["stage1.budgets"] == '["l", "s"]'
    assert (flat["name"], flat["none"], flat["eos_token"]) == ("tiny", "null", "</s>")
    assert len(flat["long"]) == runs.MAX_PARAM_LENGTH and flat["long"].endswith("...")
    assert "hunter2" not in repr(flat)


def test_parameters_may_be_logged_again_but_not_changed(tracking_uri: str, run_id: str, client: MlflowClient) -> None:
    many = {"layer": {str(n): n for n in range(250)}}
    log_params(tracking_uri, run_id, many)
    log_params(tracking_uri, run_id, many)
    assert client.get_run(run_id).data.params == {f"layer.{n}": str(n) for n in range(250)}
    with pytest.raises(ServiceError, match="already logged") as caught:
        log_params(tracking_uri, run_id, {"layer": {"0": 1}})
    assert not is_transient(caught.value)


def test_tags_hold_no_secrets(tracking_uri: str, run_id: str, client: MlflowClient) -> None:
    set_tags(tracking_uri, run_id, {"source": "s3://bucket/x", "server": "http://user:hunter2@host"})
    tags = client.get_run(run_id).data.tags
    assert (tags["source"], tags["server"]) == ("s3://bucket/x", "http://***@host")


def test_report_files_go_to_the_object_store(settings: Settings, family: str, tmp_path: Path) -> None:
    uri = settings.tracking_uri
    root = f"s3://{settings.bucket}/mlflow/{family}"
    run = open_run(uri, experiment=family, run_key="r", run_name="r", artifact_root=root)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("<h1>")
    log_files(uri, run, tmp_path / "report", "report")
    got = mlflow.artifacts.download_artifacts(f"runs:/{run}/report", tracking_uri=uri, dst_path=str(tmp_path / "got"))
    assert (Path(got) / "report.html").read_text() == "<h1>"


@pytest.mark.parametrize("away", [True, False], ids=["away", "no-bucket"])
def test_report_files_that_do_not_arrive_are_one_line(
    settings: Settings, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    if away:
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    uri, root = settings.tracking_uri, "s3://no-such-bucket/x"
    run = open_run(uri, experiment=family, run_key="r", run_name="r", artifact_root=root)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "a").write_text("")
    with pytest.raises(ServiceError, match=r"uploading .*report to run") as caught:
        log_files(uri, run, tmp_path / "report", "report")
    assert "\n" not in str(caught.value)
    assert is_transient(caught.value) == away


# Curves


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))


@pytest.fixture
def spool(tmp_path: Path, tracking_uri: str, run_id: str) -> MetricSpool:
    return MetricSpool(tmp_path / "metrics.jsonl", uri=tracking_uri, run_id=run_id)


def again(spool: MetricSpool) -> MetricSpool:
    """The same spool in a process that starts anew."""
    return MetricSpool(spool.path, uri=spool.uri, run_id=spool.run_id)


@contextmanager
def batches(client: MlflowClient) -> Iterator[list[int]]:
    """How many metrics each call brought."""
    sizes: list[int] = []

    def count(run_id: str, metrics: list[Metric], **options: Any) -> None:
        sizes.append(len(metrics))
        client.log_batch(run_id, metrics, **options)

    with faulty(client, "log_batch", count):
        yield sizes


def test_every_metric_arrives_once_in_few_calls(spool: MetricSpool, client: MlflowClient) -> None:
    for step in range(1, 501):
        spool.record(step, {f"loss/{budget}": step / 7 for budget in (*BUDGETS, "kl", "lr")})
    with batches(client) as sizes:
        assert spool.flush() == 2500
        assert spool.flush() == 0
    assert again(spool).flush() == 0
    assert sizes == [1000, 1000, 500]
    assert history(client, spool.run_id, "loss/s") == [(step, step / 7) for step in range(1, 501)]


def test_no_call_is_made_for_a_few_metrics_of_a_step(spool: MetricSpool, client: MlflowClient) -> None:
    for step in range(1, 101):
        spool.record(step, {f"choices/{n}": float(step) for n in range(29)})
    with batches(client) as sizes:
        assert spool.flush() == 2900
    assert again(spool).flush() == 0
    assert sizes == [34 * 29, 34 * 29, 32 * 29]


def test_more_metrics_in_one_step_than_a_call_takes(spool: MetricSpool, client: MlflowClient) -> None:
    spool.record(1, {f"layer{n}": 1.0 for n in range(1001)})
    with batches(client) as sizes:
        assert spool.flush() == 1001
    assert sizes == [1000, 1]


def test_what_is_no_number_arrives_too(spool: MetricSpool, client: MlflowClient) -> None:
    spool.record(1, {"loss": math.nan, "norm": math.inf})
    assert spool.flush() == 2
    assert again(spool).flush() == 0
    assert math.isnan(client.get_metric_history(spool.run_id, "loss")[0].value)


def test_an_outage_delays_metrics_and_loses_none(spool: MetricSpool, client: MlflowClient) -> None:
    spool.record(1, {"loss": 1.0})
    assert spool.flush() == 1
    for method in ("log_batch", "get_metric_history"):
        with faulty(client, method, lost):
            spool.record(2, {"loss": 0.5, method: 1.0})
            with pytest.raises(ServiceError, match="delivering metrics") as caught:
                spool.flush()
            assert is_transient(caught.value)
            assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    spool.record(3, {"loss": 0.25})
    spool.flush()
    assert history(client, spool.run_id, "loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]


@pytest.mark.parametrize("arrived", [0, 1, 3])
@pytest.mark.parametrize("restart", [False, True])
def test_a_delivery_that_failed_half_way_is_not_repeated(
    spool: MetricSpool, client: MlflowClient, arrived: int, restart: bool
) -> None:
    def half(run_id: str, metrics: list[Metric], **options: Any) -> None:
        client.log_batch(run_id, metrics[:arrived], **options)
        lost()

    for step in (1, 2, 3):
        spool.record(step, {"loss": float(step)})
    with faulty(client, "log_batch", half), pytest.raises(ServiceError):
        spool.flush()
    assert (again(spool) if restart else spool).flush() == 3 - arrived
    assert history(client, spool.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("delivered_before", [False, True])
def test_steps_that_a_resumed_training_runs_again_appear_once(
    spool: MetricSpool, client: MlflowClient, delivered_before: bool
) -> None:
    for step in range(1, 6):
        spool.record(step, {"loss": 1.0 / step, "tokens_per_second": 10.0})
    if delivered_before:
        spool.flush()
    resumed = again(spool)
    for step in range(3, 8):
        resumed.record(step, {"loss": 1.0 / step, "tokens_per_second": 20.0})
    resumed.flush()
    assert history(client, spool.run_id, "loss") == [(step, 1.0 / step) for step in range(1, 8)]
    speeds = history(client, spool.run_id, "tokens_per_second")
    assert speeds == [(step, 10.0 if step < 6 else 20.0) for step in range(1, 8)]  # what was measured first


def test_steps_appear_once_even_when_the_spool_was_lost(spool: MetricSpool, client: MlflowClient) -> None:
    spool.record(1, {"loss": 1.0})
    spool.flush()
    spool.path.unlink()
    resumed = again(spool)
    for step in (1, 2):
        resumed.record(step, {"loss": 1.0})
    assert resumed.flush() == 1
    assert history(client, spool.run_id, "loss") == [(1, 1.0), (2, 1.0)]


def test_a_torn_line_costs_only_itself(
    spool: MetricSpool, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    spool.record(1, {"loss": 1.0})
    with spool.path.open("ab") as file:
        file.write(b'{"step": 2, "time": 17, "metr')
    assert spool.flush() == 1  # the rest may still be coming
    spool.record(2, {"loss": 0.5})
    assert spool.flush() == 1
    assert history(client, spool.run_id, "loss") == [(1, 1.0), (2, 0.5)]
    assert "torn line" in caplog.text


def test_a_line_that_is_being_written_is_waited_for(spool: MetricSpool, client: MlflowClient) -> None:
    line = json.dumps({"step": 1, "time": 17, "metrics": {"loss": 1.0}})
    for piece, sent in ((line[:20], 0), (line[20:], 0), ("\n", 1)):
        with spool.path.open("a") as file:
            file.write(piece)
        assert spool.flush() == sent


def test_an_empty_spool_has_nothing_to_deliver(spool: MetricSpool) -> None:
    assert spool.flush() == 0


def test_metrics_are_delivered_while_the_block_runs_and_at_its_end(spool: MetricSpool, client: MlflowClient) -> None:
    with spool.delivering(every_s=0.01):
        spool.record(1, {"loss": 1.0})
        while not history(client, spool.run_id, "loss"):
            time.sleep(0.01)
        spool.record(2, {"loss": 0.5})
    assert history(client, spool.run_id, "loss") == [(1, 1.0), (2, 0.5)]


def test_an_outage_is_logged_once_and_does_not_reach_the_training(
    spool: MetricSpool, client: MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    calls: Counter[str] = Counter()

    def count_and_lose(*_: Any, **__: Any) -> None:
        calls["log_batch"] += 1
        lost()

    caplog.set_level(logging.INFO, "tasks.tracking")
    with spool.delivering(every_s=0.001), faulty(client, "log_batch", count_and_lose):
        spool.record(1, {"loss": 1.0})
        while calls["log_batch"] < 3:
            time.sleep(0.01)
    messages = [record.message for record in caplog.records if record.name == "tasks.tracking.curves"]
    assert len([message for message in messages if "metrics wait in" in message]) == 1
    assert len([message for message in messages if "is back" in message]) == 1
    assert history(client, spool.run_id, "loss") == [(1, 1.0)]


def test_a_writer_killed_at_any_moment_loses_and_doubles_nothing(spool: MetricSpool, client: MlflowClient) -> None:
    code = """
import sys, tasks.tracking as t
from pathlib import Path
spool = t.MetricSpool(Path(sys.argv[1]), uri="", run_id="")
for step in range(int(sys.argv[2]), 1_000_000):
    spool.record(step, {"loss": float(step), "noise/" + "x" * 200: 1.0})
    print(step, flush=True)
"""
    last = 0
    for _ in range(3):
        resume_at = max(1, last - 5)
        writer = subprocess.Popen(
            [sys.executable, "-c", code, str(spool.path), str(resume_at)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
        )
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) >= last + 50:
                break
        writer.kill()
        said = writer.communicate()[0].split()
        last = int(said[-1]) if said else last + 50
    spool.flush()
    got = history(client, spool.run_id, "loss")
    assert [step for step, _ in got[:last]] == list(range(1, last + 1))
    assert all(value == step for step, value in got)
    assert len({step for step, _ in got}) == len(got)


# Registered families


def members(family: str, version: str = "1", bucket: str = "b", **metrics: float) -> list[Member]:
    return [
        Member(
            budget=budget,
            source=f"{version_uri(bucket, family, version)}/{budget}",
            metrics={"cross_entropy": 1 / 3 + n, **metrics},
            tags={"elastic.params": str(1000 - n), "elastic.digest": f"{n}" * 64, "pull": f"x:{tracking.NUMBER}"},
            description=f"Budget {budget}, {tracking.NUMBER}",
        )
        for n, budget in enumerate(BUDGETS)
    ]


def register(uri: str, family: str, version: str = "1", **options: Any) -> dict[str, tracking.ModelVersion]:
    return register_family(
        uri,
        family=family,
        version=version,
        manifest_uri=manifest_uri("b", family, version),
        run_id=options.pop("run_id", "0" * 32),
        registration=options.pop("registration", ""),
        members=members(family, version, **options),
    )


def registered(client: MlflowClient, family: str) -> dict[str, list[int]]:
    """The versions of every model of the family, empty models too."""
    return {
        model.name: sorted(int(v.version) for v in client.search_model_versions(f"name = '{model.name}'"))
        for model in client.search_registered_models(f"name LIKE '{family}%'")
    }


def test_a_stock_client_downloads_a_flat_checkpoint(
    store: Store, settings: Settings, family: str, tmp_path: Path
) -> None:
    uri = settings.tracking_uri
    for budget in BUDGETS:
        (tmp_path / "in" / budget).mkdir(parents=True)
        (tmp_path / "in" / budget / "config.json").write_text(f'{{"budget": "{budget}"}}')
        (tmp_path / "in" / budget / "model.safetensors").write_bytes(os.urandom(1000))
    parts = {budget: tmp_path / "in" / budget for budget in BUDGETS}
    publish(store, family=family, version="1", directories=parts, metadata={})
    made = register(uri, family, bucket=store.bucket)
    set_alias(uri, "champion", {entry.name: entry.version for entry in made.values()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        for budget in BUDGETS:
            got = mlflow.artifacts.download_artifacts(
                f"models:/{family}-{budget}@champion", dst_path=str(tmp_path / "out" / budget), tracking_uri=uri
            )
            assert {p.name: p.read_bytes() for p in Path(got).iterdir()} == {
                p.name: p.read_bytes() for p in parts[budget].iterdir()
            }


def test_a_registered_family_carries_what_is_known_of_it(
    tracking_uri: str, family: str, run_id: str, client: MlflowClient
) -> None:
    made = register(tracking_uri, family, run_id=run_id, accuracy=0.1 + 0.2)
    assert list(made) == list(BUDGETS)
    entry = by_alias(tracking_uri, f"{family}-m", "candidate")
    assert entry is not None
    assert (entry.name, entry.version, entry.run_id) == (f"{family}-m", made["m"].version, run_id)
    assert entry.source == f"s3://b/families/{family}/1/m"
    assert entry.metrics == {"cross_entropy": 1 / 3 + 1, "accuracy": 0.1 + 0.2}
    assert entry.tags["elastic.params"] == "999"
    assert (entry.tags[MANIFEST], entry.tags[BUDGET]) == (f"s3://b/families/{family}/1/manifest.json", "m")
    assert entry.description == "Budget m, 1"
    assert champion(tracking_uri, f"{family}-m") is None
    assert champion(tracking_uri, f"{family}-none") is None
    assert client.get_model_version(f"{family}-m", "1").status == "READY"


def test_what_every_registered_version_points_to_is_known_over_pages(
    tracking_uri: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "VERSIONS_A_PAGE", 2)
    for version in ("1", "2"):
        made = register(tracking_uri, family, version)
        assert {entry.tags["pull"] for entry in made.values()} == {f"x:{version}"}
    mine = {uri for uri in tracking.pointed_to(tracking_uri) if f"/{family}/" in uri}
    roots = [f"s3://b/families/{family}/{version}" for version in ("1", "2")]
    assert mine == {f"{root}/{name}" for root in roots for name in (*BUDGETS, "manifest.json")}


def test_another_registration_of_the_same_version_makes_new_models_that_point_to_the_same_objects(
    tracking_uri: str, family: str, client: MlflowClient
) -> None:
    """The objects are needed until neither points to them."""
    first = register(tracking_uri, family, registration="first")
    second = register(tracking_uri, family, registration="second", perplexity=3.0)
    again = register(tracking_uri, family, registration="first")
    assert {b: e.version for b, e in again.items()} == {b: e.version for b, e in first.items()}
    assert registered(client, family) == {f"{family}-{budget}": [1, 2] for budget in BUDGETS}
    assert [e.source for e in second.values()] == [e.source for e in first.values()]
    assert second["s"].metrics["perplexity"] == 3.0 and "perplexity" not in first["s"].metrics
    assert by_alias(tracking_uri, f"{family}-s", "candidate").version == 2
    models = [f"{family}-{budget}:2" for budget in BUDGETS]
    assert tracking.are_registered(tracking_uri, models, "second")
    assert not tracking.are_registered(tracking_uri, models, "first")
    for number in ("1", "2"):
        assert first["s"].source in tracking.pointed_to(tracking_uri)
        client.delete_model_version(f"{family}-s", number)
    assert first["s"].source not in tracking.pointed_to(tracking_uri)


def test_a_registry_is_the_same_one_by_any_uri_and_another_one_is_not(tracking_uri: str, tmp_path: Path) -> None:
    path = tracking_uri.removeprefix("sqlite:///")
    assert tracking.identity(f"sqlite:///{Path(path).parent}/../{Path(path).parent.name}/mlflow.db") == (
        mine := tracking.identity(tracking_uri)
    )
    assert tracking.identity(f"sqlite:///{tmp_path}/mlflow.db") != mine


def test_registering_again_makes_nothing_new(tracking_uri: str, family: str, client: MlflowClient) -> None:
    first = register(tracking_uri, family)
    again = register(tracking_uri, family)
    assert {b: e.version for b, e in again.items()} == {b: e.version for b, e in first.items()}
    assert registered(client, family) == {f"{family}-{budget}": [1] for budget in BUDGETS}


def test_a_version_that_was_made_twice_by_a_resent_call_stays_once(
    tracking_uri: str, family: str, client: MlflowClient
) -> None:
    def twice(*args: Any, **kwargs: Any) -> Any:
        client.create_model_version(*args, **kwargs)
        return client.create_model_version(*args, **kwargs)

    with faulty(client, "create_model_version", twice):
        register(tracking_uri, family)
    assert registered(client, family) == {f"{family}-{budget}": [1] for budget in BUDGETS}


def test_a_second_version_becomes_the_candidate_and_stays_it(tracking_uri: str, family: str) -> None:
    register(tracking_uri, family, "1")
    second = register(tracking_uri, family, "2")
    register(tracking_uri, family, "1")  # a late repetition
    for budget in BUDGETS:
        entry = by_alias(tracking_uri, f"{family}-{budget}", "candidate")
        assert entry is not None and entry.version == second[budget].version == 2


@pytest.mark.parametrize("method", ["create_registered_model", "create_model_version"])
@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer-lost"])
@pytest.mark.parametrize("earlier", [(), ("0",)], ids=["first", "second"])
def test_a_family_is_registered_whole_or_not_at_all(
    tracking_uri: str, family: str, client: MlflowClient, method: str, after: bool, earlier: tuple[str, ...]
) -> None:
    for version in earlier:
        register(tracking_uri, family, version)
    before = registered(client, family)
    candidates = {budget: by_alias(tracking_uri, f"{family}-{budget}", "candidate") for budget in BUDGETS}
    calls: Counter[str] = Counter()

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        calls[method] += 1
        if calls[method] != 2:
            return getattr(client, method)(*args, **kwargs)
        if after:
            with suppress(MlflowException):  # the model may exist
                getattr(client, method)(*args, **kwargs)
        return lost()

    with faulty(client, method, second_fails), pytest.raises(ServiceError, match="registering version"):
        register(tracking_uri, family, "1")
    assert registered(client, family) == before
    assert {b: by_alias(tracking_uri, f"{family}-{b}", "candidate") for b in BUDGETS} == candidates
    made = register(tracking_uri, family, "1")
    assert [by_alias(tracking_uri, e.name, "candidate") for e in made.values()].count(None) == 0
    assert [len(versions) for versions in registered(client, family).values()] == [1 + len(earlier)] * 3


def test_a_failed_repetition_takes_nothing_back(tracking_uri: str, family: str, client: MlflowClient) -> None:
    register(tracking_uri, family)
    before = registered(client, family)
    calls: Counter[str] = Counter()

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        calls["search"] += 1
        return lost() if calls["search"] == 5 else client.search_model_versions(*args, **kwargs)

    with faulty(client, "search_model_versions", second_fails), pytest.raises(ServiceError):
        register(tracking_uri, family)
    assert registered(client, family) == before


def test_a_registration_that_was_killed_half_way_is_completed(
    tracking_uri: str, family: str, client: MlflowClient
) -> None:
    whole = register(tracking_uri, family)
    client.delete_model_version(f"{family}-m", "1")
    client.delete_model_version(f"{family}-s", "1")
    made = register(tracking_uri, family)
    assert made["l"].version == whole["l"].version
    assert [len(versions) for versions in registered(client, family).values()] == [1, 1, 1]
    assert all(by_alias(tracking_uri, e.name, "candidate") is not None for e in made.values())


def test_the_same_version_with_other_files_is_refused(tracking_uri: str, family: str, client: MlflowClient) -> None:
    register(tracking_uri, family)
    with pytest.raises(ServiceError, match="with other files"):
        register(tracking_uri, family, bucket="other")
    assert registered(client, family) == {f"{family}-{budget}": [1] for budget in BUDGETS}


def test_an_alias_moves_on_all_models_or_on_none(tracking_uri: str, family: str, client: MlflowClient) -> None:
    first, second = register(tracking_uri, family, "1"), register(tracking_uri, family, "2")
    names = {budget: f"{family}-{budget}" for budget in BUDGETS}
    calls: Counter[str] = Counter()

    def third_fails(*args: Any) -> Any:
        calls["alias"] += 1
        return lost() if calls["alias"] == 3 else client.set_registered_model_alias(*args)

    def champions() -> list[int | None]:
        found = [champion(tracking_uri, name) for name in names.values()]
        return [entry and entry.version for entry in found]

    for target, before in ((first, [None] * 3), (second, [1, 1, 1])):
        calls.clear()
        versions = {names[budget]: target[budget].version for budget in BUDGETS}
        with (
            faulty(client, "set_registered_model_alias", third_fails),
            pytest.raises(ServiceError, match="moving alias"),
        ):
            set_alias(tracking_uri, "champion", versions)
        assert champions() == before
        set_alias(tracking_uri, "champion", versions)
        assert champions() == list(versions.values())


def test_a_reference_means_a_version(tracking_uri: str, family: str) -> None:
    register(tracking_uri, family, "1")
    register(tracking_uri, family, "2")
    set_alias(tracking_uri, "champion", {f"{family}-s": 1})
    found = {
        ref: resolve(tracking_uri, f"{family}-s{ref}").version for ref in ("", "@champion", "@candidate", ":1", ":2")
    }
    assert found == {"": 1, "@champion": 1, "@candidate": 2, ":1": 1, ":2": 2}
    assert resolve(tracking_uri, f"{family}-s").tags[MANIFEST] == f"s3://b/families/{family}/1/manifest.json"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("{family}-l", "is not in MLflow: the aliases of .* are candidate"),
        ("{family}-l@best", "@best is not in MLflow"),
        ("{family}-l:99", r"-l:99 is not in MLflow: the versions of '.*-l' are 1$"),
        ("{family}-none:99", "-none:99 is not in MLflow: it has no"),
        ("{family}-none", "is not in MLflow: it has no"),
        ("{family}", r"is not in MLflow: '.*' is a family, of .+-l, .+-m, .+-s$"),
        ("{family}-plain:1", "was not registered by elastic"),
    ],
)
def test_a_reference_to_nothing_says_what_there_is(
    tracking_uri: str, family: str, client: MlflowClient, reference: str, says: str
) -> None:
    register(tracking_uri, family)
    client.create_registered_model(f"{family}-plain")
    client.create_model_version(f"{family}-plain", "s3://b/x", await_creation_for=0)
    with pytest.raises(ServiceError, match=says) as caught:
        resolve(tracking_uri, reference.format(family=family))
    assert not is_transient(caught.value)


@pytest.mark.parametrize("reference", ["", "a b", "a@", "a@b@c", "a:x", "../x", "a'", "models:/a@b"])
def test_what_is_no_reference_is_refused(tracking_uri: str, reference: str) -> None:
    with pytest.raises(ValueError, match="is not a model"):
        resolve(tracking_uri, reference)


@pytest.mark.parametrize(("family", "version"), [("a'b", "1"), ("a", "1' OR '1"), ("a/b", "1"), ("", "1"), ("a", "")])
def test_names_that_a_query_would_misread_are_refused(tracking_uri: str, family: str, version: str) -> None:
    with pytest.raises(ValueError, match="name"):
        register_family(
            tracking_uri,
            family=family,
            version=version,
            manifest_uri="s3://b/m",
            run_id="0" * 32,
            members=[Member(budget="s", source="s3://b/s", metrics={}, tags={})],
        )


# A server that is away


@contextmanager
def mlflow_server(directory: Path, port: int) -> Iterator[None]:
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{directory}/mlflow.db"]
    command += ["--artifacts-destination", str(directory / "artifacts")]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=directory
        )
    try:
        while True:
            try:
                check_server(f"http://127.0.0.1:{port}")
                break
            except ServiceError:
                assert process.poll() is None, (directory / "log").read_text()
                time.sleep(0.1)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.services
def test_metrics_wait_for_a_server_to_come_back(tmp_path: Path, family: str) -> None:
    port = closed_port()
    uri = f"http://127.0.0.1:{port}"
    run = open_run(f"sqlite:///{tmp_path}/mlflow.db", experiment=family, run_key="a", run_name="a")
    spool = MetricSpool(tmp_path / "metrics.jsonl", uri=uri, run_id=run)
    spool.record(1, {"loss": 1.0})
    with pytest.raises(ServiceError, match="delivering metrics") as caught:
        spool.flush()
    assert is_transient(caught.value)
    with mlflow_server(tmp_path, port):
        spool.record(2, {"loss": 0.5})
        assert spool.flush() == 2
        assert again(spool).flush() == 0
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        assert history(client, run, "loss") == [(1, 1.0), (2, 0.5)]
        assert open_run(uri, experiment=family, run_key="a", run_name="a") == run
        made = register(uri, family, run_id=run)
        assert resolve(uri, f"{family}-s@candidate") == by_alias(uri, made["s"].name, "candidate")
        assert register(uri, family, run_id=run)["s"].version == made["s"].version


def test_a_database_that_is_not_there_is_not_made_by_who_reads_it(tmp_path: Path) -> None:
    missing = tmp_path / "other/x.db"
    with pytest.raises(ServiceError, match=r"there is no database sqlite:///.*x\.db; correct MLFLOW_TRACKING_URI or"):
        tracking.check_database(f"sqlite:///{missing}")
    assert not missing.parent.exists()
    (tmp_path / "x.db").touch()
    for there in (f"sqlite:///{tmp_path / 'x.db'}", "http://127.0.0.1:9", "postgresql://u@h/d"):
        tracking.check_database(there)


def test_a_server_that_is_away_is_told_in_a_line_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ServiceError, match=r"does not answer; .*MLFLOW_TRACKING_URI") as told:
        tracking.resolve("http://127.0.0.1:9", "nano")
    assert told.value.transient and len(str(told.value)) < 200, str(told.value)
