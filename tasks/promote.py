"""The gate to `champion`: the family moves as a whole when no budget is worse than the champion it replaces."""

from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_core import job
from elastic_core.config import Evaluation, Promotion
from elastic_core.subnet import full_subnet
from tasks import artifacts, tracking
from tasks.data import HELDOUT_FILE, read_record
from tasks.evaluate import heldout_batches, heldout_loss
from tasks.records import Artifact, EvaluationRecord, Release
from tasks.register import HELDOUT_DIGEST
from tasks.settings import Settings
from tasks.staging import scratch
from tasks.steps import step


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the release became champion, and why."""

    promoted: bool
    reason: str


@step()
def promote(
    release: Release,
    evaluation: EvaluationRecord,
    corpus: Artifact,
    measured_by: Evaluation,
    gate: Promotion,
    destination: str,
) -> Verdict:
    """Move `champion` of all budgets to this release, or of none."""
    settings = Settings.from_environment()
    heldout_digest = read_record(Path(corpus.path)).heldout.sha256
    worse = []
    versions = {}
    for measured in evaluation.budgets:
        name, version = release.models[measured.budget].rsplit(":", 1)
        versions[name] = int(version)
        present = tracking.champion(settings.tracking_uri, name)
        if present is None or present.version == int(version):
            continue
        loss = champion_loss(settings, present, corpus, measured_by, heldout_digest)
        if measured.cross_entropy > loss * (1 + gate.margin):
            worse.append(f"{name}: cross-entropy {measured.cross_entropy:.4f} against the champion's {loss:.4f}")
    if worse:
        return Verdict(promoted=False, reason=f"stays candidate; {'; '.join(worse)}")
    tracking.set_alias(settings.tracking_uri, tracking.CHAMPION, versions)
    return Verdict(promoted=True, reason=f"no budget is worse than its champion by more than {gate.margin:.1%}")


def champion_loss(
    settings: Settings,
    champion: tracking.ModelVersion,
    corpus: Artifact,
    measured_by: Evaluation,
    heldout_digest: str,
) -> float:
    """The champion's cross-entropy on this held-out set: as registered, or measured anew where the set has changed."""
    if champion.tags.get(HELDOUT_DIGEST) == heldout_digest:
        return champion.metrics["cross_entropy"]
    store = artifacts.open_store(settings)
    with scratch(settings.home, "champion") as room:
        directory = room / "model"
        artifacts.fetch(store, champion.tags[tracking.MANIFEST], champion.tags[tracking.BUDGET], directory)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = job.load_model(directory, device, torch.float32)
    batches = heldout_batches(Path(corpus.path) / HELDOUT_FILE, measured_by, model.config.vocab_size)
    return heldout_loss(model, full_subnet(model.config), batches)[0]
