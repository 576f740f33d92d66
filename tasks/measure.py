"""Measure one model on held-out data: its loss, and the problems that it solves."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from elastic_core import generate, job, losses, model, ssm
from elastic_core.config import Evaluation
from elastic_core.subnet import full_subnet
from tasks import evaluate as evaluation
from tasks import tracking
from tasks.data import HELDOUT_FILE, read_record
from tasks.evaluate import answer, heldout_batches, heldout_loss, read_problems
from tasks.records import Artifact
from tasks.register import HELDOUT_DIGEST
from tasks.settings import Settings
from tasks.steps import fingerprint, step


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Cross-entropy in nats a token, and the share of problems answered exactly, where there were any."""

    cross_entropy: float
    accuracy: float | None


@step(evaluation, generate, job, losses, model, ssm, on_gpu=True)
def measure(model: Artifact, corpus: Artifact, settings: Evaluation) -> Measurement:
    """Measure a stock checkpoint on a corpus's held-out part."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    directory = Path(model.path)
    loaded = job.load_model(directory, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    batches = heldout_batches(Path(corpus.path) / HELDOUT_FILE, settings, loaded.config.vocab_size)
    loss, _ = heldout_loss(loaded, full_subnet(loaded.config), batches)
    problems = read_problems(Path(settings.problems), settings.max_problems) if settings.problems else []
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    answers = answer(loaded, tokenizer, problems, settings)
    return Measurement(cross_entropy=loss, accuracy=answers.accuracy if answers else None)


def log_measurement(
    settings: Settings, version: tracking.ModelVersion, corpus: Artifact, measured: Measurement
) -> None:
    """Keep a measurement in MLflow: a run of its own in the family's experiment, named after the model."""
    heldout = read_record(Path(corpus.path)).heldout.sha256
    key = fingerprint(version.name, version.version, heldout)[:32]
    run_id = tracking.open_run(
        settings.tracking_uri,
        experiment=version.tags[tracking.FAMILY],
        run_key=key,
        run_name=f"evaluate-{version.name}-{version.version}",
        tags={"elastic.model": f"{version.name}:{version.version}", HELDOUT_DIGEST: heldout},
    )
    metrics = {"cross_entropy": measured.cross_entropy}
    if measured.accuracy is not None:
        metrics["accuracy"] = measured.accuracy
    tracking.log_metrics(settings.tracking_uri, run_id, metrics)
    tracking.finish_run(settings.tracking_uri, run_id)
