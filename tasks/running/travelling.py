"""The checkpoints of a stage in training on their way through the shared workspace, so that another host can go on.

    checkpoints/KEY/STAGE-KEY/step-000000042.json   the SHA-256 of each file, by name; written when all are there
    checkpoints/KEY/STAGE-KEY/files/SHA256

Of several nodes each stores the files of its own processes, and the first the record. They are stored in the
background. Training never waits for that: of a checkpoint that comes before the last one is
stored, links to its files are kept, and what is not stored when the next comes is passed over.
"""

import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from elastic_core.training.job import METRICS
from elastic_core.training.parallel import World
from elastic_core.training.resume import (
    KEPT_CHECKPOINTS,
    ROWS_FILE,
    checkpoint_directory,
    last_whole,
    recorded_files,
    written_checkpoints,
)
from tasks.artifacts.blobs import Blobs
from tasks.artifacts.documents import documents, read_document, remove_objects, write_document
from tasks.artifacts.manifest import check_paths
from tasks.running.nodes import Others
from tasks.running.patience import patiently
from tasks.running.steps import own_key
from tasks.running.workspace import shared_workspace
from tasks.settings import ServiceError

POLL_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LAST_SECONDS = 30.0  # for what is under way when a stage ends before its end
SENDING = ".sending"

logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The stage has ended, and what is being stored of it is of no use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """The checkpoints of one stage in the workspace; `root` ends with "/"."""

    blobs: Blobs
    root: str

    def steps(self) -> list[int]:
        """The steps done at each, in order."""
        names = (key.removeprefix(self.root) for key in documents(self.blobs.store, f"{self.root}step-"))
        return sorted(int(name.removeprefix("step-").removesuffix(".json")) for name in names)

    def files(self, done: int) -> dict[str, str]:
        """The SHA-256 of each file of one, by name; ValueError for what is damaged."""
        body = read_document(self.blobs.store, self._key(done))
        files = json.loads(body or b"{}")
        if not isinstance(files, dict) or not files or not all(isinstance(digest, str) for digest in files.values()):
            raise ValueError(f"{self._key(done)} names no files")
        check_paths(files, self._key(done))
        return files

    def store(self, done: int, directory: Path, stop: threading.Event, others: Others | None = None) -> None:
        """Store a checkpoint, of which the other nodes store what they have, and remove all but the last ones."""
        storing = others.store(done) if others is not None else None
        files = self.store_files(directory, stop)
        while storing is not None and not (stored := storing.done(POLL_SECONDS)):
            if stop.is_set():
                raise Stopped
            if stored is False:  # it was gone there before it could be stored: there are newer ones
                return
        write_document(self.blobs.store, self._key(done), json.dumps(files).encode())
        steps = self.steps()
        kept = {digest for step in steps[-KEPT_CHECKPOINTS:] for digest in self.files(step).values()}
        for step in steps[:-KEPT_CHECKPOINTS]:
            remove_objects(self.blobs.store, [self._key(step)])
        every = documents(self.blobs.store, self.blobs.root)
        remove_objects(self.blobs.store, [key for key in every if key.removeprefix(self.blobs.root) not in kept])

    def store_files(self, directory: Path, stop: threading.Event) -> dict[str, str]:
        """Store the files of a checkpoint that are here; the SHA-256 of all, by name."""

        def go_on(_done: int, _total: int) -> None:
            if stop.is_set():
                raise Stopped

        files = recorded_files(directory)
        here = {name: digest for name, digest in files.items() if (directory / name).exists()}
        self.blobs.put(directory, here, progress=go_on)
        return files

    def _key(self, done: int) -> str:
        return f"{self.root}step-{done:09d}.json"


@contextmanager
def travelling(work: Path, others: Others | None = None) -> Iterator[threading.Event]:
    """Go on from the last checkpoint that any host stored of this stage, and store those that the block writes.

    The block sets the event when the stage has come to its end, and is stored itself.
    """
    ended, useless = threading.Event(), threading.Event()
    if (stored := stored_checkpoints(work, own_key())) is None:
        yield useless
        return
    bring_last(stored, work)
    given = (stored, work, ended, useless, others)
    thread = threading.Thread(target=_store_until, args=given, name="checkpoints", daemon=True)
    thread.start()
    try:
        yield useless
    finally:
        ended.set()
        thread.join(LAST_SECONDS)
        useless.set()
        thread.join(LAST_SECONDS)
        shutil.rmtree(work / SENDING, ignore_errors=True)


def stored_checkpoints(work: Path, key: str) -> Stored | None:
    """What hosts stored of the step with this key; None without a workspace that they share."""
    shared = shared_workspace()
    if shared is None or not key:
        return None
    root = f"{shared.checkpoints(key)}{work.name}/"
    return Stored(blobs=Blobs(store=shared.store, root=f"{root}files/"), root=root)


def bring_last(stored: Stored, work: Path) -> None:
    """Have the last stored checkpoint that is whole here, or a later one, with the files of all nodes."""
    for _, directory in written_checkpoints(work):
        with suppress(ValueError):  # damaged, which is told when it is looked at
            if not all((directory / name).exists() for name in recorded_files(directory)):
                shutil.rmtree(directory)
    patiently(f"looking for checkpoints of {work.name}", partial(_bring_last, stored, work))


def store_part(stored: Stored, work: Path, done: int, ended: threading.Event) -> bool:
    """Store what this node has of a checkpoint, as soon as it is written; False where it is gone, or never will be."""
    while not (directory := checkpoint_directory(work, done)).exists():
        if ended.wait(POLL_SECONDS) or any(later > done for later, _ in written_checkpoints(work)):
            return False
    try:
        stored.store_files(_linked(directory, work / SENDING, done), threading.Event())
    except FileNotFoundError:
        return False
    return True


def _bring_last(stored: Stored, work: Path) -> None:
    """Bring the last stored checkpoint that is whole, if it is further than those that are here.

    The stage's file of metrics comes with it: the one that is here knows nothing of the steps of another host.
    """
    there = stored.steps()
    here = last_whole(work, World(device=torch.device("cpu"))) if there else 0
    for done in reversed(there):
        if done <= here:
            return
        try:
            stored.blobs.fetch(stored.files(done), checkpoint_directory(work, done))
        except (ServiceError, ValueError) as error:
            if isinstance(error, ServiceError) and error.transient:
                raise
            logger.warning("%s; the checkpoint before it is taken", error)
        else:
            part = work / f".{ROWS_FILE}.part"
            shutil.copyfile(checkpoint_directory(work, done) / ROWS_FILE, part)
            part.replace(work / METRICS)
            logger.info("%s goes on at step %d, where another host was", work.name, done)
            return


def _store_until(
    stored: Stored, work: Path, ended: threading.Event, useless: threading.Event, others: Others | None
) -> None:
    last, pause, told = 0, POLL_SECONDS, False
    while not useless.is_set():
        leaving = ended.wait(pause)
        try:
            for done, directory in written_checkpoints(work)[-1:]:
                if done > last:
                    stored.store(done, _linked(directory, work / SENDING, done), useless, others)
                    last = done
            pause, told = POLL_SECONDS, False
        except Stopped:
            return
        except (ServiceError, OSError, ValueError) as error:
            if not told:
                logger.warning("%s; the checkpoints of %s stay on this host until they can be stored", error, work.name)
            pause, told = min(2 * pause, LONGEST_PAUSE_SECONDS), True
        if leaving:
            return


def _linked(directory: Path, sending: Path, done: int) -> Path:
    """Links to the files of a checkpoint, which the trainer removes when it has newer ones."""
    shutil.rmtree(sending, ignore_errors=True)
    linked = checkpoint_directory(sending, done)
    shutil.copytree(directory, linked, copy_function=os.link)
    return linked
