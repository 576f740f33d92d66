"""Laws of the Hub, beside one of our own: which commit a name means, who is asked for it, and what is brought here."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hub import Hub, serving_hub
from huggingface_hub import close_session, constants, snapshot_download

from tasks.corpus.hub import HubPath, bring_config, bring_model, commit_of, parse_dataset, parse_model
from tasks.running import patience
from tasks.running.loopback import free_ports
from tasks.settings import HOME

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "model.safetensors": b"w" * 1000, "tokenizer.json": b"{}", "pytorch_model.bin": b"p"}

PATTERNS = ["*.json", "*.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """As HF_ENDPOINT and HF_HOME have it, which the Hub's client reads when it is imported."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(patience, "DELAYS", (0.01,))
    monkeypatch.setattr(patience, "RETRIES", 3)
    with serving_hub(FILES, COMMIT) as hub:
        point_to(hub.url, monkeypatch)
        yield hub
    close_session()


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()  # it was made when there was a network
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def fetch(path: str, directory: Path | None = None) -> str:
    """What a run does with a teacher: ask which commit it is, waiting where that helps, and bring it here."""
    hub = parse_model(path)
    commit = patience.patiently("teacher", partial(commit_of, hub))
    if directory is not None:
        bring_model(hub, commit, PATTERNS, directory)
    return commit


@pytest.mark.parametrize("name", ["org/name", "hf://org/name", "org/name@main", f"org/name@{COMMIT}"])
def test_a_teacher_is_brought_whole_as_files_of_its_own(name: str, hub: Hub, tmp_path: Path) -> None:
    assert fetch(name, tmp_path / "teacher") == COMMIT
    brought = sorted((tmp_path / "teacher").iterdir())
    assert {path.name: path.read_bytes() for path in brought} == {
        name: content for name, content in FILES.items() if name != "pytorch_model.bin"
    }
    assert not any(path.is_symlink() for path in brought)


def test_a_commit_is_a_commit_and_nobody_is_asked_which(hub: Hub) -> None:
    assert fetch(f"org/name@{COMMIT}") == COMMIT
    assert hub.asked == []


def test_a_busy_hub_is_waited_for_with_a_line(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    hub.first = [503]
    assert fetch("org/name") == COMMIT
    (line,) = caplog.messages
    assert line.startswith("teacher: teacher.path 'org/name': the Hub does not answer (Server error '503")
    assert line.endswith("(attempt 2 of 4)")


@pytest.mark.parametrize("away", ["offline", "down"])
def test_what_was_seen_before_is_used_without_the_hub_and_said(
    away: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetch("org/name", tmp_path / "first")
    asked = len(hub.asked)
    if away == "offline":
        go_offline(monkeypatch)
    else:
        point_to(f"http://127.0.0.1:{free_ports(1)[0]}", monkeypatch)
    caplog.clear()
    assert fetch("org/name", tmp_path / "second") == COMMIT
    (line,) = (record.getMessage() for record in caplog.records if record.name == "tasks.corpus.hub")
    assert "the Hub is not asked (" in line and f"its commit {COMMIT}, seen last, is used" in line
    assert len(hub.asked) == asked
    assert (tmp_path / "second/model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_teacher_that_somebody_else_put_into_the_cache_is_found_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download("org/name")
    go_offline(monkeypatch)
    fetch("org/name", tmp_path / "teacher")
    assert (tmp_path / "teacher/config.json").read_bytes() == FILES["config.json"]


@pytest.mark.parametrize(
    ("name", "offline", "says"),
    [
        ("org/name", True, "unset HF_HUB_OFFLINE, or download it to the Hub's cache"),
        ("org/other", False, "correct it, or set HF_TOKEN to a token of an account that may read it"),
        ("org/name/more", False, "its names are org/name or org/name@revision); correct it"),
    ],
    ids=["offline", "unknown", "no name"],
)
def test_what_the_hub_does_not_give_is_refused_at_once_in_one_line(
    name: str,
    offline: bool,
    says: str,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if offline:
        go_offline(monkeypatch)
    with pytest.raises(
        ValueError, match=re.escape(f"teacher.path '{name}' is not here, and the Hub does not")
    ) as caught:
        fetch(name)
    assert str(caught.value).endswith(says) and "\n" not in str(caught.value)
    assert not caplog.messages, "nothing was tried again"


def test_the_geometry_of_a_teacher_needs_one_small_file(hub: Hub, tmp_path: Path) -> None:
    bring_config(parse_model(f"org/name@{COMMIT}"), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == FILES["config.json"]
    assert {path.rpartition("/")[2] for path in hub.asked} == {"config.json"}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://org/name", ("org/name", None, None)),
        ("hf://datasets/org/name", ("org/name", None, None)),
        ("hf://datasets/org/name/config@v1.0", ("org/name", "config", "v1.0")),
        ("hf://org/name@refs/convert/parquet", ("org/name", None, "refs/convert/parquet")),
    ],
)
def test_a_dataset_is_named_with_or_without_its_kind(path: str, expected: tuple[str | None, ...]) -> None:
    hub = parse_dataset(path)
    assert (hub.repository, hub.config, hub.revision) == expected


def test_a_model_is_pinned_by_its_revision() -> None:
    assert parse_model("hf://org/name@v2") == HubPath(
        setting="teacher.path 'hf://org/name@v2'", kind="model", repository="org/name", revision="v2"
    )


@pytest.mark.parametrize("path", ["./nosuch", "../nosuch", "/nosuch", "~/nosuch"])
def test_a_path_of_this_machine_is_not_asked_of_the_hub(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^teacher\.path '.*nosuch' is not here: there is no such directory; correct"):
        parse_model(path)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"config\.json' is a file; name its directory$"):
        parse_model(str(tmp_path / "config.json"))
