"""The Hugging Face Hub: what a path means there, which commit that is now, and its files brought here."""

import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from elastic_core.files.directories import staged_directory
from tasks.settings import ServiceError, home_directory, is_transient

HUB = "hf://"
ANSWER_SECONDS = 20.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MODEL = re.compile(r"[\w.-]+(?:/[\w.-]+)?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubPath:
    """A repository of the Hub as a recipe names it; `setting` is the recipe's own text, for messages."""

    setting: str
    kind: Literal["model", "dataset"]
    repository: str
    config: str | None = None
    revision: str | None = None

    @property
    def commit(self) -> str | None:
        """The commit, where the revision is one: it can never mean anything else."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None


def parse_model(path: str) -> HubPath:
    """`org/name[@revision]`, with or without hf:// before it; a ValueError for what the Hub has no name for."""
    setting = f"teacher.path {path!r}"
    if Path(path).is_file():
        raise ValueError(f"{setting} is a file; name its directory")
    if path.startswith((".", "/", "~")):
        raise ValueError(f"{setting} is not here: there is no such directory; correct it")
    name, _, revision = path.removeprefix(HUB).partition("@")
    if not _MODEL.fullmatch(name):
        raise ValueError(
            f"{setting} is not here, and the Hub does not give it (its names are org/name or org/name@revision); "
            "correct it"
        )
    return HubPath(setting=setting, kind="model", repository=name, revision=revision or None)


def parse_dataset(path: str) -> HubPath:
    """`hf://[datasets/]org/name[/config][@revision]`."""
    name, _, revision = path.removeprefix(HUB).removeprefix("datasets/").partition("@")
    org, _, rest = name.partition("/")
    repository, _, config = rest.partition("/")
    if not org or not repository:
        raise ValueError(f"{path}: a Hub dataset is hf://org/name or hf://org/name/config; correct the path")
    return HubPath(
        setting=f"data.sources {path!r}",
        kind="dataset",
        repository=f"{org}/{repository}",
        config=config or None,
        revision=revision or None,
    )


def commit_of(hub: HubPath) -> str:
    """The commit that a path means now.

    A commit means itself, and nobody is asked. Where the Hub is away or offline mode is on, it is the commit that was
    seen here last, with a warning; a transient ServiceError or a ValueError where none was seen.
    """
    if hub.commit is not None:
        return hub.commit
    try:
        info = HfApi().repo_info(hub.repository, repo_type=hub.kind, revision=hub.revision, timeout=ANSWER_SECONDS)
    except Exception as error:
        away = is_transient(error) or constants.HF_HUB_OFFLINE
        known = _last_seen(hub) if away else None
        if known is None:
            raise _refused(hub, error) from error
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _said(error)
        logger.warning("%s: the Hub is not asked (%s); its commit %s, seen last, is used", hub.setting, why, known)
        return known
    assert info.sha is not None, "the Hub gives the commit of a revision"
    _remember(hub, info.sha)
    return info.sha


def bring_model(hub: HubPath, commit: str, patterns: list[str], directory: Path) -> None:
    """Put the files of a commit into a new directory: hard links to the Hub's cache where that is on the same disk.

    Links into the cache itself would be of no use to another host, and break when the cache is cleared.
    """
    with _explained(hub):
        snapshot = Path(snapshot_download(hub.repository, revision=commit, allow_patterns=patterns))
    with staged_directory(directory) as staging:
        for file in sorted(path for path in snapshot.rglob("*") if path.is_file()):
            place = staging / file.relative_to(snapshot)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(file.resolve(), place)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(file, place)


def bring_config(hub: HubPath, directory: Path) -> None:
    """Put the config.json of a model into `directory`."""
    commit = commit_of(hub)  # asked once: a download asks a Hub that is away for half a minute
    with _explained(hub):
        shutil.copy(hf_hub_download(hub.repository, "config.json", revision=commit), directory)


@contextmanager
def _explained(hub: HubPath) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _refused(hub, error) from error


def _refused(hub: HubPath, error: Exception) -> Exception:
    """One line for what the Hub, or the way to it, answers: transient where it is busy or away."""
    if is_transient(error):
        return ServiceError(f"{hub.setting}: the Hub does not answer ({_said(error)})", transient=True)
    if isinstance(error, GatedRepoError | RepositoryNotFoundError):
        remedy = "correct it, or set HF_TOKEN to a token of an account that may read it"
    elif constants.HF_HUB_OFFLINE:
        remedy = "unset HF_HUB_OFFLINE, or download it to the Hub's cache"
    else:
        remedy = "correct it, or see to the access to the Hub"
    return ValueError(f"{hub.setting} is not here, and the Hub does not give it ({_said(error)}); {remedy}")


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _remembered(hub: HubPath) -> Path:
    return home_directory() / "hub" / quote(f"{hub.kind} {hub.repository}@{hub.revision or 'main'}", safe="@ ")


def _remember(hub: HubPath, commit: str) -> None:
    file = _remembered(hub)
    if not home_directory().is_dir():
        return  # what only plans leaves nothing behind
    file.parent.mkdir(exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(commit)
    part.replace(file)


def _last_seen(hub: HubPath) -> str | None:
    """The commit that the Hub gave for this path last, here or to whoever filled its cache."""
    file = _remembered(hub)
    if file.exists():
        return file.read_text()
    try:
        cached = snapshot_download(
            hub.repository,
            repo_type=hub.kind,
            revision=hub.revision,
            allow_patterns=["config.json"],
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    return Path(cached).name
