"""Fixtures for the whole suite: a real S3 server and a real MLflow database, each started once."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from flows.services import ObjectStore
from tasks.artifacts import Store, open_store
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
def s3_server(tmp_path_factory: pytest.TempPathFactory, session_environment: pytest.MonkeyPatch) -> Iterator[S3Server]:
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


@pytest.fixture(scope="session")
def s3_connection(s3_server: S3Server, tracking_uri: str) -> Iterator[Store]:
    settings = Settings(tracking_uri=tracking_uri, bucket="elastic", endpoint_url=s3_server.endpoint)
    store = open_store(settings)
    with closing(store.client):
        yield store


@pytest.fixture
def settings(s3_connection: Store, s3_server: S3Server, tracking_uri: str, tmp_path: Path) -> Iterator[Settings]:
    """A machine whose bucket is empty and nobody else's."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3_connection.client.create_bucket(Bucket=bucket)
    yield Settings(tracking_uri=tracking_uri, bucket=bucket, endpoint_url=s3_server.endpoint, home=tmp_path / "home")
    s3_connection.client.delete_bucket(Bucket=bucket)  # SeaweedFS takes the objects along; its volumes are few


@pytest.fixture
def store(s3_connection: Store, settings: Settings) -> Store:
    """The bucket of `settings`, in parts of the smallest size that S3 takes, so that small files have several."""
    return replace(s3_connection, bucket=settings.bucket, part_bytes=5 << 20)
