"""The bucket policies allow what the code does, all of it, and nothing else."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from botocore.client import BaseClient
from objects import PART, make, noise, publish_one, uri_of

from tasks.artifacts import REGISTRY, Store, check_bucket, fetch, find_garbage, publish, read_manifest, remove_garbage
from tasks.artifacts.blobs import Blobs
from tasks.artifacts.documents import abort_unfinished, documents, read_document, remove_objects, write_document
from tasks.artifacts.leases import Lease, check_workspace
from tasks.artifacts.staging import sha256_of
from tasks.settings import Settings
from tasks.tracking import log_files, open_run

POLICIES = Path(__file__).parents[1] / "infra" / "policies"

# What AWS asks a key to be allowed for each operation; whether it is about the bucket or about an object in it.
ACTIONS = {
    "ListObjectsV2": ("s3:ListBucket", "bucket"),
    "ListMultipartUploads": ("s3:ListBucketMultipartUploads", "bucket"),
    "ListParts": ("s3:ListMultipartUploadParts", "object"),
    "HeadObject": ("s3:GetObject", "object"),
    "GetObject": ("s3:GetObject", "object"),
    "PutObject": ("s3:PutObject", "object"),
    "CreateMultipartUpload": ("s3:PutObject", "object"),
    "UploadPart": ("s3:PutObject", "object"),
    "CompleteMultipartUpload": ("s3:PutObject", "object"),
    "AbortMultipartUpload": ("s3:AbortMultipartUpload", "object"),
    "DeleteObject": ("s3:DeleteObject", "object"),
    "DeleteObjects": ("s3:DeleteObject", "object"),
}
# To tell "there is none" from "you may not know", S3 asks for this beside the right to read.
TO_MISS = "s3:ListBucket"


@contextmanager
def recorded(patch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """The (action, resource) pairs that any S3 client of this process, MLflow's too, needs while the block runs."""
    seen: set[tuple[str, str]] = set()
    call = BaseClient._make_api_call

    def record(self: BaseClient, operation: str, parameters: dict[str, Any]) -> Any:
        action, about = ACTIONS[operation]
        deleted = [entry["Key"] for entry in parameters.get("Delete", {}).get("Objects", ())]
        for key in deleted or [parameters.get("Key", "")]:
            seen.add((action, f"arn:aws:s3:::BUCKET/{key}" if about == "object" else "arn:aws:s3:::BUCKET"))
        if operation in ("HeadObject", "GetObject"):
            seen.add((TO_MISS, "arn:aws:s3:::BUCKET"))
        return call(self, operation, parameters)

    with patch.context() as during:
        during.setattr(BaseClient, "_make_api_call", record)
        yield seen


def allowed(name: str) -> set[tuple[str, str]]:
    """The (action, resource pattern) pairs of a policy."""
    policy = json.loads((POLICIES / f"{name}.json").read_text())
    assert policy["Version"] == "2012-10-17"
    statements = policy["Statement"]
    assert all(
        statement["Effect"] == "Allow" and set(statement) == {"Sid", "Effect", "Action", "Resource"}
        for statement in statements
    )
    return {(action, where) for s in statements for action in s["Action"] for where in s["Resource"]}


def assert_least(name: str, needed: set[tuple[str, str]]) -> None:
    policy = allowed(name)
    denied = {
        (action, key) for action, key in needed if not any(a == action and fnmatchcase(key, p) for a, p in policy)
    }
    unused = {(action, p) for action, p in policy if not any(a == action and fnmatchcase(key, p) for a, key in needed)}
    assert (denied, unused) == (set(), set())


@pytest.fixture(autouse=True)
def _uploads_are_a_day_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.artifacts.publishing.UNFINISHED", timedelta(0))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make(tmp_path / "in", {"config.json": b"{}", "model.safetensors": noise(PART + 1)})


def begin_upload(store: Store, key: str) -> None:
    upload = store.client.create_multipart_upload(Bucket=store.bucket, Key=key)["UploadId"]
    store.client.upload_part(Bucket=store.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")


def test_a_publisher_may_do_what_publishing_does(
    store: Store, settings: Settings, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_upload(store, "families/nano/1/s/model.safetensors")  # as a killed run leaves it
    make(tmp_path / "report", {"index.html": b"<html>"})
    with recorded(monkeypatch) as needed:
        check_bucket(settings)
        publish_one(store, source)
        publish_one(store, source)
        root = f"s3://{settings.bucket}/mlflow/nano"
        run = open_run(
            settings.tracking_uri, experiment=f"policy-{settings.bucket}", run_key="r", run_name="r", artifact_root=root
        )
        log_files(settings.tracking_uri, run, tmp_path / "report", "report")
    assert_least("publisher", needed)


def test_a_reader_may_do_what_pulling_does(
    store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_one(store, source)
    with recorded(monkeypatch) as needed:
        read_manifest(store, uri_of(store))
        fetch(store, uri_of(store), "s", tmp_path / "out")
    assert_least("reader", needed)


def test_a_worker_may_do_what_sharing_a_workspace_does(
    store: Store, settings: Settings, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = replace(settings, workspace=f"s3://{settings.bucket}/workspace")
    files = {path.name: sha256_of(path) for path in source.iterdir()}
    blobs, lease = Blobs(store=store, root="workspace/blobs/"), Lease(store, "workspace/leases/step", host="one")
    begin_upload(store, f"workspace/blobs/{files['model.safetensors']}")
    with recorded(monkeypatch) as needed:
        check_workspace(shared)
        lease.claim()
        blobs.put(source, files)
        blobs.fetch(files, tmp_path / "out")
        write_document(store, "workspace/results/step.json", b"{}")
        read_document(store, "workspace/results/step.json")
        abort_unfinished(store, "workspace/", datetime.now(UTC))
        with lease.kept():
            pass
        remove_objects(store, documents(store, "workspace/"))
    assert_least("workspace", needed)


def test_a_collector_may_do_what_collecting_garbage_does(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("live", "dead"):
        publish(store, family="nano", version=version, directories={"s": source}, metadata={REGISTRY: {"id": "1"}})
    for key in ("families/nano/live/s/x", "families/nano/dead/s/x", "mlflow/nano/x"):
        begin_upload(store, key)
    before, live = datetime.now(UTC) + timedelta(days=1), {uri_of(store, "live")}
    with recorded(monkeypatch) as needed:
        for found in find_garbage(store, "1", live, before):
            assert remove_garbage(store, found, lambda: live, before)
    assert_least("collector", needed)
