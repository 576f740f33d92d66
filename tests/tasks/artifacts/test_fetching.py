"""Laws of fetching, against a real S3 server."""

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from objects import (
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
from proxy import fault_proxy

from tasks.artifacts import (
    Store,
    download_prefix,
    fetch,
    get_file,
    list_objects,
    open_store,
    put_file,
    read_manifest,
    upload_directory,
)
from tasks.artifacts.staging import staged
from tasks.settings import ServiceError, Settings, is_transient


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
    with staged(tmp_path / "out", "another's"), pytest.raises(ServiceError, match="another process") as caught:
        fetch(store, uri_of(store), "s", tmp_path / "out")
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


def test_an_object_that_the_manifest_does_not_list_is_named_and_nothing_is_fetched(
    store: Store, tmp_path: Path
) -> None:
    publish_one(store, make(tmp_path / "in", {"a": b"1"}))
    store.client.put_object(Bucket=store.bucket, Key="families/nano/1/s/modeling.py", Body=b"import os")
    with pytest.raises(ServiceError, match=r"s/modeling\.py is not in the manifest"):
        fetch(store, uri_of(store), "s", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_link_to_a_directory_is_something_else_in_it(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", {"a": b"1"}))
    fetch(store, uri_of(store), "s", tmp_path / "out")
    (tmp_path / "out" / "more").symlink_to(tmp_path / "in")
    with pytest.raises(ServiceError, match="choose another directory"):
        fetch(store, uri_of(store), "s", tmp_path / "out")


def test_an_unknown_part_is_named_with_those_there_are(store: Store, tmp_path: Path) -> None:
    publish_one(store, make(tmp_path / "in", {"a": b"1"}))
    with pytest.raises(ServiceError, match="no part 'm'; it has s"):
        fetch(store, uri_of(store), "m", tmp_path / "out")


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
    assert [found.path for found in listed] == ["a.jsonl", "b/c.jsonl"]
    store.client.put_object(Bucket=store.bucket, Key="data/a.jsonl", Body=b"3")
    assert list_objects(store, uri) == list_objects(store, f"{uri}/") != listed


def test_one_object_is_downloaded_by_its_own_uri(store: Store, tmp_path: Path) -> None:
    for key in ("data/corpus.jsonl", "top"):
        store.client.put_object(Bucket=store.bucket, Key=key, Body=b"{}")
        name = key.rpartition("/")[2]
        assert [found.path for found in list_objects(store, f"s3://{store.bucket}/{key}")] == [name]
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


# Manifests in the bucket


def test_a_hostile_manifest_in_the_bucket_writes_nothing(store: Store, tmp_path: Path) -> None:
    store.client.put_object(Bucket=store.bucket, Key="families/nano/evil", Body=b"owned")
    evil = {"path": "s/../evil", "size": 5, "sha256": "0" * 64}
    good = {"format_version": 1, "family": "nano", "version": "1", "metadata": {}}
    body = json.dumps({**good, "files": [evil]})
    store.client.put_object(Bucket=store.bucket, Key="families/nano/1/manifest.json", Body=body.encode())
    with pytest.raises(ServiceError, match="component"):
        fetch(store, uri_of(store), "s", tmp_path / "out" / "s")
    assert not (tmp_path / "out").exists()


def test_a_manifest_whose_answer_breaks_off_may_be_asked_for_again(
    store: Store, settings: Settings, tmp_path: Path
) -> None:
    published = publish_one(store, make(tmp_path / "in", {"a": b"1"}))
    faults = chain(["truncate"], repeat("none"))
    with fault_proxy(settings.endpoint_url, 0.0) as network:
        network.next_fault = lambda: next(faults)
        far = open_store(replace(settings, endpoint_url=network.url))
        with closing(far.client):
            with pytest.raises(ServiceError, match="broke off") as raised:
                read_manifest(far, uri_of(store))
            assert is_transient(raised.value)
            assert read_manifest(far, uri_of(store)) == published


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
