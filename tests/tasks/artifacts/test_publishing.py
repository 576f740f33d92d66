"""Laws of publishing, against a real S3 server."""

import hashlib
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from objects import (
    LARGE,
    MIB,
    PART,
    SMALL,
    checkpoint,
    contents,
    exists,
    failing,
    make,
    noise,
    publish_one,
    requests_of,
    uri_of,
)

from tasks.artifacts import (
    NotAsRecorded,
    Store,
    fetch,
    open_store,
    parse_uri,
    publish,
    published_versions,
    put_file,
    read_manifest,
    upload_directory,
    version_uri,
)
from tasks.artifacts.manifest import manifest_json
from tasks.settings import ServiceError, Settings, is_transient

# Publishing and fetching


def test_what_is_published_comes_back_byte_for_byte(store: Store, tmp_path: Path) -> None:
    small, large = make(tmp_path / "in-s", checkpoint()), make(tmp_path / "in-l", checkpoint(LARGE, 5))
    sent = publish(
        store,
        family="nano",
        version="2026.11-a",
        directories={"s": small, "elastic": large},
        metadata={"lineage": {"teacher": "ab" * 32}, "step": 100},
    )
    uri = uri_of(store, "2026.11-a")
    assert read_manifest(store, uri) == sent
    assert sent.parts == ("elastic", "s")
    for part, source in (("s", small), ("elastic", large)):
        assert fetch(store, uri, part, tmp_path / "out" / part) == sent
        assert contents(tmp_path / "out" / part) == contents(source)
    digests = {file.path: file.sha256 for file in sent.part("s")}
    assert digests == {path: hashlib.sha256(content).hexdigest() for path, content in checkpoint().items()}


def test_the_directory_of_a_part_is_the_prefix_of_its_objects(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", {"a/b": b"1"}))
    assert exists(store, f"{version_uri(store.bucket, 'nano', '1')}/s/a/b")


def test_a_version_without_a_manifest_does_not_exist(store: Store, tmp_path: Path) -> None:
    source = make(tmp_path / "in", checkpoint())
    upload_directory(store, source, f"{version_uri(store.bucket, 'nano', '1')}/s")
    assert published_versions(store, "nano") == ()
    with pytest.raises(ServiceError, match="no such version"):
        fetch(store, uri_of(store), "s", tmp_path / "out")
    publish_one(store, source)
    assert published_versions(store, "nano") == ("1",)
    assert published_versions(store, "nan") == ()


def test_publishing_the_same_again_sends_no_file_and_succeeds(store: Store, tmp_path: Path) -> None:
    source = make(tmp_path / "in", checkpoint())
    first = publish_one(store, source)
    with requests_of(store) as sent:
        assert publish_one(store, source) == first
    assert {name for name, _ in sent} == {"GetObject", "ListObjectsV2"}


@pytest.mark.parametrize(
    "change", [{"config.json": b"{ }"}, {"extra": b""}, {"model-00001.safetensors": noise(SMALL, 9)}]
)
def test_a_version_is_never_published_with_other_content(
    store: Store, tmp_path: Path, change: dict[str, bytes]
) -> None:
    published = publish_one(store, make(tmp_path / "in", checkpoint()))
    with pytest.raises(ServiceError, match="never overwritten") as caught:
        publish_one(store, make(tmp_path / "in", change))
    assert not is_transient(caught.value)
    assert fetch(store, uri_of(store), "s", tmp_path / "out") == published
    assert contents(tmp_path / "out") == checkpoint()


def test_other_metadata_is_other_content(store: Store, tmp_path: Path) -> None:
    source = make(tmp_path / "in", {"a": b"1"})
    publish_one(store, source)
    with pytest.raises(ServiceError, match="never overwritten"):
        publish(store, family="nano", version="1", directories={"s": source}, metadata={"step": 8})


@pytest.mark.parametrize("size", [0, 1, SMALL, PART, PART + 1])
def test_an_object_of_a_begun_version_is_never_overwritten(store: Store, tmp_path: Path, size: int) -> None:
    upload_directory(store, make(tmp_path / "old", {"model": noise(size)}), f"{uri_of(store).rpartition('/')[0]}/s")
    new = make(tmp_path / "new", {"model": noise(size, 1) or b"more"})
    with pytest.raises(ServiceError, match="holds other bytes"):
        publish_one(store, new)
    assert published_versions(store, "nano") == ()


@contextmanager
def beaten(store: Store, settings: Settings, operation: str, key: str, body: bytes) -> Iterator[None]:
    """Just before our own operation on a key is sent, let another client put an object there."""
    other = open_store(settings)

    def overtake(params: dict[str, Any], **_: Any) -> None:
        if params["Key"] == key:
            other.client.put_object(Bucket=store.bucket, Key=key, Body=body)

    event = f"before-parameter-build.s3.{operation}"
    store.client.meta.events.register(event, overtake)
    try:
        with closing(other.client):
            yield
    finally:
        store.client.meta.events.unregister(event, overtake)


@pytest.mark.parametrize(("size", "operation"), [(SMALL, "PutObject"), (PART + 1, "CompleteMultipartUpload")])
def test_an_object_that_appears_while_ours_is_sent_is_kept(
    store: Store, settings: Settings, tmp_path: Path, size: int, operation: str
) -> None:
    for version, theirs in (("1", noise(size)), ("2", noise(size, 1))):
        source = make(tmp_path / version, {"model": noise(size)})
        key = f"families/nano/{version}/s/model"
        with beaten(store, settings, operation, key, theirs):
            if version == "1":
                publish_one(store, source, version)
            else:
                with pytest.raises(ServiceError, match="holds other bytes"):
                    publish_one(store, source, version)
        assert store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read() == theirs


def test_a_manifest_that_appears_while_ours_is_sent_is_kept(store: Store, settings: Settings, tmp_path: Path) -> None:
    source = make(tmp_path / "in", {"a": b"1"})
    ours = manifest_json(publish_one(store, source))
    for version, theirs in (("2", ours.replace(b'"version": "1"', b'"version": "2"')), ("3", b"{}")):
        key = f"families/nano/{version}/manifest.json"
        with beaten(store, settings, "PutObject", key, theirs):
            if version == "2":
                publish_one(store, source, version)
            else:
                with pytest.raises(ServiceError, match="never overwritten"):
                    publish_one(store, source, version)
        assert store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read() == theirs


def test_two_publishers_of_one_version_cannot_both_win(store: Store, tmp_path: Path) -> None:
    sources = [make(tmp_path / str(n), {"model.safetensors": noise(PART + 1, n), "config.json": b"{}"}) for n in (0, 1)]

    def attempt(source: Path) -> str:
        try:
            return publish_one(store, source).files[1].sha256
        except ServiceError:
            return "refused"

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(attempt, sources))
    for source, outcome in zip(sources, outcomes, strict=True):
        if outcome != "refused":
            fetch(store, uri_of(store), "s", tmp_path / "out")
            assert contents(tmp_path / "out") == contents(source)
    assert outcomes.count("refused") >= 1


@pytest.mark.parametrize("operation", ["PutObject", "UploadPart", "CompleteMultipartUpload"])
def test_an_interrupted_publish_is_continued_and_leaves_no_parts(store: Store, tmp_path: Path, operation: str) -> None:
    files = {"config.json": b"{}", "model.safetensors": noise(LARGE), "tokenizer.json": b"{}"}
    source = make(tmp_path / "in", files)
    with failing(store, operation, on_call=2 if operation == "PutObject" else 1), pytest.raises(ConnectionResetError):
        publish_one(store, source)
    assert published_versions(store, "nano") == ()
    assert not store.client.list_multipart_uploads(Bucket=store.bucket).get("Uploads")
    with requests_of(store) as sent:
        publish_one(store, source)
    assert "families/nano/1/s/config.json" not in {p["Key"] for name, p in sent if name == "PutObject"}
    fetch(store, uri_of(store), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == files


@pytest.mark.parametrize("age", [timedelta(0), timedelta(days=1)], ids=["a killed one's", "another host's"])
def test_parts_that_a_killed_upload_left_are_cleared_away(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: timedelta
) -> None:
    monkeypatch.setattr("tasks.artifacts.publishing.UNFINISHED", age)

    def begin(key: str) -> None:
        upload = store.client.create_multipart_upload(Bucket=store.bucket, Key=key)["UploadId"]
        store.client.upload_part(Bucket=store.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")

    begin("families/nano/1/s/model.safetensors")
    begin("families/nano/1/s/model.safetensors.index")
    with requests_of(store) as sent:
        publish_one(store, make(tmp_path / "in", {"model.safetensors": noise(PART + 1)}))
    removed = [of["Key"] for name, of in sent if name == "AbortMultipartUpload"]
    assert removed == ([] if age else ["families/nano/1/s/model.safetensors"])


def test_the_same_bytes_are_recognised_when_they_were_sent_in_other_parts(store: Store, tmp_path: Path) -> None:
    source = make(tmp_path / "in", checkpoint(LARGE))
    first = publish_one(replace(store, part_bytes=64 * MIB), source)
    store.client.delete_object(Bucket=store.bucket, Key=parse_uri(uri_of(store))[1])
    assert publish_one(store, source) == first


def test_an_upload_holds_a_few_parts_in_memory_not_the_file(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    tracemalloc.start()
    try:
        put_file(store, path, f"s3://{store.bucket}/big")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (store.workers + 4) * PART  # those in flight, one being read, and copies on the way


def test_progress_only_grows_and_ends_at_the_total(store: Store, tmp_path: Path) -> None:
    source = make(tmp_path / "in", checkpoint())
    total = sum(len(content) for content in checkpoint().values())
    for act in (
        lambda progress: publish_one(store, source, progress=progress),
        lambda progress: fetch(store, uri_of(store), "s", tmp_path / "out", progress=progress),
    ):
        seen: list[tuple[int, int]] = []
        act(lambda done, of, seen=seen: seen.append((done, of)))
        assert seen == sorted(seen) and seen[-1] == (total, total)


@pytest.mark.parametrize("encryption", ["none", "AES256"])
def test_objects_are_encrypted_as_the_settings_say(settings: Settings, tmp_path: Path, encryption: str) -> None:
    store = replace(open_store(replace(settings, encryption=encryption)), part_bytes=PART)
    publish_one(store, make(tmp_path / "in", checkpoint(PART + 1)))
    for key in ("s/config.json", "s/model-00001.safetensors", "manifest.json"):
        head = store.client.head_object(Bucket=store.bucket, Key=f"families/nano/1/{key}")
        assert head.get("ServerSideEncryption", "none") == encryption
    fetch(store, uri_of(store), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == checkpoint(PART + 1)


def test_only_plain_files_are_published(store: Store, tmp_path: Path) -> None:
    source = make(tmp_path / "in", {"a": b"1"})
    (source / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="not a regular file"):
        publish_one(store, source)
    with pytest.raises(ValueError, match="holds no file"):
        publish_one(store, make(tmp_path / "none", {}) / "nowhere")


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "a b", "a\n", "é"])
def test_names_of_families_and_versions_are_plain(store: Store, tmp_path: Path, name: str) -> None:
    source = make(tmp_path / "in", {"a": b"1"})
    with pytest.raises(ValueError, match="is not a name"):
        publish(store, family=name, version="1", directories={"s": source}, metadata={})
    with pytest.raises(ValueError, match="is not a name"):
        publish(store, family="nano", version=name, directories={"s": source}, metadata={})


# What is recorded


def spoil(directory: Path) -> None:
    """A bit of a weight, as a disk loses one."""
    file = directory / "model-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_the_tokenizer(directory: Path) -> None:
    (directory / "tokenizer/vocab ü.json").unlink()


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["at once", "in parts"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (
            spoil,
            r"in/model-00001.safetensors is damaged: its SHA-256 is \w{12}, and \w{12} on record; it is not published",
        ),
        (lose_the_tokenizer, r"s/tokenizer/vocab ü.json is not as it was recorded; nothing is published"),
    ],
    ids=["a flipped bit", "no tokenizer"],
)
def test_what_is_not_as_it_was_recorded_is_not_published_and_leaves_no_object_in_the_way(
    fault: Callable[[Path], None], says: str, size: int, store: Store, tmp_path: Path
) -> None:
    directory = make(tmp_path / "in", checkpoint(size))
    recorded = {"s": {name: hashlib.sha256(content).hexdigest() for name, content in contents(directory).items()}}
    fault(directory)
    with pytest.raises(NotAsRecorded, match=says):
        publish_one(store, directory, recorded=recorded)
    assert not exists(store, uri_of(store))
    mended = make(tmp_path / "mended", checkpoint(size))
    publish_one(store, mended, recorded=recorded)
    fault(mended)
    with pytest.raises(NotAsRecorded):
        publish_one(store, mended, recorded=recorded)
