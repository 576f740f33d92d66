"""What comes from outside, and whether it changed since the last run."""

import os
from collections.abc import Sequence
from pathlib import Path

from elastic_core.recipe import DataSource
from tasks.corpus.documents import STDLIB, digest_files, source_files, source_objects
from tasks.corpus.hub import HUB, commit_of, parse_dataset, parse_model
from tasks.corpus.pieces import S3, listed
from tasks.corpus.problems import problems_source
from tasks.running.steps import fingerprint
from tasks.settings import ServiceError

CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]


def source_identity(source: DataSource) -> str:
    """A digest that changes when the documents behind a source do: of ETags, of a Hub commit, or of file times."""
    source = source.unweighted()
    if source.path.startswith(HUB):
        return fingerprint(source, commit_of(parse_dataset(source.path)))
    if source.path.startswith(S3):
        return fingerprint(source, [(found.path, found.etag) for found in source_objects(source)])
    files = source_files(source)
    if source.path == STDLIB:
        return fingerprint(source, [(file.name, file.stat().st_size) for file in files])
    return fingerprint(source, [file_identity(file) for file in files])


def check_unchanged(sources: Sequence[DataSource], identities: Sequence[str]) -> None:
    """A ServiceError for a source that no longer is what its `source_identity` was."""
    for source, identity in zip(sources, identities, strict=True):
        if source_identity(source) != identity:
            raise ServiceError(f"{source.path} changed while this run was going; run again")


def checkpoint_files(directory: Path) -> list[Path]:
    """The files of a checkpoint in a directory, which may be a clone, or hold what is of no use to a step."""
    return sorted({file for pattern in CHECKPOINT_FILES for file in directory.glob(pattern) if file.is_file()})


def teacher_identity(path: str) -> str:
    """What changes when the checkpoint at `path` does: a digest, or on the Hub the commit itself."""
    if path.startswith(S3):
        return fingerprint(path, [(found.path, found.etag) for found in listed(path)])
    if Path(path).is_dir():
        return fingerprint([file_identity(file) for file in checkpoint_files(Path(path))])
    return commit_of(parse_model(path))


def problems_digest(path: str | None) -> str | None:
    """SHA-256 of the files of problems; None without any."""
    if path is None:
        return None
    return digest_files(source_files(problems_source(Path(path))))


def file_identity(file: Path) -> tuple[str, int, int]:
    """What changes when a file does: its path, its size and the time of its last change."""
    status = os.stat(file)
    return str(file), status.st_size, status.st_mtime_ns
