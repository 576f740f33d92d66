"""Laws of checkpoints that travel: who takes a stage over has all of it, and no word of damage where none was."""

import json
import threading
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import pytest
from trainee import ALONE, STAGE, metrics_of, train_job, write_family, write_tokens

from elastic_core.training import job, resume
from elastic_core.training.job import METRICS, TrainJob
from elastic_core.training.train import train_stage
from tasks.artifacts import Store
from tasks.artifacts.blobs import Blobs
from tasks.running import travelling
from tasks.running.travelling import Stored

DONE = 4


@pytest.fixture
def left(tmp_path: Path) -> TrainJob:
    """A stage that its host left after DONE steps."""
    family, tokens = write_family(tmp_path / "start"), write_tokens(tmp_path / "tokens.safetensors")
    began = train_job(family, tokens, tmp_path / "one")
    run, _ = job.prepare(began, ALONE)
    rows = [json.dumps(asdict(metrics)) for metrics in islice(train_stage(run, 0, []), DONE)]
    resume.save_checkpoint(tmp_path / "one", run, DONE, rows)
    return began


@pytest.mark.parametrize("here", [0, 2], ids=["that never saw it", "that did its first two steps"])
def test_a_host_that_takes_a_stage_over_has_its_metrics_and_misses_none(
    here: int, left: TrainJob, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = resume.checkpoint_directory(Path(left.work), DONE)
    lines = (written / METRICS).read_text().splitlines(keepends=True)
    stored = Stored(blobs=Blobs(store=store, root="stage/files/"), root="stage/")
    stored.store(DONE, written, threading.Event())
    taken = train_job(Path(left.student), Path(left.tokens), tmp_path / "two")
    if here:
        (tmp_path / "two" / METRICS).write_text("".join(lines[:here]))
    with caplog.at_level("INFO"):
        travelling._bring_last(stored, tmp_path / "two")
        assert (tmp_path / "two" / METRICS).read_text() == "".join(lines)
        job.run_job(taken, ALONE)
    assert "two goes on at step 4, where another host was" in caplog.messages
    assert not [message for message in caplog.messages if METRICS in message]
    assert metrics_of(tmp_path / "two").keys() == set(range(STAGE.steps))
