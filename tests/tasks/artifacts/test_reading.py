"""An object that is read in ranges reads as the file that it was, and not as what replaced it."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
from botocore.response import StreamingBody
from objects import noise

from tasks.artifacts import Store, open_object, reading
from tasks.artifacts.fetching import STREAM_ATTEMPTS
from tasks.settings import ServiceError

BODY = noise(300_007)


@pytest.fixture
def uri(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(reading, "READ_BYTES", 1000)
    store.client.put_object(Bucket=store.bucket, Key="data/noise", Body=BODY)
    return f"s3://{store.bucket}/data/noise"


def test_any_part_is_read_as_of_the_file(uri: str, store: Store) -> None:
    draw = random.Random(0)
    with open_object(store, uri) as ours, io.BytesIO(BODY) as theirs:
        for _ in range(60):
            place, whence = draw.choice([(draw.randrange(400_000), 0), (draw.randrange(2000), 1), (-5000, 2)])
            assert ours.seek(place, whence) == theirs.seek(place, whence)
            length = draw.choice([0, 1, 10, 999, 1000, 5000])
            assert ours.read(length) == theirs.read(length) and ours.tell() == theirs.tell()
            assert ours.readline() == theirs.readline()
        assert ours.seek(0) == 0 and ours.read() == BODY


def test_no_more_is_asked_for_than_what_is_read(uri: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    get = store.client.get_object
    monkeypatch.setattr(store.client, "get_object", lambda **given: asked.append(given["Range"]) or get(**given))
    with open_object(store, uri) as file:
        file.seek(200_000)
        file.read(500)
        assert asked == ["bytes=200000-200999"]
        file.seek(0)
        assert len(file.read()) == len(BODY) and len(asked) == 2, "all of it is one request"


def test_an_object_that_was_replaced_is_not_read_on(uri: str, store: Store) -> None:
    with open_object(store, uri) as file:
        assert file.read(10) == BODY[:10]
        store.client.put_object(Bucket=store.bucket, Key="data/noise", Body=BODY[::-1])
        file.seek(200_000)
        with pytest.raises(ServiceError, match=f"^{uri} was replaced while it was read; run again$") as replaced:
            file.read(10)
    assert not replaced.value.transient
    etag = store.client.head_object(Bucket=store.bucket, Key="data/noise")["ETag"]
    with open_object(store, uri, etag) as file:
        assert file.read(10) == BODY[:-11:-1]
    with pytest.raises(ServiceError, match="was replaced"):
        open_object(store, uri, '"of before"')


def test_what_a_listing_has_told_is_not_asked_for(uri: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    known = store.client.head_object(Bucket=store.bucket, Key="data/noise")
    monkeypatch.setattr(store.client, "head_object", None)
    with open_object(store, uri, known["ETag"], known["ContentLength"]) as file:
        assert file.read() == BODY
    with (
        open_object(store, uri, '"of before"', len(BODY)) as file,
        pytest.raises(ServiceError, match=r"was replaced while it was read; run again$"),
    ):
        file.read(10)


def test_an_object_that_is_not_there_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=rf"^s3://{store.bucket}/none does not exist$"):
        open_object(store, f"s3://{store.bucket}/none")


def test_an_answer_that_breaks_off_is_asked_for_again_and_not_for_ever(
    uri: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = [True, True, False] + [True] * STREAM_ATTEMPTS
    get = store.client.get_object

    def answer(**given: Any) -> Any:
        found = get(**given)
        if breaks.pop(0):
            found["Body"] = StreamingBody(io.BytesIO(found["Body"].read()[:-1]), found["ContentLength"])
        return found

    monkeypatch.setattr(store.client, "get_object", answer)
    with open_object(store, uri) as file:
        assert file.read(2000) == BODY[:2000]
        with pytest.raises(ServiceError, match=r"cannot reach S3 \(IncompleteReadError\)") as broke:
            file.read(1000)
    assert broke.value.transient and not breaks
