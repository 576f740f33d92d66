"""Laws of the object store, against a real S3 server."""

import fcntl
import hashlib
import json
import os
import random
import shutil
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tasks.artifacts import (
    Store,
    check_bucket,
    download_prefix,
    exists,
    fetch,
    get_file,
    list_objects,
    manifest_uri,
    open_store,
    parse_uri,
    publish,
    published_versions,
    put_file,
    read_manifest,
    upload_directory,
    version_uri,
)
from tasks.manifest import Manifest, manifest_json, parse_manifest
from tasks.settings import ServiceError, Settings, is_transient

MIB = 1 << 20
PART = 5 * MIB  # the fixture's, and the smallest that S3 takes
SMALL, LARGE = 100_007, 2 * PART + 7  # bytes of a file that is sent whole, and of one in three parts
SECRET = "not-the-secret"


def make(directory: Path, files: dict[str, bytes]) -> Path:
    for relative, content in files.items():
        path = directory / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@cache
def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def checkpoint(size: int = SMALL, seed: int = 0) -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "nemotron_h"}',
        "model-00001.safetensors": noise(size, seed),
        "model-00002.safetensors": noise(SMALL // 2, seed + 1),
        "empty": b"",
        "tokenizer/vocab ü.json": b"{}",
    }


@contextmanager
def requests_of(store: Store) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The S3 operations sent while the block runs, with their parameters."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        seen.append((model.name, dict(params)))

    store.client.meta.events.register("before-parameter-build.s3.*", note)
    try:
        yield seen
    finally:
        store.client.meta.events.unregister("before-parameter-build.s3.*", note)


@contextmanager
def failing(store: Store, operation: str, on_call: int) -> Iterator[None]:
    """Make one call of an operation fail as if the connection to S3 were lost."""
    calls = iter(range(1, 1_000_000))

    def fail(**_: Any) -> None:
        if next(calls) == on_call:
            raise ConnectionResetError("injected")

    event = f"before-parameter-build.s3.{operation}"
    store.client.meta.events.register(event, fail)
    try:
        yield
    finally:
        store.client.meta.events.unregister(event, fail)


def publish_one(store: Store, directory: Path, version: str = "1", **options: Any) -> Manifest:
    return publish(store, family="nano", version=version, directories={"s": directory}, metadata={"step": 7}, **options)


def uri_of(store: Store, version: str = "1") -> str:
    return manifest_uri(store.bucket, "nano", version)


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
    assert {name for name, _ in sent} == {"GetObject"}


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


def test_parts_that_a_killed_upload_left_are_cleared_away(store: Store, tmp_path: Path) -> None:
    def begin(key: str) -> None:
        upload = store.client.create_multipart_upload(Bucket=store.bucket, Key=key)["UploadId"]
        store.client.upload_part(Bucket=store.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")

    begin("families/nano/1/s/model.safetensors")
    begin("families/nano/1/s/model.safetensors.index")
    publish_one(store, make(tmp_path / "in", {"model.safetensors": noise(PART + 1)}))
    left = store.client.list_multipart_uploads(Bucket=store.bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["families/nano/1/s/model.safetensors.index"]


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


# Resuming and refusing


def interrupted_fetch(store: Store, out: Path) -> Path:
    """Where an interrupted fetch left its work, after the first of its files."""
    with failing(store, "GetObject", on_call=3), pytest.raises(ConnectionResetError):
        fetch(replace(store, workers=1), uri_of(store), "s", out)
    assert not out.exists()
    (work,) = out.with_name(f".{out.name}.partial").iterdir()
    return work


def test_a_fetch_that_was_cut_off_asks_only_for_the_rest(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", checkpoint()))
    work = interrupted_fetch(store, tmp_path / "out")
    assert contents(work)["config.json"] == checkpoint()["config.json"]
    make(work, {"model-00001.safetensors": checkpoint()["model-00001.safetensors"][:777]})
    with requests_of(store) as sent:
        fetch(store, uri_of(store), "s", tmp_path / "out")
    asked = {p["Key"].rpartition("/")[2]: p.get("Range") for name, p in sent if name == "GetObject"}
    assert "config.json" not in asked
    assert asked["model-00001.safetensors"] == "bytes=777-"
    assert contents(tmp_path / "out") == checkpoint()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("length", [777, SMALL, 2 * SMALL], ids=["prefix", "whole", "longer"])
def test_rotten_leftovers_are_fetched_anew(store: Store, tmp_path: Path, length: int) -> None:
    publish_one(store, make(tmp_path / "in", checkpoint()))
    make(interrupted_fetch(store, tmp_path / "out"), {"model-00001.safetensors": bytes(length)})
    fetch(store, uri_of(store), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == checkpoint()


def test_leftovers_of_another_version_are_not_mixed_in(store: Store, tmp_path: Path) -> None:
    for version in ("1", "2"):
        publish_one(store, make(tmp_path / version, {f"only-{version}": b"1", "both": noise(9, int(version))}), version)
    interrupted_fetch(store, tmp_path / "out")
    fetch(store, uri_of(store, "2"), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "2")


def test_a_body_that_breaks_off_is_continued(store: Store, settings: Settings, tmp_path: Path) -> None:
    files = {"model.safetensors": noise(4 * MIB)}
    publish_one(store, make(tmp_path / "in", files))
    with breaking_proxy(store.client.meta.endpoint_url, breaks=3, after=MIB) as endpoint:
        far = open_store(replace(settings, endpoint_url=endpoint))
        with closing(far.client), requests_of(far) as sent:
            fetch(far, uri_of(store), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert len([p for name, p in sent if name == "GetObject" and "Range" in p]) == 3


def test_a_directory_that_already_verifies_is_left_alone(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", checkpoint()))
    fetch(store, uri_of(store), "s", tmp_path / "out")
    with requests_of(store) as sent:
        fetch(store, uri_of(store), "s", tmp_path / "out")
    assert len(sent) == 1  # the manifest


@pytest.mark.parametrize(
    "change", [{"model-00002.safetensors": bytes(SMALL // 2)}, {"more": b""}], ids=["changed", "extra"]
)
def test_a_directory_with_something_else_in_it_is_refused(
    store: Store, tmp_path: Path, change: dict[str, bytes]
) -> None:
    publish_one(store, make(tmp_path / "in", checkpoint()))
    fetch(store, uri_of(store), "s", tmp_path / "out")
    make(tmp_path / "out", change)
    before = contents(tmp_path / "out")
    with pytest.raises(ServiceError, match="choose another directory"):
        fetch(store, uri_of(store), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_empty_directory_may_be_filled(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", {"a": b"1"}))
    (tmp_path / "out").mkdir()
    fetch(store, uri_of(store), "s", tmp_path / "out")
    assert contents(tmp_path / "out") == {"a": b"1"}


def test_two_fetches_into_one_directory_do_not_meet(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", {"a": b"1"}))
    holder = tmp_path / ".out.partial"
    holder.mkdir()
    handle = os.open(holder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(ServiceError, match="another process") as caught:
            fetch(store, uri_of(store), "s", tmp_path / "out")
    finally:
        os.close(handle)
    assert is_transient(caught.value)


def corrupt(store: Store, key: str) -> None:
    body = bytearray(store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    store.client.put_object(Bucket=store.bucket, Key=key, Body=bytes(body))


def cut(store: Store, key: str) -> None:
    body = store.client.get_object(Bucket=store.bucket, Key=key)["Body"].read()
    store.client.put_object(Bucket=store.bucket, Key=key, Body=body[:-1])


def delete(store: Store, key: str) -> None:
    store.client.delete_object(Bucket=store.bucket, Key=key)


@pytest.mark.parametrize(
    ("damage", "says"), [(corrupt, "SHA-256"), (cut, "not the expected"), (delete, "does not exist")]
)
def test_a_damaged_object_is_refused_and_nothing_appears(
    store: Store, tmp_path: Path, damage: Callable[[Store, str], None], says: str
) -> None:
    publish_one(store, make(tmp_path / "in", checkpoint()))
    damage(store, "families/nano/1/s/model-00002.safetensors")
    with pytest.raises(ServiceError, match=says) as caught:
        fetch(store, uri_of(store), "s", tmp_path / "out")
    assert "model-00002.safetensors" in str(caught.value) and not is_transient(caught.value)
    assert not (tmp_path / "out").exists()


def test_links_planted_in_the_leftovers_lead_nowhere(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", {"config.json": b"{}", "tokenizer/vocab.json": b"{}"}))
    work = interrupted_fetch(store, tmp_path / "out")
    shutil.rmtree(work / "tokenizer")
    victim = make(tmp_path / "victim", {"vocab.json": b"mine"})
    (work / "tokenizer").symlink_to(victim)
    with pytest.raises(ServiceError, match="symbolic link"):
        fetch(store, uri_of(store), "s", tmp_path / "out")
    (work / "tokenizer").unlink()
    (work / "tokenizer").mkdir()
    (work / "tokenizer" / "vocab.json").symlink_to(victim / "vocab.json")
    with pytest.raises(OSError, match="symbolic links"):
        fetch(store, uri_of(store), "s", tmp_path / "out")
    assert contents(victim) == {"vocab.json": b"mine"}


def test_an_unknown_part_is_named_with_those_there_are(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", {"a": b"1"}))
    with pytest.raises(ServiceError, match="no part 'm'; it has s"):
        fetch(store, uri_of(store), "m", tmp_path / "out")


# Manifests from outside

GOOD: dict[str, Any] = {
    "format_version": 1,
    "family": "nano",
    "version": "1",
    "files": [{"path": "s/config.json", "size": 2, "sha256": "0" * 64}],
    "metadata": {},
}


def with_file(**fields: Any) -> dict[str, Any]:
    return {**GOOD, "files": [{**GOOD["files"][0], **fields}]}


def with_paths(*paths: str) -> dict[str, Any]:
    return {**GOOD, "files": [{**GOOD["files"][0], "path": path} for path in paths]}


HOSTILE: dict[str, Any] = {
    "absolute": with_paths("/etc/passwd"),
    "parent": with_paths("s/../../x"),
    "parent-at-end": with_paths("s/.."),
    "dot": with_paths("s/./x"),
    "empty-component": with_paths("s//x"),
    "empty": with_paths(""),
    "trailing-slash": with_paths("s/x/"),
    "backslash": with_paths("s\\..\\x"),
    "drive": with_paths("C:/x"),
    "nul": with_paths("s/x\0"),
    "newline": with_paths("s/x\ny"),
    "lone-surrogate": with_paths("s/\ud800"),
    "too-long": with_paths("s/" + "x" * 1000),
    "too-deep": with_paths("/".join("s" * 100)),
    "twice": with_paths("s/x", "s/x"),
    "twice-on-a-mac": with_paths("s/X", "s/x"),
    "twice-in-unicode": with_paths("s/\u00e9", "s/e\u0301"),
    "file-and-directory": with_paths("s/x", "s/x/y"),
    "path-not-text": with_file(path=7),
    "size-negative": with_file(size=-1),
    "size-bool": with_file(size=True),
    "size-float": with_file(size=2.0),
    "size-huge": with_file(size=10**30),
    "digest-short": with_file(sha256="0" * 63),
    "digest-upper": with_file(sha256="A" * 64),
    "digest-missing": {**GOOD, "files": [{"path": "s/x", "size": 1}]},
    "file-extra-field": with_file(url="http://evil"),
    "files-empty": {**GOOD, "files": []},
    "files-object": {**GOOD, "files": {}},
    "files-too-many": {**GOOD, "files": [GOOD["files"][0]] * 20_000},
    "metadata-list": {**GOOD, "metadata": []},
    "field-missing": {key: value for key, value in GOOD.items() if key != "metadata"},
    "field-extra": {**GOOD, "run": "rm -rf"},
    "format-future": {**GOOD, "format_version": 2, "anything": 1},
    "format-text": {**GOOD, "format_version": "1"},
    "format-true": {**GOOD, "format_version": True},
    "family-path": {**GOOD, "family": "../x"},
    "version-number": {**GOOD, "version": 1},
    "not-an-object": [1],
    "not-json": b"{",
    "not-text": b"\xff\xfe",
    "nested-deep": b"[" * 100_000,
    "number-endless": b'{"format_version": ' + b"9" * 10_000 + b"}",
    "key-twice": json.dumps(GOOD).replace('"metadata"', '"family"').encode(),
    "nothing": b"",
}


def test_the_table_of_hostile_manifests_starts_from_a_good_one() -> None:
    assert parse_manifest(json.dumps(GOOD).encode(), "here").files[0].path == "s/config.json"


@pytest.mark.parametrize("document", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_refused_in_one_line(document: Any) -> None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(ServiceError, match=r"^s3://b/k") as caught:
        parse_manifest(body, "s3://b/k")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not is_transient(caught.value)


def test_a_hostile_manifest_in_the_bucket_writes_nothing(store: Store, tmp_path: Path) -> None:
    store.client.put_object(Bucket=store.bucket, Key="families/nano/evil", Body=b"owned")
    body = json.dumps({**GOOD, "files": [{"path": "s/../evil", "size": 5, "sha256": "0" * 64}]})
    store.client.put_object(Bucket=store.bucket, Key="families/nano/1/manifest.json", Body=body.encode())
    with pytest.raises(ServiceError, match="component"):
        fetch(store, uri_of(store), "s", tmp_path / "out" / "s")
    assert not (tmp_path / "out").exists()


def test_an_oversize_manifest_is_not_read(store: Store, tmp_path: Path) -> None:
    store.client.put_object(Bucket=store.bucket, Key="families/nano/1/manifest.json", Body=bytes(5 * MIB))
    with pytest.raises(ServiceError, match="larger than"):
        read_manifest(store, uri_of(store))


def test_a_manifest_that_was_copied_to_another_version_is_refused(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", {"a": b"1"}))
    body = store.client.get_object(Bucket=store.bucket, Key="families/nano/1/manifest.json")["Body"].read()
    store.client.put_object(Bucket=store.bucket, Key="families/nano/2/manifest.json", Body=body)
    with pytest.raises(ServiceError, match="copied or edited"):
        read_manifest(store, uri_of(store, "2"))


# Plain objects and prefixes


def test_a_prefix_without_a_manifest_comes_back_with_its_digests(store: Store, tmp_path: Path) -> None:
    source = make(tmp_path / "in", checkpoint())
    uploaded = upload_directory(store, source, f"s3://{store.bucket}/teachers/nano/")
    upload_directory(store, make(tmp_path / "other", {"x": b"1"}), f"s3://{store.bucket}/teachers/nano-2")
    got = download_prefix(store, f"s3://{store.bucket}/teachers/nano", tmp_path / "out")
    assert sorted(got, key=lambda f: f.path) == sorted(uploaded, key=lambda f: f.path)
    assert contents(tmp_path / "out") == checkpoint()
    with pytest.raises(ServiceError, match="not empty"):
        download_prefix(store, f"s3://{store.bucket}/teachers/nano", tmp_path / "out")
    with pytest.raises(ServiceError, match="holds no objects"):
        download_prefix(store, f"s3://{store.bucket}/teachers/nan", tmp_path / "none")


def test_a_listing_names_every_object_and_changes_with_its_bytes(store: Store, tmp_path: Path) -> None:
    uri = f"s3://{store.bucket}/data"
    upload_directory(store, make(tmp_path / "in", {"b/c.jsonl": b"1", "a.jsonl": b"2"}), uri)
    listed = list_objects(store, uri)
    assert [path for path, _ in listed] == ["a.jsonl", "b/c.jsonl"]
    store.client.put_object(Bucket=store.bucket, Key="data/a.jsonl", Body=b"3")
    assert list_objects(store, uri) == list_objects(store, f"{uri}/") != listed


def test_one_object_is_downloaded_by_its_own_uri(store: Store, tmp_path: Path) -> None:
    for key in ("data/corpus.jsonl", "top"):
        store.client.put_object(Bucket=store.bucket, Key=key, Body=b"{}")
        name = key.rpartition("/")[2]
        assert [path for path, _ in list_objects(store, f"s3://{store.bucket}/{key}")] == [name]
        download_prefix(store, f"s3://{store.bucket}/{key}", tmp_path / name)
        assert contents(tmp_path / name) == {name: b"{}"}


def test_a_prefix_download_is_continued(store: Store, tmp_path: Path) -> None:
    upload_directory(store, make(tmp_path / "in", checkpoint()), f"s3://{store.bucket}/t")
    with failing(store, "GetObject", on_call=3), pytest.raises(ConnectionResetError):
        download_prefix(replace(store, workers=1), f"s3://{store.bucket}/t", tmp_path / "out")
    (work,) = (tmp_path / ".out.partial").iterdir()
    make(work, {"model-00002.safetensors": checkpoint()["model-00002.safetensors"][:777]})
    with requests_of(store) as sent:
        download_prefix(store, f"s3://{store.bucket}/t", tmp_path / "out")
    assert "bytes=777-" in [p.get("Range") for name, p in sent if name == "GetObject"]
    assert contents(tmp_path / "out") == checkpoint()


def test_a_key_that_no_path_can_be_made_of_is_refused(store: Store, tmp_path: Path) -> None:
    store.client.put_object(Bucket=store.bucket, Key="t/C:boot.ini", Body=b"1")
    with pytest.raises(ServiceError, match="drive letter"):
        download_prefix(store, f"s3://{store.bucket}/t", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_comes_back_and_replaces_the_old_one_when_whole(store: Store, tmp_path: Path) -> None:
    uri = f"s3://{store.bucket}/data/corpus.jsonl"
    assert not exists(store, uri)
    sent = put_file(store, make(tmp_path, {"corpus.jsonl": noise(PART + 3)}) / "corpus.jsonl", uri)
    assert exists(store, uri)
    target = make(tmp_path / "cache", {"c.jsonl": b"old"}) / "c.jsonl"
    assert get_file(store, uri, target).sha256 == sent.sha256
    assert contents(tmp_path / "cache") == {"c.jsonl": noise(PART + 3)}
    with pytest.raises(ServiceError, match="does not exist"):
        get_file(store, f"{uri}.gz", target)


@pytest.mark.parametrize("uri", ["", "models/x", "http://bucket/x", "s3://", "s3:///x", "S3//x"])
def test_what_is_no_s3_uri_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="not an S3 URI"):
        parse_uri(uri)


def test_an_s3_uri_is_a_bucket_and_a_key() -> None:
    assert parse_uri("s3://bucket/a/b c@d") == ("bucket", "a/b c@d")
    assert parse_uri("s3://bucket") == ("bucket", "")


# Access


def test_a_usable_bucket_passes_the_check_and_stays_empty(settings: Settings) -> None:
    check_bucket(settings)
    assert open_store(settings).client.list_objects_v2(Bucket=settings.bucket)["KeyCount"] == 0


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


BAD_ACCESS: dict[str, tuple[dict[str, str], dict[str, str], str, bool]] = {
    "wrong-secret": ({"AWS_SECRET_ACCESS_KEY": SECRET}, {}, "rejects the key", False),
    "unknown-key": ({"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": SECRET}, {}, "rejects the key", False),
    "no-profile": ({"AWS_PROFILE": "none-such"}, {}, "no S3 credentials", False),
    "may-only-read": (
        {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"},
        {},
        "to PutObject; this key may not",
        False,
    ),
    "no-bucket": ({}, {"bucket": "no-such-bucket"}, "bucket does not exist", False),
    "closed-port": ({}, {"endpoint_url": "http://user:hunter2@127.0.0.1:{port}"}, "cannot reach S3", True),
    "no-tls": ({}, {"endpoint_url": "https://127.0.0.1:{live}"}, "TLS fails", False),
}


@pytest.mark.parametrize(("variables", "changes", "says", "transient"), BAD_ACCESS.values(), ids=BAD_ACCESS.keys())
def test_bad_access_is_one_line_that_holds_no_secret(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    changes: dict[str, str],
    says: str,
    transient: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    live = (settings.endpoint_url or "").rpartition(":")[2]
    filled = {key: value.format(port=closed_port(), live=live) for key, value in changes.items()}
    with pytest.raises(ServiceError, match=says) as caught:
        check_bucket(replace(settings, **filled))
    line = str(caught.value)
    assert "\n" not in line and SECRET not in line and "hunter2" not in line and "Signature=" not in line
    assert is_transient(caught.value) == transient


def test_a_server_that_overwrites_is_found_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    real = open_store(settings)

    def forget(params: dict[str, Any], **_: Any) -> None:
        params.pop("IfNoneMatch", None)

    real.client.meta.events.register("before-parameter-build.s3.PutObject", forget)
    monkeypatch.setattr("tasks.artifacts.open_store", lambda *_, **__: real)
    with pytest.raises(ServiceError, match="ignores If-None-Match"):
        check_bucket(settings)


@contextmanager
def breaking_proxy(upstream: str, *, breaks: int, after: int) -> Iterator[str]:
    """A way to the server that breaks `breaks` connections, each when so many bytes of answers have passed."""
    left = iter(range(breaks))
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def pump(source: socket.socket, sink: socket.socket, limit: float) -> None:
            passed = 0
            with suppress(OSError):
                while chunk := source.recv(65536):
                    passed += len(chunk)
                    if passed > limit and next(left, None) is not None:
                        break
                    sink.sendall(chunk)
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    client = stack.enter_context(listener.accept()[0])
                    server = stack.enter_context(socket.create_connection(urlsplit(upstream).netloc.split(":")))
                    for arguments in ((client, server, float("inf")), (server, client, after)):
                        thread = threading.Thread(target=pump, args=arguments)
                        thread.start()
                        stack.callback(thread.join)
                        stack.callback(client.close)

        acceptor = threading.Thread(target=serve)
        acceptor.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join()
