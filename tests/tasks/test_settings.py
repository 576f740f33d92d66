"""Laws of the settings: one line for what is missing or wrong, and no secret in any text."""

import asyncio
import errno
import pickle
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import aiohttp
import httpx
import pytest
import requests
from answers import answering
from huggingface_hub import HfApi, close_session
from huggingface_hub.errors import OfflineModeIsEnabled

from tasks import artifacts
from tasks.running.loopback import free_ports
from tasks.settings import EMBEDDED, ServiceError, Settings, is_transient, redact, remedy

ENVIRONMENT = {
    "MLFLOW_TRACKING_URI": "https://user:hunter2@mlflow.example:5000/base",
    "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:8333",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9999",
    "ELASTIC_BUCKET": "models",
    "ELASTIC_HOME": "/srv/elastic",
    "ELASTIC_S3_SSE": "aws:kms",
    "ELASTIC_S3_SSE_KMS_KEY_ID": "key-1",
    "ELASTIC_WORKSPACE": "s3://models/shared/by-all",
    "ELASTIC_CACHE_SIZE": "2TB",
    "AWS_SECRET_ACCESS_KEY": "hunter2",
}


def test_the_environment_fills_every_field() -> None:
    assert Settings.from_environment(ENVIRONMENT) == Settings(
        tracking_uri="https://user:hunter2@mlflow.example:5000/base",
        bucket="models",
        endpoint_url="http://127.0.0.1:8333",
        home=Path("/srv/elastic"),
        encryption="aws:kms",
        kms_key_id="key-1",
        workspace="s3://models/shared/by-all",
        cache_bytes=2 * 10**12,
    )


def test_what_may_be_left_out_has_a_default() -> None:
    few = {"MLFLOW_TRACKING_URI": "sqlite:///x.db", "ELASTIC_BUCKET": "models", "AWS_ENDPOINT_URL_S3": ""}
    settings = Settings.from_environment(few)
    assert (settings.endpoint_url, settings.encryption, settings.kms_key_id) == (None, "none", None)
    assert settings.home == Path.cwd() / ".elastic"
    general = Settings.from_environment({**few, "AWS_ENDPOINT_URL": "http://s3:1"})
    assert general.endpoint_url == "http://s3:1"


def test_a_registry_apart_is_named_without_its_secrets_and_is_the_tracking_server_otherwise() -> None:
    assert Settings.from_environment(ENVIRONMENT).registry == ENVIRONMENT["MLFLOW_TRACKING_URI"]
    apart = Settings.from_environment({**ENVIRONMENT, "MLFLOW_REGISTRY_URI": "http://me:hunter2@registry:5000"})
    assert apart.registry == "http://me:hunter2@registry:5000"
    assert apart.tracking_uri == ENVIRONMENT["MLFLOW_TRACKING_URI"]
    assert "registry:5000" in repr(apart) and "hunter2" not in repr(apart)
    with pytest.raises(
        ValueError, match=r"^MLFLOW_REGISTRY_URI='databricks-uc': .*Unity Catalog registers MLflow's own"
    ):
        Settings.from_environment({**ENVIRONMENT, "MLFLOW_REGISTRY_URI": "databricks-uc"})


def test_a_remedy_names_the_log_of_our_own_server_or_the_variable_that_was_set_and_no_other() -> None:
    ours = {EMBEDDED: '{"AWS_ENDPOINT_URL_S3": "/srv/logs/seaweedfs.log"}', "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}
    named = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    assert remedy(*named, environ=ours) == "elastic started this server, and its log is /srv/logs/seaweedfs.log"
    assert remedy(*named, environ={"AWS_ENDPOINT_URL": "http://s3"}) == "check AWS_ENDPOINT_URL"
    assert remedy(*named, environ=ENVIRONMENT) == "check AWS_ENDPOINT_URL_S3"
    assert remedy(*named, otherwise="check the network", environ={}) == "check the network"
    assert remedy("MLFLOW_TRACKING_URI", environ=ours) == "check MLFLOW_TRACKING_URI"


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "ELASTIC_BUCKET"])
def test_a_missing_setting_is_named_with_its_remedy(name: str, value: str | None) -> None:
    environment = {key: text for key, text in ENVIRONMENT.items() if key != name}
    if value is not None:
        environment[name] = value
    with pytest.raises(ValueError, match=f"^{name} is not set: export .* or use `elastic run`") as caught:
        Settings.from_environment(environment)
    assert "\n" not in str(caught.value)


def test_a_reader_needs_no_bucket() -> None:
    environment = {key: text for key, text in ENVIRONMENT.items() if key != "ELASTIC_BUCKET"}
    assert Settings.from_environment(environment, need_bucket=False).bucket == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_TRACKING_URI", "mlflow:5000"),
        ("MLFLOW_TRACKING_URI", "./mlruns"),
        ("MLFLOW_TRACKING_URI", "file:///mlruns"),
        ("MLFLOW_TRACKING_URI", "databricks"),
        ("MLFLOW_TRACKING_URI", "databricks://profile"),
        ("MLFLOW_TRACKING_URI", "oracle://host/db"),
        ("AWS_ENDPOINT_URL_S3", "user:hunter2@localhost:8333"),
        ("ELASTIC_BUCKET", "s3://models"),
        ("ELASTIC_BUCKET", "Models"),
        ("ELASTIC_BUCKET", "a"),
        ("ELASTIC_S3_SSE", "aes256"),
        ("ELASTIC_S3_SSE", "none"),  # with a KMS key beside it
        ("ELASTIC_WORKSPACE", "s3://models"),
        ("ELASTIC_WORKSPACE", "/srv/workspace"),
        ("ELASTIC_WORKSPACE", "s3://models/../x"),
        ("ELASTIC_WORKSPACE", "s3://models/families"),
        ("ELASTIC_CACHE_SIZE", "much"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        Settings.from_environment({**ENVIRONMENT, name: value})
    assert "\n" not in str(caught.value)


def test_settings_show_no_secret() -> None:
    settings = Settings.from_environment({**ENVIRONMENT, "AWS_ENDPOINT_URL_S3": "http://key:hunter2@s3:1"})
    for shown in (repr(settings), str(settings), f"{settings}"):
        assert "hunter2" not in shown
        assert "***@mlflow.example:5000/base" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("sqlite:////srv/mlflow.db", "sqlite:////srv/mlflow.db"),
        ("s3://bucket/key@v1", "s3://bucket/key@v1"),
        ("models:/nano-6b@champion", "models:/nano-6b@champion"),
        ("http://host:5000/models:/nano@champion", "http://host:5000/models:/nano@champion"),
        ("http://u:hunter2@host:1/p", "http://***@host:1/p"),
        ("http://token-only@host", "http://***@host"),
        ("http://u:p@ss@host/p", "http://***@host/p"),
        ("postgresql://u:pass/word@host/db", "postgresql://***@host/db"),
        ("from http://u:a@h1/x to http://u:b@h2/y", "from http://***@h1/x to http://***@h2/y"),
        (
            "https://b.s3/k?X-Amz-Credential=AKIA&X-Amz-Expires=60&X-Amz-Signature=ab12",
            "https://b.s3/k?X-Amz-Credential=***&X-Amz-Expires=60&X-Amz-Signature=***",
        ),
        ("postgresql://h/db?user=u&password=p&sslmode=on", "postgresql://h/db?user=u&password=***&sslmode=on"),
    ],
)
def test_urls_are_shown_without_their_secrets(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


def chained(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def inside(error: Exception, context: BaseException, *, hidden: bool = False) -> Exception:
    error.__context__, error.__suppress_context__ = context, hidden
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ServiceError("x", transient=True), True),
        (ServiceError("x"), False),
        (ConnectionResetError("x"), True),
        (TimeoutError("x"), True),
        (OSError(errno.ENOSPC, "full"), True),
        (PermissionError("x"), False),
        (ValueError("x"), False),
        (chained(RuntimeError("x"), ServiceError("y", transient=True)), True),
        (chained(RuntimeError("x"), ConnectionRefusedError("y")), True),
        (chained(ServiceError("x"), ConnectionRefusedError("y")), False),
        (KeyboardInterrupt(), False),
        (OSError(errno.ESTALE, "stale file handle"), True),
        (OSError(errno.EIO, "input/output error"), True),
        (MemoryError(), False),
        (inside(RuntimeError("x"), ConnectionRefusedError("y")), True),
        (inside(KeyError("x"), ConnectionRefusedError("y")), False),
        (inside(ValueError("x"), ConnectionRefusedError("y"), hidden=True), False),
        (chained(FileNotFoundError("not in the cache"), OfflineModeIsEnabled("HF_HUB_OFFLINE is set")), False),
    ],
)
def test_passing_faults_are_told_from_verdicts(error: BaseException, transient: bool) -> None:
    assert is_transient(error) == transient


def _requests(url: str) -> None:
    requests.get(url, timeout=5).raise_for_status()


def _httpx(url: str) -> None:
    httpx.get(url).raise_for_status()


def _urllib(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=5)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _aiohttp(url: str) -> None:
    async def get() -> None:
        async with aiohttp.ClientSession(raise_for_status=True) as session, session.get(url) as answer:
            await answer.read()

    asyncio.run(get())


def _hub(url: str) -> None:
    try:
        HfApi(endpoint=url).model_info("org/name")
    finally:
        close_session()


def _s3(url: str) -> None:
    settings = Settings(tracking_uri="sqlite:///x.db", bucket="models", endpoint_url=url)
    with closing((store := artifacts.open_store(settings, attempts=1)).client):
        artifacts.list_objects(store, "s3://models/x")


CLIENTS = {"requests": _requests, "httpx": _httpx, "urllib": _urllib, "aiohttp": _aiohttp, "hub": _hub, "s3": _s3}


def error_of(client: str, url: str, monkeypatch: pytest.MonkeyPatch) -> Exception:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    with pytest.raises(Exception) as caught:
        CLIENTS[client](url)
    return caught.value


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize(("status", "transient"), [(503, True), (429, True), (404, False), (403, False)])
def test_a_verdict_is_told_from_a_busy_server_in_every_client(
    client: str, status: int, transient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(lambda *_: (status, b"{}", {"Retry-After": "0"})) as url:
        error = error_of(client, url, monkeypatch)
    assert is_transient(error) == transient, repr(error)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_that_is_away_is_a_passing_fault_in_every_client(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = error_of(client, f"http://127.0.0.1:{free_ports(1)[0]}", monkeypatch)
    assert is_transient(error), repr(error)


@pytest.mark.parametrize("client", [name for name in CLIENTS if name != "s3"])
def test_an_answer_that_breaks_off_is_a_passing_fault(client: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(*_: object) -> tuple[int, bytes, dict[str, str]]:
        return 200, b'{"id":', {"Content-Length": "1000", "Connection": "close"}

    with answering(torn) as url:
        error = error_of(client if client != "urllib" else "requests", url, monkeypatch)
    assert is_transient(error), repr(error)


def test_an_error_keeps_its_verdict_between_processes() -> None:
    copy = pickle.loads(pickle.dumps(ServiceError("one line", transient=True)))
    assert (str(copy), copy.transient) == ("one line", True)
