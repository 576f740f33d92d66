"""`elastic gc` with a real store and a real registry: what it asks, what it removes, and what it says of the rest."""

from collections.abc import Callable
from pathlib import Path

import pytest
from objects import make, stored

from flows.commands.garbage import collect
from flows.commands.terminal import confirmed
from tasks import tracking
from tasks.artifacts import REGISTRY, Store, publish
from tasks.settings import Settings

OLD = -1.0  # days: everything was last used before tomorrow


def never(question: str) -> bool:
    raise AssertionError(f"asked: {question}")


def publish_for(registry: str, version: str, store: Store, directory: Path) -> None:
    source = make(directory / version, {"a": b"12345"})
    metadata = {REGISTRY: {"id": registry, "uri": f"http://{registry}"}}
    publish(store, family="nano", version=version, directories={"s": source}, metadata=metadata)


@pytest.fixture
def published(settings: Settings, store: Store, tmp_path: Path) -> set[str]:
    """A version of this registry and one of another, to which nothing points; the versions that are there."""
    publish_for(tracking.identity(settings.registry), "ours", store, tmp_path)
    publish_for("theirs", "theirs", store, tmp_path)
    return {"ours", "theirs"}


def versions(store: Store) -> set[str]:
    return {key.split("/")[2] for key in stored(store)}


def gc(settings: Settings, *, delete: bool = True, confirm: Callable[[str], bool] = never) -> None:
    collect(settings, older_than_days=OLD, max_bytes=None, delete=delete, confirm=confirm)


def test_a_published_version_goes_only_after_a_yes_and_another_registrys_never(
    published: set[str], settings: Settings, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    for answer, left in ((False, published), (True, {"theirs"})):
        gc(settings, confirm=lambda question, answer=answer: asked.append(question) or answer)
        assert versions(store) == left
        said = " ".join(capsys.readouterr().out.split())
        assert "published for the registry http://theirs" in said
        assert ("kept: not confirmed" in said) == (not answer)
    assert len(asked) == 2 and "Remove 1 published version(s)" in asked[0] and settings.bucket in asked[0]
    gc(settings)  # nothing is left to ask about


def test_listing_asks_nothing_and_removes_nothing(published: set[str], settings: Settings, store: Store) -> None:
    gc(settings, delete=False)
    assert versions(store) == published


def test_where_nobody_can_answer_yes_has_to_be_said_on_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(ValueError, match=r"^Remove\? Nobody is there to say so: add --yes$"):
        confirmed(False)("Remove?")
    assert confirmed(True)("Remove?")
