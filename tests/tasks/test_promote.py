"""The gate to champion: what passes it, and one scale for models of different tokenizers."""

import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient

from elastic_core.files.checkpoint import write_weights
from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import DataConfig, DataSource, Evaluation, Promotion
from elastic_core.subnet import full_subnet
from elastic_core.training.curriculum import generator
from elastic_core.training.job import load_model
from tasks import tracking
from tasks.corpus.build import build_corpus
from tasks.corpus.record import HELDOUT_FILE, read_record
from tasks.corpus.tokenizer import load_tokenizer, train_tokenizer
from tasks.evaluate import heldout_batches, heldout_loss, predicted
from tasks.promote import Verdict, documents, loss_on, promote
from tasks.records import Artifact, BudgetEvaluation, EvaluationRecord, Release
from tasks.settings import Settings
from tasks.tracking import HELDOUT_DIGEST

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "it", "saw", "red", "blue"]
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(2, 60)) for i in range(1, 80)]
MEASURED = Evaluation(heldout_tokens=400, sequence_length=40, batch_size=3)
SAME = 1e-5  # float32: sums of the same terms in another order


def write_model(directory: Path, vocab_size: int) -> Path:
    """A checkpoint with random weights and a tokenizer of its own."""
    config = ModelConfig(
        hybrid_override_pattern="M*-",
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mamba_num_heads=2,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        vocab_size=vocab_size,
        chunk_size=16,
    )
    model = ElasticNemotronH(config)
    model.initialise(generator(vocab_size))
    write_weights(directory, config, model.state_dict(), torch.float32)
    train_tokenizer(TEXTS, directory, vocab_size=vocab_size)
    return directory


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("teacher") / "model", 290)


@pytest.fixture(scope="module")
def corpus(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    file = directory / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(sources=(DataSource(path=str(file)),), heldout_fraction=0.3)
    build_corpus(config, teacher, directory / "out", fetch=lambda uri, to: to)
    return directory / "out"


def test_a_model_of_the_corpuss_tokenizer_is_measured_on_its_tokens(teacher: Path, corpus: Path) -> None:
    batches = heldout_batches(corpus / HELDOUT_FILE, MEASURED, 290)
    model = load_model(teacher, torch.device("cpu"), torch.float32)
    expected, _ = heldout_loss(model, full_subnet(model.config), batches)
    assert loss_on(teacher, teacher, corpus, MEASURED) == expected


@pytest.mark.parametrize("vocab_size", [264, 278])
def test_a_model_of_another_tokenizer_reads_the_same_text(
    vocab_size: int, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    """What it loses on its own tokens of each sequence, token by token, over the number of the teacher's."""
    other = write_model(tmp_path / "other", vocab_size)
    batches = heldout_batches(corpus / HELDOUT_FILE, MEASURED, 290)
    texts = [text for batch in batches for text in documents(batch)]
    model = load_model(other, torch.device("cpu"), torch.float32)
    longer = 0
    nats, theirs, its = 0.0, load_tokenizer(teacher), load_tokenizer(other)
    for text in texts:
        ids = its(theirs.decode(text), add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model.logits(model(torch.tensor([ids]), full_subnet(model.config)))[0]
        nats -= sum(float(F.log_softmax(logits[t], -1)[ids[t + 1]]) for t in range(len(ids) - 1))
        longer += len(ids) > len(text)
    assert longer > len(texts) / 2  # else the two tokenizers would be one
    assert loss_on(other, teacher, corpus, MEASURED) == pytest.approx(nats / predicted(batches), rel=SAME)


# The gate

BUDGETS = ("m", "s")
Gate = Callable[..., tuple[Release, Verdict]]


@pytest.fixture
def gate(settings: Settings, teacher: Path, corpus: Path) -> Gate:
    """Register a family whose budgets have these losses, or take one that is registered, and ask for promotion."""
    family = f"nano{uuid.uuid4().hex[:10]}"
    run_id = tracking.open_run(settings.tracking_uri, experiment=family, run_key="a", run_name="a")
    digest = read_record(corpus).heldout.sha256
    evaluated: dict[str, EvaluationRecord] = {}

    def measured(budget: str, loss: float) -> BudgetEvaluation:
        return BudgetEvaluation(
            budget=budget,
            params=1,
            weight_bytes=4,
            memory_bytes=8,
            cross_entropy=loss,
            kl=0.0,
            cut_cross_entropy=loss,
            random_cut_cross_entropy=loss,
            tokens_per_second=1.0,
        )

    def register(losses: tuple[float, ...]) -> Release:
        version = uuid.uuid4().hex[:12]
        members = [
            tracking.Member(
                budget=budget,
                source=f"s3://b/{version}/{budget}",
                metrics={"cross_entropy": loss},
                tags={HELDOUT_DIGEST: digest},
            )
            for budget, loss in zip(BUDGETS, losses, strict=True)
        ]
        made = tracking.register_family(
            settings.tracking_uri,
            family=family,
            version=version,
            manifest_uri=f"s3://b/{version}/manifest.json",
            run_id=run_id,
            members=members,
        )
        models = {budget: f"{entry.name}:{entry.version}" for budget, entry in made.items()}
        release = Release(family=family, version=version, uri="s3://b", models=models, run_id=run_id, report="")
        evaluated[version] = EvaluationRecord(
            teacher_params=1,
            teacher_cross_entropy=1.0,
            teacher_accuracy=None,
            heldout_tokens=400,
            problems=0,
            budgets=tuple(map(measured, BUDGETS, losses)),
        )
        return release

    def ask(*losses: float, release: Release | None = None) -> tuple[Release, Verdict]:
        release = release or register(losses)
        verdict = promote.fn(
            release,
            evaluated[release.version],
            Artifact(path=str(teacher), digest=""),
            Artifact(path=str(corpus), digest=""),
            MEASURED,
            Promotion(margin=0.01),
        )
        return release, verdict

    return ask


def champions(settings: Settings, release: Release) -> set[str | None]:
    """The versions of the family that are champions of its budgets."""
    names = [model.rsplit(":", 1)[0] for model in release.models.values()]
    found = [tracking.champion(settings.tracking_uri, name) for name in names]
    return {entry.tags[tracking.VERSION] if entry else None for entry in found}


def test_a_family_becomes_champion_where_no_budget_is_worse_than_its_champion(gate: Gate, settings: Settings) -> None:
    first, verdict = gate(2.0, 3.0)
    assert verdict == Verdict(promoted=True, reason="there was no champion yet")
    second, verdict = gate(2.01, 2.5)  # within the margin, and better
    assert verdict.promoted and champions(settings, first) == {second.version}
    third, verdict = gate(1.0, 2.6)
    assert not verdict.promoted and f"{third.family}-s" in verdict.reason and f"{third.family}-m" not in verdict.reason
    assert champions(settings, third) == {second.version}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_what_has_no_finite_loss_never_becomes_champion(loss: float, gate: Gate, settings: Settings) -> None:
    nobody, verdict = gate(2.0, loss)
    assert not verdict.promoted and str(loss) in verdict.reason
    assert champions(settings, nobody) == {None}
    champion, _ = gate(2.0, 3.0)
    _, verdict = gate(2.0, loss)
    assert not verdict.promoted and champions(settings, champion) == {champion.version}


def test_a_verdict_is_of_the_champion_that_there_is_now(gate: Gate, settings: Settings) -> None:
    first, _ = gate(2.0, 3.0)
    assert gate(release=first)[1] == Verdict(promoted=True, reason="it is the champion already")
    worse, verdict = gate(2.2, 3.3)
    assert not verdict.promoted
    by_hand = {name: int(version) for name, version in (model.rsplit(":", 1) for model in worse.models.values())}
    tracking.set_alias(settings.tracking_uri, tracking.CHAMPION, by_hand)
    assert gate(release=first)[1].promoted
    assert champions(settings, first) == {first.version}


def test_a_release_exists_while_the_registry_holds_that_version_of_it(gate: Gate, settings: Settings) -> None:
    release, _ = gate(2.0, 3.0)
    assert release.exists()
    assert not replace(release, version="another").exists()
    client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=settings.tracking_uri)
    client.delete_registered_model(f"{release.family}-s")
    assert not release.exists()
