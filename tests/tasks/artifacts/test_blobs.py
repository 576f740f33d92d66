"""Laws of files by content: sent once, as they were recorded or not at all, and never taken for what they are not."""

import base64
import hashlib
import io
from pathlib import Path

import pytest
from botocore.awsrequest import AWSRequest, AWSResponse, HeadersDict
from objects import LARGE, bytes_of, contents, make, noise, requests_of, stored
from urllib3 import HTTPResponse

from tasks.artifacts import NotAsRecorded, Store
from tasks.artifacts.blobs import Blobs
from tasks.settings import ServiceError

FILES = {"config.json": b"{}", "model.safetensors": noise(LARGE), "below/empty": b""}
RECORDED = {name: hashlib.sha256(body).hexdigest() for name, body in FILES.items()}


@pytest.fixture
def blobs(store: Store) -> Blobs:
    return Blobs(store=store, root="shared/blobs/")


def test_what_is_there_is_not_sent_again_whatever_it_is_called(blobs: Blobs, tmp_path: Path) -> None:
    blobs.put(make(tmp_path / "in", FILES), RECORDED)
    again = make(tmp_path / "again", {"renamed.json": b"{}", "new": b"new"})
    recorded = {"renamed.json": RECORDED["config.json"], "new": hashlib.sha256(b"new").hexdigest()}
    with requests_of(blobs.store) as sent:
        blobs.put(again, recorded)
    assert [of["Key"] for name, of in sent if name == "PutObject"] == [f"shared/blobs/{recorded['new']}"]
    assert blobs.sizes(RECORDED.values()) == {RECORDED[name]: len(body) for name, body in FILES.items()}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_bytes_than_recorded_never_become_an_object(blobs: Blobs, tmp_path: Path, name: str) -> None:
    directory = make(tmp_path / "in", {**FILES, name: FILES[name][:-1] + b"!"})
    with pytest.raises(NotAsRecorded, match=rf"{name} is damaged"):
        blobs.put(directory, {name: RECORDED[name]})
    assert not stored(blobs.store)


def test_a_fetch_that_was_killed_goes_on_where_it_was(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.put(make(tmp_path / "in", FILES), RECORDED)
    monkeypatch.setattr("tasks.artifacts.fetching.holds_exactly", lambda *_: pytest.fail("no manifest here"))
    partial = tmp_path / "out"
    with monkeypatch.context() as killing:
        killing.setattr("tasks.artifacts.staging.os.rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            blobs.fetch(RECORDED, partial)
    with bytes_of(blobs.store) as fetched:
        blobs.fetch(RECORDED, partial)
    assert contents(partial) == FILES and sum(fetched) == 0


def test_a_flipped_bit_in_the_store_is_refused_and_leaves_room_for_the_right_one(blobs: Blobs, tmp_path: Path) -> None:
    directory = make(tmp_path / "in", FILES)
    blobs.put(directory, RECORDED)
    key = f"shared/blobs/{RECORDED['model.safetensors']}"
    spoiled = bytearray(FILES["model.safetensors"])
    spoiled[LARGE // 2] ^= 1
    blobs.store.client.put_object(Bucket=blobs.store.bucket, Key=key, Body=bytes(spoiled))
    with pytest.raises(ServiceError, match=rf"{key} is corrupt: .* on record; it was removed there: run again"):
        blobs.fetch(RECORDED, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ServiceError, match=rf"{key} does not exist"):
        blobs.fetch(RECORDED, tmp_path / "out")
    blobs.put(directory, RECORDED)
    blobs.fetch(RECORDED, tmp_path / "out")
    assert contents(tmp_path / "out") == FILES


@pytest.mark.parametrize("times", [1, 99], ids=["on the way", "in the store"])
def test_bytes_that_the_stores_own_checksum_finds_out_are_read_again_and_then_removed(
    blobs: Blobs, store: Store, tmp_path: Path, times: int
) -> None:
    """As AWS answers where it keeps a checksum: botocore compares it with what came."""
    body, left = noise(1000), [times]
    digest = hashlib.sha256(body).hexdigest()
    blobs.put(make(tmp_path / "in", {"f": body}), {"f": digest})
    checksum = base64.b64encode(hashlib.sha256(body).digest()).decode()
    headers = {"content-length": "1000", "etag": '"1"', "x-amz-checksum-sha256": checksum}

    def spoilt(request: AWSRequest, **_: object) -> AWSResponse | None:
        if not left[0]:
            return None
        left[0] -= 1
        sent = HTTPResponse(io.BytesIO(b"y" + body[1:]), headers=headers, status=200, preload_content=False)
        return AWSResponse(request.url, 200, HeadersDict(headers), sent)

    store.client.meta.events.register("before-send.s3.GetObject", spoilt)
    try:
        if times == 1:
            blobs.fetch({"f": digest}, tmp_path / "out")
            assert contents(tmp_path / "out") == {"f": body}
        else:
            with pytest.raises(ServiceError, match=r"is corrupt: .*it was removed there: run again, it is"):
                blobs.fetch({"f": digest}, tmp_path / "out")
            assert not stored(store)
    finally:
        store.client.meta.events.unregister("before-send.s3.GetObject", spoilt)
