"""Laws of the garbage: what nothing points to goes when it is old enough, and never anything else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from objects import MARK, contents, failing, make, publish_one, stored, uri_of

from tasks.artifacts import (
    REGISTRY,
    Garbage,
    Store,
    fetch,
    find_garbage,
    is_published,
    publish,
    remove_garbage,
    upload_directory,
    version_uri,
)
from tasks.settings import ServiceError, is_transient

NOW = datetime.now(UTC)
LATER = NOW + timedelta(days=8)  # as if all that the test writes were old
EARLIER = NOW - timedelta(days=1)


def begin_upload(store: Store, key: str, body: bytes = b"half") -> None:
    upload = store.client.create_multipart_upload(Bucket=store.bucket, Key=key)["UploadId"]
    store.client.upload_part(Bucket=store.bucket, Key=key, UploadId=upload, PartNumber=1, Body=body)


def uploads(store: Store) -> set[str]:
    return {upload["Key"] for upload in store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads", ())}


@pytest.fixture
def live(store: Store, tmp_path: Path) -> set[str]:
    """Two versions that the registry points to, by manifest and by directory; what points to them."""
    source = make(tmp_path / "in", {"a": b"1", "b/c": b"22"})
    for version in ("live", "sourced"):
        publish_one(store, source, version)
    return {uri_of(store, "live"), f"{version_uri(store.bucket, 'nano', 'sourced')}/s"}


def begun(store: Store, tmp_path: Path) -> None:
    source = make(tmp_path / "begun", {"x": b"333"})
    upload_directory(store, source, f"{version_uri(store.bucket, 'nano', 'begun')}/s")
    begin_upload(store, "families/nano/begun/s/model.safetensors", b"4444")


def put(store: Store, key: str) -> None:
    store.client.put_object(Bucket=store.bucket, Key=key, Body=b"probe")


def remove_all(store: Store, live: set[str], before: datetime = LATER) -> list[bool]:
    return [remove_garbage(store, found, lambda: live, before) for found in find_garbage(store, "ours", live, before)]


def described(found: list[Garbage]) -> dict[tuple[str, str], tuple[int, int]]:
    return {(one.kind, one.uri.partition("/families/")[2]): (one.objects, one.size) for one in found}


def test_only_what_is_of_no_use_is_found_with_its_bytes_and_removed(
    store: Store, live: set[str], tmp_path: Path
) -> None:
    kept = [
        *("families/readme.txt", "families/nano/notes.txt", "families/.hidden/1/a", "families/a b/1/x"),
        *("teachers/nano/model.safetensors", "familiesX/nano/dead/a", "mlflow/nano/run/report.html", "top"),
    ]
    for key in kept:
        put(store, key)
    begin_upload(store, "teachers/nano/model.safetensors")
    before = stored(store)
    dead = publish_one(store, make(tmp_path / "dead", {"a": b"55555"}), "dead")
    begun(store, tmp_path)
    put(store, "families/.probe-0123")
    begin_upload(store, "families/nano/live/s/a")
    begin_upload(store, "mlflow/nano/run/report.html")
    found = find_garbage(store, "ours", live, LATER)
    size = stored(store)["families/nano/dead/manifest.json"]
    assert described(found) == {
        ("probe", ".probe-0123"): (1, 5),
        ("version", "nano/dead/"): (2, 5 + size),
        ("begun", "nano/begun/"): (2, 3 + 4),
        ("upload", "nano/live/s/a"): (1, 4),
        ("upload", ""): (1, 4),
    }
    assert remove_all(store, live) == [True] * len(found)
    assert stored(store) == before and uploads(store) == {"teachers/nano/model.safetensors"}
    assert find_garbage(store, "ours", live, LATER) == [] and not is_published(store, dead)


def test_finding_removes_nothing(store: Store, live: set[str], tmp_path: Path) -> None:
    begun(store, tmp_path)
    before = stored(store), uploads(store)
    assert find_garbage(store, "ours", live, LATER)
    assert (stored(store), uploads(store)) == before


def test_what_is_young_is_left_alone(store: Store, live: set[str], tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "dead", {"a": b"1"}), "dead")
    begun(store, tmp_path)
    put(store, "families/.probe-0123")
    begin_upload(store, "families/nano/live/s/a")
    assert find_garbage(store, "ours", live, EARLIER) == []


def test_a_version_with_a_similar_name_is_not_taken_for_the_live_one(
    store: Store, live: set[str], tmp_path: Path
) -> None:
    for version in ("live2", "liv"):
        publish_one(store, make(tmp_path / version, {"a": b"1"}), version)
    found = find_garbage(store, "ours", live, LATER)
    assert {one.uri.rstrip("/").rpartition("/")[2] for one in found} == {"live2", "liv"}


@pytest.mark.parametrize(
    ("metadata", "owner"),
    [
        ({REGISTRY: {"id": "theirs", "uri": "http://***@theirs"}}, "published for the registry http://***@theirs"),
        ({REGISTRY: {"id": "theirs"}}, "published for the registry theirs"),
        ({REGISTRY: "ours"}, "it does not say for which registry"),
        ({}, "it does not say for which registry"),
    ],
)
def test_what_was_published_for_another_registry_or_does_not_say_is_left_alone_and_said(
    metadata: dict[str, Any], owner: str, store: Store, live: set[str], tmp_path: Path
) -> None:
    source = make(tmp_path / "theirs", {"a": b"1"})
    publish(store, family="nano", version="theirs", directories={"s": source}, metadata=metadata)
    before = stored(store)
    (found,) = find_garbage(store, "ours", live, LATER)
    assert (found.kind, found.owner) == ("foreign", owner)
    assert remove_all(store, live) == [False] and stored(store) == before


def test_a_manifest_that_cannot_be_read_keeps_its_version(store: Store, live: set[str]) -> None:
    put(store, "families/nano/odd/manifest.json")
    (found,) = find_garbage(store, "ours", live, LATER)
    assert (found.kind, found.owner) == ("foreign", "its manifest cannot be read")


def test_all_that_a_registry_published_may_go(store: Store, live: set[str]) -> None:
    assert remove_all(store, set()) == [True, True] and not stored(store)


def test_an_empty_bucket_and_one_with_only_begun_versions_need_no_registry(store: Store, tmp_path: Path) -> None:
    assert find_garbage(store, "ours", set(), LATER) == []
    begun(store, tmp_path)
    assert remove_all(store, set()) == [True]
    assert not stored(store) and not uploads(store)


@contextmanager
def before_operation(store: Store, operation: str, key: str, act: Callable[[], object]) -> Iterator[None]:
    """Just before our own operation on a key is sent, once, let something else happen."""
    pending = [act]

    def happen(params: dict[str, Any], **_: Any) -> None:
        if params.get("Key") == key and pending:
            pending.pop()()

    event = f"before-parameter-build.s3.{operation}"
    store.client.meta.events.register(event, happen)
    try:
        yield
    finally:
        store.client.meta.events.unregister(event, happen)
    assert not pending


def test_a_version_that_is_registered_meanwhile_is_left_as_it_was(store: Store, live: set[str], tmp_path: Path) -> None:
    dead = publish_one(store, make(tmp_path / "dead", {"a": b"1"}), "dead")
    (found,) = find_garbage(store, "ours", live, LATER)
    registered = {uri_of(store, "dead")}
    assert not remove_garbage(store, found, lambda: live | registered, LATER)
    assert is_published(store, dead)
    fetch(store, uri_of(store, "dead"), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == {"a": b"1"}


def test_a_version_that_is_published_meanwhile_is_left_as_it_was(store: Store, live: set[str], tmp_path: Path) -> None:
    source = make(tmp_path / "begun", {"x": b"333"})
    upload_directory(store, source, f"{version_uri(store.bucket, 'nano', 'begun')}/s")
    (found,) = find_garbage(store, "ours", live, LATER)
    manifest = []

    def publish_now() -> None:
        manifest.append(publish_one(store, source, "begun"))

    with before_operation(store, "PutObject", "families/nano/begun/manifest.json", publish_now):
        assert not remove_garbage(store, found, lambda: live, LATER)
    assert is_published(store, manifest[0])


def test_a_version_that_is_written_to_meanwhile_is_left_as_it_was(store: Store, live: set[str], tmp_path: Path) -> None:
    begun(store, tmp_path)
    (found,) = find_garbage(store, "ours", live, LATER)
    before = stored(store)
    assert not remove_garbage(store, found, lambda: live, EARLIER)
    assert stored(store) == before


def test_a_run_that_publishes_while_its_version_is_removed_tries_again_and_wins(
    store: Store, live: set[str], tmp_path: Path
) -> None:
    """The removal comes between the publisher's last file and its manifest: the worst moment."""
    source = make(tmp_path / "new", {"x": b"333", "y": b"4"})
    upload_directory(store, source, f"{version_uri(store.bucket, 'nano', 'new')}/s")
    manifest = "families/nano/new/manifest.json"
    refused = []

    def publish_now() -> None:
        with pytest.raises(ServiceError) as caught:
            publish_one(store, source, "new")
        refused.append(is_transient(caught.value))

    with before_operation(store, "DeleteObject", manifest, publish_now):
        assert remove_all(store, live) == [True]
    assert refused == [True]
    again = publish_one(store, source, "new")
    assert is_published(store, again)
    fetch(store, uri_of(store, "new"), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


def test_files_that_go_while_a_version_is_published_keep_its_manifest_from_being_written(
    store: Store, tmp_path: Path
) -> None:
    source = make(tmp_path / "new", {"x": b"333", "y": b"4"})
    key = "families/nano/new/s/x"
    with (
        before_operation(
            store,
            "PutObject",
            "families/nano/new/s/y",
            lambda: store.client.delete_object(Bucket=store.bucket, Key=key),
        ),
        pytest.raises(ServiceError, match="s/x went away while") as caught,
    ):
        publish_one(store, source, "new")
    assert is_transient(caught.value)
    assert not any(key.endswith("manifest.json") for key in stored(store))


def test_an_interrupted_removal_can_be_neither_read_nor_published_and_is_ended_by_the_next(
    store: Store, live: set[str], tmp_path: Path
) -> None:
    source = make(tmp_path / "dead", {"a": b"1"})
    publish_one(store, source, "dead")
    (found,) = find_garbage(store, "ours", live, LATER)
    with failing(store, "DeleteObjects", on_call=1), pytest.raises(ConnectionResetError):
        remove_garbage(store, found, lambda: live, LATER)
    with pytest.raises(ServiceError, match="is being removed by elastic gc"):
        fetch(store, uri_of(store, "dead"), "s", tmp_path / "out")
    with pytest.raises(ServiceError, match="is being removed by elastic gc"):
        publish_one(store, source, "dead")
    assert remove_all(store, live) == [True]
    assert not [key for key in stored(store) if "/dead/" in key]
    publish_one(store, source, "dead")


def test_more_objects_than_one_call_takes_are_removed(
    store: Store, live: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.artifacts.documents.MAX_DELETED", 3)
    source = make(tmp_path / "many", {f"{n}": b"1" for n in range(10)})
    publish(store, family="nano", version="many", directories={"s": source}, metadata=MARK)
    assert remove_all(store, live) == [True]
    assert not [key for key in stored(store) if "/many/" in key]
