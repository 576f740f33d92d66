"""Laws of the fault tests' own reader: an error that passes is a server that is away, and one that stays is a fault."""

from collections.abc import Callable
from typing import Any

import laws
import pytest
from botocore.exceptions import ClientError


def answering(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], list[str]]) -> None:
    looks = iter(range(10**6))
    monkeypatch.setattr(laws, "partial_versions", lambda place: answer(next(looks)))


def refused(code: str) -> Any:
    raise ClientError({"Error": {"Code": code}}, "GetObject")


def watch_a_moment() -> laws.Watch:
    nobody: Any = None
    with laws.watching(nobody) as watch:
        while watch.looks + watch.errors.total() < 3:
            pass
    return watch


def test_a_server_that_comes_back_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda look: refused("ServiceUnavailable") if look == 1 else [])
    watch = watch_a_moment()
    assert watch.looks >= 2 and watch.errors.total() == 1 and not watch.partial


def test_an_error_that_stays_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda look: refused("NoSuchKey") if look else [])
    monkeypatch.setattr(laws, "LAST_LOOK_SECONDS", 0.0)
    with pytest.raises(ClientError, match="NoSuchKey"):
        watch_a_moment()


def test_what_is_partial_at_the_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda look: ["half a version"] if look > 2 else [])
    with pytest.raises(AssertionError, match="half a version"):
        watch_a_moment()
