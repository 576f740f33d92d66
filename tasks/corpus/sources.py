"""What comes from outside: whether it changed since the last run, and how it is brought here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from elastic_core.recipe import DataSource
from tasks import artifacts
from tasks.corpus.documents import STDLIB, first_line, source_files
from tasks.running.steps import fingerprint
from tasks.settings import Settings


def fetch_data(uri: str, directory: Path) -> Path:
    """Download an `s3://` object or prefix into `directory`."""
    artifacts.download_prefix(artifacts.open_store(Settings.from_environment(need_bucket=False)), uri, directory)
    return directory


def source_identity(source: DataSource) -> str:
    """A digest that changes when the documents behind a source do: of ETags, of a Hub revision, or of file times."""
    if source.path.startswith("hf://"):
        name, _, revision = source.path.removeprefix("hf://").partition("@")
        with _from_the_hub(f"data.sources {source.path!r}"):
            info = HfApi().dataset_info("/".join(name.split("/")[:2]), revision=revision or None)
        return fingerprint(source, info.sha)
    if source.path.startswith("s3://"):
        return fingerprint(source, _objects(source.path))
    files = source_files(source, fetch=fetch_data, directory=Path())
    if source.path == STDLIB:
        return fingerprint(source, [(file.name, file.stat().st_size) for file in files.values()])
    return fingerprint(source, [file_identity(file) for file in files.values()])


def teacher_identity(path: str) -> str:
    """A digest that changes when the checkpoint at `path` does."""
    if path.startswith("s3://"):
        return fingerprint(path, _objects(path))
    if Path(path).is_dir():
        return fingerprint([file_identity(file) for file in sorted(Path(path).iterdir()) if file.is_file()])
    with _from_the_hub(f"teacher.path {path!r}"):
        return fingerprint(path, HfApi().model_info(path).sha)


@contextmanager
def _from_the_hub(setting: str) -> Iterator[None]:
    """Name the setting where the Hub, or the way to it, fails."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{setting} is not here, and the Hub does not give it ({first_line(error).rstrip('.')}); "
            "correct it, or see to the access to the Hub"
        ) from error


def _objects(uri: str) -> list[tuple[str, str]]:
    return artifacts.list_objects(artifacts.open_store(Settings.from_environment(need_bucket=False)), uri)


def file_identity(file: Path) -> tuple[str, int, int]:
    """What changes when a file does: its path, its size and the time of its last change."""
    status = os.stat(file)
    return str(file), status.st_size, status.st_mtime_ns
