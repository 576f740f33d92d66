"""The gate to `champion`: the family moves as a whole when no budget is worse than the champion it replaces."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from elastic_core.files import checkpoint
from elastic_core.recipe import Evaluation, Promotion
from elastic_core.subnet import full_subnet
from elastic_core.training import job
from elastic_core.training.tokens import IGNORED, TokenBatch
from tasks import artifacts, tracking
from tasks.artifacts.staging import scratch
from tasks.corpus.documents import digest_files
from tasks.corpus.record import HELDOUT_FILE, read_record
from tasks.corpus.tokenizer import load_tokenizer, tokenizer_files
from tasks.evaluate import heldout_batches, heldout_loss, predicted
from tasks.records import Artifact, EvaluationRecord, Release
from tasks.running.steps import step
from tasks.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the release became champion, and why."""

    promoted: bool
    reason: str


@step(cached=False)
def promote(
    release: Release,
    evaluation: EvaluationRecord,
    teacher: Artifact,
    corpus: Artifact,
    measured_by: Evaluation,
    gate: Promotion,
) -> Verdict:
    """Move `champion` of all budgets to this release, or of none."""
    settings = Settings.from_environment()
    heldout_digest = read_record(Path(corpus.path)).heldout.sha256
    models = {budget: model.rsplit(":", 1) for budget, model in release.models.items()}
    versions = {name: int(version) for name, version in models.values()}
    champions = {name: tracking.champion(settings.tracking_uri, name) for name in versions}
    if versions == {name: present and present.version for name, present in champions.items()}:
        return Verdict(promoted=True, reason="it is the champion already")
    worse = []
    for measured in evaluation.budgets:
        name, _ = models[measured.budget]
        present = champions[name]
        if not math.isfinite(measured.cross_entropy):
            worse.append(f"{name}: cross-entropy {measured.cross_entropy}")
        elif present is not None and present.version != versions[name]:
            loss = champion_loss(settings, present, teacher, corpus, measured_by, heldout_digest)
            if measured.cross_entropy > loss * (1 + gate.margin):
                worse.append(f"{name}: cross-entropy {measured.cross_entropy:.4f} against the champion's {loss:.4f}")
    if worse:
        return Verdict(promoted=False, reason=f"stays candidate; {'; '.join(worse)}")
    tracking.set_alias(settings.tracking_uri, tracking.CHAMPION, versions)
    if not any(champions.values()):
        return Verdict(promoted=True, reason="there was no champion yet")
    return Verdict(promoted=True, reason=f"no budget is worse than its champion by more than {gate.margin:.1%}")


def champion_loss(
    settings: Settings,
    champion: tracking.ModelVersion,
    teacher: Artifact,
    corpus: Artifact,
    measured_by: Evaluation,
    heldout_digest: str,
) -> float:
    """The champion's cross-entropy on this held-out set: as registered, or measured anew where the set has changed."""
    if champion.tags.get(tracking.HELDOUT_DIGEST) == heldout_digest:
        return champion.metrics["cross_entropy"]
    store = artifacts.open_store(settings)
    with scratch(settings.home, "champion") as room:
        directory = room / "model"
        artifacts.fetch(store, champion.tags[tracking.MANIFEST], champion.tags[tracking.BUDGET], directory)
        return loss_on(directory, Path(teacher.path), Path(corpus.path), measured_by)


def loss_on(directory: Path, teacher: Path, corpus: Path, measured_by: Evaluation) -> float:
    """Cross-entropy of a stock checkpoint on the held-out part of a corpus, in nats a token of the teacher's.

    A model with another tokenizer reads the same text in its own tokens: what it loses is divided by the teacher's.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = job.load_model(directory, device, torch.float32)
    batches = heldout_batches(corpus / HELDOUT_FILE, measured_by, checkpoint.read_config(teacher).vocab_size)
    own = batches
    if digest_files(tokenizer_files(directory)) != read_record(corpus).tokenizer_sha256:
        theirs, its = load_tokenizer(teacher), load_tokenizer(directory)
        own = [retokenised(text, theirs, its) for batch in batches for text in documents(batch)]
        own = [text for text in own if text.learned]
    loss, _ = heldout_loss(model, full_subnet(model.config), own)
    return loss * predicted(own) / predicted(batches)


def documents(batch: TokenBatch) -> Iterator[torch.Tensor]:
    """The tokens of each document in a batch, those that are targets alone included."""
    rows, tokens = batch.inputs_BT.shape
    whole_rows = [(row, 0, tokens) for row in range(rows)]
    for row, first, end in batch.packing.spans if batch.packing else whole_rows:
        targets_T = batch.targets_BT[row, first:end]
        if (targets_T[:-1] == IGNORED).any():
            raise ValueError(
                "a champion with another tokenizer cannot be measured where held-out text is learned in part; "
                "promote by hand with `elastic promote`"
            )
        text_T = torch.cat([batch.inputs_BT[row, first : first + 1], targets_T])
        yield text_T if targets_T[-1] != IGNORED else text_T[:-1]


def retokenised(
    tokens_T: torch.Tensor, written_by: PreTrainedTokenizerFast, read_by: PreTrainedTokenizerFast
) -> TokenBatch:
    """The text of one tokenizer's tokens in another's, as a batch of one."""
    text = written_by.decode(tokens_T, clean_up_tokenization_spaces=False)
    ids_1T = torch.tensor([read_by(text, add_special_tokens=False)["input_ids"]])
    return TokenBatch(inputs_BT=ids_1T[:, :-1], targets_BT=ids_1T[:, 1:], packing=None, learned=ids_1T.shape[1] - 1)
