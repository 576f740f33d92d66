"""Fixtures for the whole suite: a real S3 server and a real MLflow database, each started once."""

import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from flows.services import ObjectStore
from tasks.artifacts import Store, ensure_bucket, open_store
from tasks.settings import Settings
from tasks.tracking import CLIENT_ENVIRONMENT

READER = {"accessKey": "reader", "secretKey": "reader-secret"}


@dataclass(frozen=True)
class S3Server:
    """SeaweedFS with two identities: ours, in the environment, and one that may only read."""

    server: ObjectStore
    endpoint: str
    reader: tuple[str, str] = (READER["accessKey"], READER["secretKey"])


@pytest.fixture(scope="session")
def session_environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_", "ELASTIC_", "PREFECT_"))]:
            patch.delenv(name)
        for name, value in {**CLIENT_ENVIRONMENT, "DO_NOT_TRACK": "true"}.items():
            patch.setenv(name, value)
        yield patch


@pytest.fixture(scope="session")
def s3_server(
    tmp_path_factory: pytest.TempPathFactory, session_environment: pytest.MonkeyPatch
) -> Iterator[S3Server]:
    directory = tmp_path_factory.mktemp("s3")
    server = ObjectStore(directory, directory)
    server.credentials()
    keys = directory / "identities.json"
    identities = json.loads(keys.read_text())
    identities["identities"].append({"name": "reader", "credentials": [READER], "actions": ["Read", "List"]})
    keys.write_text(json.dumps(identities))
    try:
        server.start()
        for name, value in server.environment().items():
            session_environment.setenv(name, value)
        yield S3Server(server=server, endpoint=server.endpoint)
    finally:
        server.stop()


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory, session_environment: pytest.MonkeyPatch) -> str:
    """A database of its own schema, made once: that takes MLflow seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def settings(s3_server: S3Server, tracking_uri: str, tmp_path: Path) -> Settings:
    """A machine whose bucket is empty and nobody else's."""
    settings = Settings(
        tracking_uri=tracking_uri,
        bucket=f"test-{uuid.uuid4().hex[:12]}",
        endpoint_url=s3_server.endpoint,
        home=tmp_path / "home",
    )
    ensure_bucket(settings)
    return settings


@pytest.fixture
def store(settings: Settings) -> Store:
    """The bucket of `settings`, in parts of the smallest size that S3 takes, so that small files have several."""
    return replace(open_store(settings), part_bytes=5 << 20)
