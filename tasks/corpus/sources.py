"""What comes from outside: whether it changed since the last run, and how it is brought here."""

import os
from pathlib import Path

from elastic_core.recipe import DataSource
from tasks import artifacts
from tasks.corpus.documents import STDLIB, digest_files, source_files
from tasks.corpus.hub import HUB, commit_of, parse_dataset, parse_model
from tasks.corpus.pieces import S3
from tasks.corpus.problems import problems_source
from tasks.running.steps import fingerprint
from tasks.settings import ServiceError, Settings


def fetch_data(uri: str, directory: Path) -> Path:
    """Download an `s3://` prefix into `directory`, or an object to a file there; where that is."""
    store = artifacts.open_store(Settings.from_environment(need_bucket=False))
    files = artifacts.download_prefix(store, uri, directory)
    is_object = len(files) == 1 and not artifacts.exists(store, f"{uri.rstrip('/')}/{files[0].path}")
    return directory / files[0].path if is_object else directory


def source_identity(source: DataSource) -> str:
    """A digest that changes when the documents behind a source do: of ETags, of a Hub commit, or of file times."""
    source = source.unweighted()
    if source.path.startswith(HUB):
        return fingerprint(source, commit_of(parse_dataset(source.path)))
    if source.path.startswith(S3):
        return fingerprint(source, _objects(source.path))
    files = source_files(source, fetch=fetch_data, directory=Path())
    if source.path == STDLIB:
        return fingerprint(source, [(file.name, file.stat().st_size) for file in files.values()])
    return fingerprint(source, [file_identity(file) for file in files.values()])


def etags_of(source: DataSource, identity: str) -> dict[str, str]:
    """The ETag of each object of a source, by the name that users know it by; none of one that is not on S3.

    A ServiceError where the objects are no longer those of the source's `identity`.
    """
    if not source.path.startswith(S3):
        return {}
    source = source.unweighted()
    objects, prefix = _objects(source.path), source.path.rstrip("/")
    if fingerprint(source, objects) != identity:
        raise ServiceError(f"{source.path} changed while this run was going; run again")
    alone = {source.path: objects[0][1]} if len(objects) == 1 else {}  # it may be the object itself
    return {f"{prefix}/{path}": etag for path, etag in objects} | alone


def teacher_identity(path: str) -> str:
    """What changes when the checkpoint at `path` does: a digest, or on the Hub the commit itself."""
    if path.startswith(S3):
        return fingerprint(path, _objects(path))
    if Path(path).is_dir():
        return fingerprint([file_identity(file) for file in sorted(Path(path).iterdir()) if file.is_file()])
    return commit_of(parse_model(path))


def _objects(uri: str) -> list[tuple[str, str]]:
    return artifacts.list_objects(artifacts.open_store(Settings.from_environment(need_bucket=False)), uri)


def problems_digest(path: str | None) -> str | None:
    """SHA-256 of the files of problems; None without any."""
    if path is None:
        return None
    return digest_files(source_files(problems_source(Path(path)), fetch=fetch_data, directory=Path()).values())


def file_identity(file: Path) -> tuple[str, int, int]:
    """What changes when a file does: its path, its size and the time of its last change."""
    status = os.stat(file)
    return str(file), status.st_size, status.st_mtime_ns
