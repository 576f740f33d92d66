"""The gate to `champion`: the family moves as a whole when no budget is worse than the champion it replaces.

Two losses are compared only where they were measured under the same conditions. A champion that was measured under
others is measured anew: by a step for the GPU, in the recipe's dtype, one model at a time.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from elastic_core.budget import Dtype
from elastic_core.files import checkpoint
from elastic_core.judging import Evaluation, Promotion
from elastic_core.training.tokens import IGNORED, TokenBatch
from tasks import artifacts, tracking
from tasks.artifacts.staging import scratch
from tasks.corpus.documents import digest_files
from tasks.corpus.heldout import heldout_batches, predicted
from tasks.corpus.record import HELDOUT_FILE, read_record
from tasks.corpus.template import special_tokens
from tasks.corpus.tokenizer import load_tokenizer, tokenizer_files
from tasks.evaluate import Reader, conditions, shared_loss
from tasks.judge import judge_model
from tasks.judging.endpoint import NotServed
from tasks.records import Artifact, BenchmarkScore, BudgetEvaluation, Conditions, EvaluationRecord, Release
from tasks.reporting.summary import worsened
from tasks.running.patience import patiently
from tasks.running.promoting import one_promotion
from tasks.running.steps import run, step
from tasks.settings import Settings
from tasks.slice import fetch_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GATE = "the promotion gate"  # by whom a release became champion


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the release became champion, and why."""

    promoted: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A loss in nats a token of the teacher's, and what it was measured under; or why there is none."""

    cross_entropy: float
    conditions: Conditions | None
    impossible: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A champion's scores that were measured anew, by benchmark; `impossible` says why there are not all of them."""

    scores: dict[str, BenchmarkScore]
    impossible: str = ""


class CannotMeasure(ValueError):
    """No loss of this model can be compared with one of the teacher's tokenizer."""


def decide(
    release: Release,
    evaluation: EvaluationRecord,
    teacher: Artifact,
    corpus: Artifact,
    settings: Evaluation,
    dtype: Dtype,
    gate: Promotion,
    problems: Mapping[str, Artifact] | None = None,
    workspace: str = "",
) -> Verdict:
    """Measure the champions that cannot be compared as they are registered, and promote the release or not.

    `problems` are those of each benchmark. A champion that was judged otherwise is brought to `workspace` and answers
    them anew, where the gate asks for their benchmark.
    """
    present = patiently("looking up the champions", lambda: list(rivals(release, evaluation)))
    measured = {
        f"{champion.name}:{champion.version}": run(
            measure_champion,
            manifest=champion.tags[tracking.MANIFEST],
            part=champion.tags[tracking.BUDGET],
            teacher=teacher,
            corpus=corpus,
            settings=settings,
            dtype=dtype,
        )
        for _, champion in present
        if tracking.MANIFEST in champion.tags and not is_comparable(champion, evaluation.conditions)
    }
    judged = {
        f"{champion.name}:{champion.version}": judged_anew(
            budget, champion, evaluation, settings, dtype, gate, problems or {}, workspace
        )
        for budget, champion in present
    }
    return run(promote, release=release, evaluation=evaluation, measured=measured, judged=judged, gate=gate)


def judged_anew(
    budget: BudgetEvaluation,
    champion: tracking.ModelVersion,
    evaluation: EvaluationRecord,
    settings: Evaluation,
    dtype: Dtype,
    gate: Promotion,
    problems: Mapping[str, Artifact],
    workspace: str,
) -> Judged:
    """A champion's scores on the benchmarks that the gate asks for, and that it is not registered with alike.

    An endpoint is asked by the digest or the directory of the champion's own files: the gate takes no other.
    """
    scores = evaluation.measured_scores(budget.budget)
    wanted = [name for name in gate.benchmarks if not is_judged_alike(champion, scores[name])]
    if not wanted or tracking.MANIFEST not in champion.tags:
        return Judged(scores={})
    manifest, part = champion.tags[tracking.MANIFEST], champion.tags[tracking.BUDGET]
    model = run(fetch_part, manifest=manifest, part=part, workspace=workspace)
    benchmarks = {benchmark.name: benchmark for benchmark in settings.benchmarks}
    anew: dict[str, BenchmarkScore] = {}
    try:
        for name in wanted:
            anew[name] = judge_model(budget.budget, model, problems[name], benchmarks[name], settings, dtype)
    except NotServed as error:  # the release is registered by now: it waits as a candidate
        return Judged(scores=anew, impossible=str(error))
    return Judged(scores=anew)


@step("held-out loss of champion {part}", on_gpu=True)
def measure_champion(
    manifest: str, part: str, teacher: Artifact, corpus: Artifact, settings: Evaluation, dtype: Dtype
) -> Measured:
    """Measure a part of a published version on the held-out part of the corpus, as `evaluate` does."""
    machine = Settings.from_environment()
    with scratch(machine.home, "champion") as room:
        directory = room / "model"
        artifacts.fetch(artifacts.open_store(machine), manifest, part, directory)
        try:
            return loss_on(directory, Path(teacher.path), Path(corpus.path), settings, dtype)
        except CannotMeasure as error:
            return Measured(cross_entropy=0.0, conditions=None, impossible=str(error))


@step(cached=False)
def promote(
    release: Release,
    evaluation: EvaluationRecord,
    measured: dict[str, Measured],
    judged: dict[str, Judged],
    gate: Promotion,
) -> Verdict:
    """Move `champion` of all budgets to this release, or of none.

    `measured` has the losses of champions that were measured anew, by NAME:VERSION, and `judged` their scores.

    One run at a time promotes a family: no champion changes between the comparison with it and its replacement.
    """
    machine = Settings.from_environment()
    with one_promotion(machine.home, release.family):
        return _promoted(machine.registry, release, evaluation, measured, judged, gate)


def _promoted(
    registry: str,
    release: Release,
    evaluation: EvaluationRecord,
    measured: Mapping[str, Measured],
    judged: Mapping[str, Judged],
    gate: Promotion,
) -> Verdict:
    versions = {name: int(version) for name, version in (m.rsplit(":", 1) for m in release.models.values())}
    present = {name: tracking.champion(registry, name) for name in versions}
    if versions == {name: champion and champion.version for name, champion in present.items()}:
        return Verdict(promoted=True, reason="it is the champion already")
    for name, version in versions.items():
        if (back := tracking.withdrawn(tracking.resolve(registry, f"{name}:{version}"))) is not None:
            said = f"{name}:{version} was rolled back by {back.by} on {back.at[:10]}: {back.reason}"
            undo = f"`elastic promote {name}:{version}` makes it champion all the same"
            return Verdict(promoted=False, reason=f"stays candidate; {said}; {undo}")
    lost = [
        f"{release.models[budget.budget].rsplit(':', 1)[0]}: cross-entropy {budget.cross_entropy}"
        for budget in evaluation.budgets
        if not math.isfinite(budget.cross_entropy)
    ]
    for budget, champion in rivals(release, evaluation):
        reasons = [
            why_worse(budget, champion, evaluation.conditions, measured, gate.margin),
            *why_lower(evaluation.measured_scores(budget.budget), champion, judged, gate.benchmarks),
        ]
        lost += [f"{champion.name}: {reason}" for reason in reasons if reason]
    if lost:
        return Verdict(promoted=False, reason=f"stays candidate; {'; '.join(lost)}")
    reason = f"no budget is worse than its champion by more than {gate.margin:.1%}"
    if gate.benchmarks:
        within = (f"{margin:g} standard errors on {name}" for name, margin in gate.benchmarks.items())
        reason += f", or by more than {' and '.join(within)}"
    if not any(present.values()):
        reason = "there was no champion yet"
    if worse := worsened(evaluation):
        reason += f"; training made {', '.join(budget.budget for budget in worse)} worse than the cut before it"
    tracking.promote(registry, versions, reason, by=GATE)
    return Verdict(promoted=True, reason=reason)


def rivals(release: Release, evaluation: EvaluationRecord) -> Iterator[tuple[BudgetEvaluation, tracking.ModelVersion]]:
    """Each budget that has a finite loss, with the champion whose place it would take."""
    registry = Settings.from_environment().registry
    for budget in evaluation.budgets:
        name, version = release.models[budget.budget].rsplit(":", 1)
        champion = tracking.champion(registry, name)
        if champion is not None and champion.version != int(version) and math.isfinite(budget.cross_entropy):
            yield budget, champion


def is_comparable(champion: tracking.ModelVersion, under: Conditions) -> bool:
    """Whether the loss that it is registered with was measured under these conditions."""
    return champion.tags.get(tracking.MEASURED) == under.digest and "cross_entropy" in champion.metrics


def why_worse(
    budget: BudgetEvaluation,
    champion: tracking.ModelVersion,
    under: Conditions,
    measured: Mapping[str, Measured],
    margin: float,
) -> str:
    """Why a budget may not take the champion's place; empty where it may."""
    anew = measured.get(f"{champion.name}:{champion.version}")
    if is_comparable(champion, under):
        loss = champion.metrics["cross_entropy"]
    elif tracking.MANIFEST not in champion.tags:
        return f"its champion, version {champion.version}, was not registered by elastic and cannot be measured"
    elif anew is None:
        return f"version {champion.version} has become its champion meanwhile; run again to be compared with that"
    elif anew.conditions is None:
        return f"its champion cannot be measured: {anew.impossible}; to replace it, move the alias by hand"
    elif anew.conditions != under:
        found = asdict(anew.conditions)
        differing = [name for name, value in asdict(under).items() if value != found[name]]
        return (
            f"its champion was measured by another {' and '.join(differing)} "
            f"({', '.join(str(found[name]) for name in differing)}); evaluate both on one machine"
        )
    else:
        loss = anew.cross_entropy
    if budget.cross_entropy > loss * (1 + margin):
        return f"cross-entropy {budget.cross_entropy:.4f} against the champion's {loss:.4f}"
    return ""


def why_lower(
    scores: Mapping[str, BenchmarkScore],
    champion: tracking.ModelVersion,
    judged: Mapping[str, Judged],
    margins: Mapping[str, float],
) -> Iterator[str]:
    """Why a budget may not take the champion's place, for each benchmark that the gate asks for.

    The standard error of the difference is that of two scores on problems drawn apart, sqrt(a^2 + b^2). Both answer the
    same problems, so that it is rather less: the gate errs on the new one's side.
    """
    anew = judged.get(f"{champion.name}:{champion.version}", Judged(scores={}))
    for name, margin in margins.items():
        own = measured_of(scores[name])
        if name in anew.scores:
            theirs = measured_of(anew.scores[name])
        elif is_judged_alike(champion, scores[name]):
            metrics = champion.metrics
            theirs = metrics[f"{name}.accuracy"], metrics.get(f"{name}.standard_error", 0.0)
        else:
            why = f": {anew.impossible}" if anew.impossible else ""
            yield (
                f"its champion, version {champion.version}, has no score on {name} that was measured alike{why}; run "
                "again, or move the alias by hand"
            )
            continue
        allowed = margin * math.hypot(own[1], theirs[1])
        if own[0] < theirs[0] - allowed:
            yield f"{name} {own[0]:.1%} against the champion's {theirs[0]:.1%}, with {allowed:.1%} allowed"


def measured_of(score: BenchmarkScore) -> tuple[float, float]:
    """pass@1 and its standard error, which is 0 where one problem tells none."""
    return score.accuracy, (score.score.standard_error or 0.0) if score.score else 0.0


def is_judged_alike(champion: tracking.ModelVersion, score: BenchmarkScore) -> bool:
    """Whether the champion is registered with a score that was measured as this one was."""
    known = f"{score.benchmark}.accuracy" in champion.metrics
    return known and champion.tags.get(f"{tracking.JUDGED}{score.benchmark}") == score.protocol


def loss_on(directory: Path, teacher: Path, corpus: Path, settings: Evaluation, dtype: Dtype) -> Measured:
    """Cross-entropy of a stock checkpoint on the held-out part of a corpus, in nats a token of the teacher's.

    A model with another tokenizer reads the same text in its own tokens: what it loses is divided by the teacher's.
    """
    batches = heldout_batches(corpus / HELDOUT_FILE, settings, checkpoint.read_config(teacher).vocab_size)
    own = batches
    if not is_tokenizer_of(directory, corpus):
        theirs, its = load_tokenizer(teacher), load_tokenizer(directory)
        own = [retokenised(text, theirs, its) for batch in batches for text in documents(batch)]
        own = [text for text in own if text.learned > 0]
    loss, _ = shared_loss(Reader(model=str(directory), dtype=dtype), own)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Measured(
        cross_entropy=loss * predicted(own) / predicted(batches),
        conditions=conditions(corpus, settings, batches, dtype, device),
    )


def is_tokenizer_of(model: Path, corpus: Path) -> bool:
    """Whether a checkpoint's tokenizer is the one that the corpus was encoded with, file by file."""
    return digest_files(tokenizer_files(model)) == read_record(corpus).tokenizer_sha256


def documents(batch: TokenBatch) -> Iterator[torch.Tensor]:
    """The tokens of each document in a batch, those that are targets alone included."""
    rows, tokens = batch.inputs_BT.shape
    whole_rows = [(row, 0, tokens) for row in range(rows)]
    for row, first, end in batch.packing.spans if batch.packing else whole_rows:
        targets_T = batch.targets_BT[row, first:end]
        if (targets_T[:-1] == IGNORED).any():
            raise CannotMeasure("it has another tokenizer, and held-out text is learned in part")
        text_T = torch.cat([batch.inputs_BT[row, first : first + 1], targets_T])
        yield text_T if targets_T[-1] != IGNORED else text_T[:-1]


def retokenised(
    tokens_T: torch.Tensor, written_by: "PreTrainedTokenizerFast", read_by: "PreTrainedTokenizerFast"
) -> TokenBatch:
    """The text of one tokenizer's tokens in another's, ended in this one's eos, as a batch of one.

    CannotMeasure for a special token that the other lacks: as characters it would be charged for its spelling.
    """
    special, known = special_tokens(written_by), special_tokens(read_by).values()
    ids, text = list[int](), list[int]()

    def read() -> None:
        decoded = written_by.decode(text, clean_up_tokenization_spaces=False)
        ids.extend(read_by(decoded, add_special_tokens=False)["input_ids"])
        text.clear()

    for token in tokens_T.tolist():
        if token == written_by.eos_token_id:
            read()
            ids.append(int(read_by.eos_token_id))
        elif token in special and special[token] not in known:
            raise CannotMeasure(f"it has another tokenizer, which lacks the special token {special[token]!r}")
        else:
            text.append(token)
    read()
    ids_1T = torch.tensor([ids])
    return TokenBatch(inputs_BT=ids_1T[:, :-1], targets_BT=ids_1T[:, 1:], packing=None, learned=ids_1T.shape[1] - 1)
