"""Files by content: an object for each, named by its SHA-256, sent once and compared with its name on the way back."""

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tasks.artifacts.connection import Meter, Progress, Store, explained, head
from tasks.artifacts.documents import remove_objects
from tasks.artifacts.fetching import Corrupt, fetch_recorded
from tasks.artifacts.publishing import put_recorded
from tasks.settings import ServiceError

ASKED_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Blobs:
    """The objects whose keys are `root`, which ends with "/", and the SHA-256 of what they hold."""

    store: Store
    root: str

    def sizes(self, digests: Collection[str]) -> dict[str, int]:
        """The bytes of each of these files that is there, by SHA-256."""

        def size(digest: str) -> int | None:
            found = head(self.store, self.root + digest)
            return None if found is None else int(found["ContentLength"])

        wanted = sorted(set(digests))
        with explained(f"s3://{self.store.bucket}/{self.root}"), ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            asked = zip(wanted, pool.map(size, wanted), strict=True)
            return {digest: found for digest, found in asked if found is not None}

    def put(self, directory: Path, files: Mapping[str, str], *, progress: Progress | None = None) -> None:
        """Send files of a directory, given with their SHA-256, unless they are there; NotAsRecorded for other bytes."""
        paths = {digest: directory / name for name, digest in files.items()}
        there = self.sizes(paths)
        meter = Meter(progress, sum(path.stat().st_size for digest, path in paths.items() if digest not in there))
        for digest, path in paths.items():
            if digest not in there:
                put_recorded(self.store, path, f"s3://{self.store.bucket}/{self.root}{digest}", digest, meter)

    def fetch(self, files: Mapping[str, str], directory: Path, *, progress: Progress | None = None) -> None:
        """Bring files, given with their SHA-256, to a directory, which appears when it is whole.

        An object that holds other bytes, read twice, is removed, so that who makes the file again can send it. A
        ServiceError then, and where one is not there.
        """
        wanted = {name: (self.root + digest, digest) for name, digest in files.items()}
        try:
            try:
                fetch_recorded(self.store, wanted, directory, progress=progress)
            except Corrupt:  # what lies between may have spoiled it
                fetch_recorded(self.store, wanted, directory, progress=progress)
        except Corrupt as error:
            remove_objects(self.store, [error.uri.removeprefix(f"s3://{self.store.bucket}/")])
            raise ServiceError(f"{error}; it was removed there: run again, it is made again") from error
