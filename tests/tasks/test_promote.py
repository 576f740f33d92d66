"""The gate to champion: what passes it, and one scale for models of different tokenizers."""

import json
import logging
import math
import re
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mlflow import MlflowClient
from objects import MARK
from records import evaluated, judged, measured
from templates import write_tokenizer

from elastic_core.files.checkpoint import write_weights
from elastic_core.geometry import ModelConfig
from elastic_core.judging import Benchmark, Endpoint, Sampling
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import DataConfig, DataSource, Evaluation, Promotion
from elastic_core.subnet import full_subnet
from elastic_core.training.curriculum import generator
from elastic_core.training.job import load_model
from tasks import tracking
from tasks.artifacts import Store, manifest_uri, publish
from tasks.corpus.build import build_corpus
from tasks.corpus.heldout import heldout_batches, predicted
from tasks.corpus.record import HELDOUT_FILE
from tasks.corpus.tokenizer import load_tokenizer, train_tokenizer
from tasks.evaluate import conditions, heldout_loss
from tasks.judging.benchmarks import PROBLEMS_FILE
from tasks.judging.endpoint import Client
from tasks.judging.samples import Completion
from tasks.promote import CannotMeasure, Measured, Verdict, decide, documents, loss_on, promote, retokenised
from tasks.records import BenchmarkScore, Conditions, EvaluationRecord, Release
from tasks.reporting.benchmarks import benchmark_metrics
from tasks.running.digests import artifact
from tasks.settings import Settings

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "it", "saw", "red", "blue"]
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(2, 60)) for i in range(1, 80)]
SUMS = Benchmark(
    name="sums",
    path="sums.jsonl",
    format="exact",
    runs=1,
    sampling=Sampling(temperature=0, max_new_tokens=3, system=None, thinking=False),
)
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
    build_corpus(config, teacher, directory / "out")
    return directory / "out"


def test_a_model_of_the_corpuss_tokenizer_is_measured_on_its_tokens(teacher: Path, corpus: Path) -> None:
    batches = heldout_batches(corpus / HELDOUT_FILE, MEASURED, 290)
    model = load_model(teacher, torch.device("cpu"), torch.float32)
    expected, _ = heldout_loss(model, full_subnet(model.config), batches)
    assert loss_on(teacher, teacher, corpus, MEASURED, "float32").cross_entropy == expected


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
    found = loss_on(other, teacher, corpus, MEASURED, "float32").cross_entropy
    assert found == pytest.approx(nats / predicted(batches), rel=SAME)


# The gate

BUDGETS = ("m", "s")
FULL = torch.device("cpu")


@pytest.fixture(scope="module")
def here(corpus: Path) -> Conditions:
    """What a loss is measured under on this machine."""
    return conditions(corpus, MEASURED, heldout_batches(corpus / HELDOUT_FILE, MEASURED, 290), "float32", FULL)


@dataclass
class Gate:
    """Registers families whose budgets have given losses, and asks for their promotion."""

    registry: str
    family: str
    run_id: str
    teacher: Path
    corpus: Path
    here: Conditions
    problems: Path
    manifest: str = "s3://b/nowhere/manifest.json"
    evaluations: dict[str, EvaluationRecord] = field(default_factory=dict)

    def register(
        self, *losses: float, under: Conditions | None = None, sums: Sequence[BenchmarkScore] = (), **tags: str
    ) -> Release:
        under, registration = under or self.here, uuid.uuid4().hex[:12]
        scores = {score.model: {score.benchmark: score} for score in sums}
        members = [
            tracking.Member(
                budget=budget,
                source=f"s3://b/{registration}/{budget}",
                metrics={"cross_entropy": loss, **benchmark_metrics(scores.get(budget, {}))},
                tags={
                    tracking.MEASURED: under.digest,
                    **{f"{tracking.JUDGED}{name}": score.protocol for name, score in scores.get(budget, {}).items()},
                    **tags,
                },
            )
            for budget, loss in zip(BUDGETS, losses, strict=True)
        ]
        made = tracking.register_family(
            self.registry,
            family=self.family,
            version=registration,
            manifest_uri=self.manifest,
            run_id=self.run_id,
            members=members,
        )
        self.evaluations[registration] = evaluated(
            *map(measured, BUDGETS, losses), conditions=under, scores=tuple(sums)
        )
        return Release(
            family=self.family,
            version=registration,
            registration=registration,
            uri="s3://b",
            models={budget: f"{entry.name}:{entry.version}" for budget, entry in made.items()},
            run_id=self.run_id,
            report="",
        )

    def ask(
        self, release: Release, margin: float = 0.01, endpoint: Endpoint | None = None, **benchmarks: float
    ) -> Verdict:
        return decide(
            release,
            self.evaluations[release.registration],
            artifact(self.teacher),
            artifact(self.corpus),
            replace(MEASURED, benchmarks=(SUMS,), endpoint=endpoint),
            "float32",
            Promotion(margin=margin, benchmarks=benchmarks),
            {"sums": artifact(self.problems)} if benchmarks else None,
            str(self.problems.parent),
        )

    def __call__(self, *losses: float, **options: Any) -> tuple[Release, Verdict]:
        release = self.register(*losses, **options)
        return release, self.ask(release)

    def champions(self) -> set[str | None]:
        """The registrations that are champions of the budgets."""
        found = [tracking.champion(self.registry, f"{self.family}-{budget}") for budget in BUDGETS]
        return {entry.tags[tracking.REGISTRATION] if entry else None for entry in found}


@pytest.fixture
def gate(
    settings: Settings,
    teacher: Path,
    corpus: Path,
    here: Conditions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Gate:
    for module in ("tasks.promote", "tasks.judge"):  # with no Prefect around them
        monkeypatch.setattr(f"{module}.run", lambda step, **inputs: step.fn(**inputs))
    family, uri = f"nano{uuid.uuid4().hex[:10]}", settings.registry
    run_id = tracking.open_run(uri, experiment=family, run_key="a", run_name="a")
    problems = tmp_path / "problems"
    problems.mkdir()
    (problems / PROBLEMS_FILE).write_text(json.dumps({"question": "the cat", "answer": "sat"}) + "\n")
    return Gate(
        registry=uri, family=family, run_id=run_id, teacher=teacher, corpus=corpus, here=here, problems=problems
    )


def test_a_family_becomes_champion_where_no_budget_is_worse_than_its_champion(gate: Gate) -> None:
    _, verdict = gate(2.0, 3.0)
    assert verdict == Verdict(promoted=True, reason="there was no champion yet")
    second, verdict = gate(2.01, 2.5)  # within the margin, and better
    assert verdict.promoted and gate.champions() == {second.registration}
    third, verdict = gate(1.0, 2.6)
    assert not verdict.promoted and f"{third.family}-s" in verdict.reason and f"{third.family}-m" not in verdict.reason
    assert gate.champions() == {second.registration}


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_what_has_no_finite_loss_never_becomes_champion(loss: float, gate: Gate) -> None:
    _, verdict = gate(2.0, loss)
    assert not verdict.promoted and str(loss) in verdict.reason
    assert gate.champions() == {None}
    champion, _ = gate(2.0, 3.0)
    _, verdict = gate(2.0, loss)
    assert not verdict.promoted and gate.champions() == {champion.registration}


def test_a_verdict_is_of_the_champion_that_there_is_now(gate: Gate) -> None:
    first, _ = gate(2.0, 3.0)
    assert gate.ask(first) == Verdict(promoted=True, reason="it is the champion already")
    worse, verdict = gate(2.2, 3.3)
    assert not verdict.promoted
    by_hand = {name: int(version) for name, version in (model.rsplit(":", 1) for model in worse.models.values())}
    tracking.set_alias(gate.registry, tracking.CHAMPION, by_hand)
    assert gate.ask(first).promoted
    assert gate.champions() == {first.registration}


def test_a_release_that_was_rolled_back_does_not_come_back_by_itself(gate: Gate) -> None:
    first, _ = gate(2.0, 3.0)
    second, verdict = gate(1.9, 2.9)
    assert verdict.promoted
    name, version = second.models["m"].rsplit(":", 1)
    tracking.roll_back(
        gate.registry, [tracking.resolve(gate.registry, model) for model in second.models.values()], "it repeats itself"
    )
    assert gate.champions() == {first.registration}
    again = gate.ask(second)
    assert not again.promoted and "it repeats itself" in again.reason and f"{name}:{version}" in again.reason
    assert gate.champions() == {first.registration}


def test_of_two_promotions_at_once_each_is_compared_with_the_others_champion(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The better family asks while the worse one, which was compared already, takes its place."""
    worse, better = gate.register(2.0, 3.0), gate.register(1.0, 1.0)
    asked: list[Future[Verdict]] = []
    move = tracking.promote

    def overtaken(*args: Any, **named: Any) -> None:
        if not asked:
            asked.append(pool.submit(gate.ask, better))
            while not asked[0].done() and "waiting for" not in caplog.text:
                time.sleep(0.01)
        move(*args, **named)

    monkeypatch.setattr(tracking, "promote", overtaken)
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO):
        assert gate.ask(worse) == Verdict(promoted=True, reason="there was no champion yet")
        assert asked[0].result().promoted
    assert gate.champions() == {better.registration}


# Benchmarks


def sums(*accuracies: float, **changes: Any) -> tuple[BenchmarkScore, ...]:
    return tuple(judged(budget, accuracy, **changes) for budget, accuracy in zip(BUDGETS, accuracies, strict=True))


def test_a_score_may_lie_below_the_champions_by_so_many_standard_errors_of_the_difference(gate: Gate) -> None:
    """Each has an error of 2 %, so that the difference has one of 2.83 %."""
    first = gate.register(2.0, 3.0, sums=sums(0.5, 0.4))
    assert gate.ask(first, sums=1) == Verdict(promoted=True, reason="there was no champion yet")
    lower = gate.register(1.9, 2.9, sums=sums(0.55, 0.37))
    verdict = gate.ask(lower, sums=1)
    assert not verdict.promoted
    assert verdict.reason == (
        f"stays candidate; {lower.family}-s: sums 37.0% against the champion's 40.0%, with 2.8% allowed"
    )
    assert gate.champions() == {first.registration}
    verdict = gate.ask(lower, sums=1.1)
    assert verdict.promoted and "or by more than 1.1 standard errors on sums" in verdict.reason
    assert gate.ask(gate.register(1.9, 2.9, sums=sums(0, 0))).promoted  # it was not asked for


def test_a_champion_that_was_judged_otherwise_answers_the_problems_anew(published: Gate) -> None:
    """The teacher, which is each of its sizes, answers none of them."""
    for registered in (sums(0.9, 0.9, protocol="otherwise"), ()):
        first = published.register(2.0, 3.0, sums=registered)
        assert published.ask(first, margin=9).promoted
        second = published.register(1.9, 2.9, sums=sums(0.01, 0.0))
        assert published.ask(second, sums=0).promoted


def test_a_release_stays_candidate_while_the_server_has_not_the_champion_by_the_digest_of_its_files(
    published: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has the new sizes alone, until somebody serves the champion."""
    asked, there = f"nano-m-{artifact(published.teacher).digest[:12]}", ["nano-m-000000000000"]
    monkeypatch.setattr(Client, "models", lambda client: there)
    monkeypatch.setattr(Client, "complete", lambda client, request: Completion(text="dog", tokens=1, finish="stop"))
    assert published.ask(first := published.register(2.0, 3.0, sums=sums(0.1, 0.1, protocol="otherwise"))).promoted
    second = published.register(1.9, 2.9, sums=sums(0.9, 0.9))
    served = Endpoint(url="http://127.0.0.1:9/v1", model="nano-{size}-{digest}")
    verdict = published.ask(second, endpoint=served, sums=0)
    assert not verdict.promoted and published.champions() == {first.registration}
    said = (
        rf"stays candidate; .*-m: its champion, version 1, has no score on sums .* alike: .* has no model '{asked}', "
    )
    said += r"but nano-m-0{12}; serve .*/fetched-m-.* by that name, or correct model; run again, or move the alias .*"
    assert re.fullmatch(said, verdict.reason)
    there += [asked, asked.replace("-m-", "-s-")]
    assert published.ask(second, endpoint=served, sums=0).promoted


# Losses that were not measured alike

OTHERWISE = {
    "data": {"heldout_sha256": "f" * 64},
    "tokenizer": {"tokenizer_sha256": "f" * 64},
    "tokens": {"tokens": 7},
    "sequence length": {"settings": {"sequence_length": 20}},
    "precision": {"dtype": "bfloat16"},
    "device": {"device": "cuda"},
    "code": {"code": "f" * 64},
}


@pytest.fixture
def published(gate: Gate, store: Store) -> Gate:
    """A gate whose families point to objects that are there: the teacher is each of their sizes."""
    parts = dict.fromkeys(BUDGETS, gate.teacher)
    publish(store, family=gate.family, version="1", directories=parts, metadata=MARK)
    gate.manifest = manifest_uri(store.bucket, gate.family, "1")
    return gate


@contextmanager
def models_loaded(patch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The directories of the models that the gate loads, never two of them at once."""
    loaded: list[Path] = []
    held: list[weakref.ref[ElasticNemotronH]] = []

    def load(directory: Path, *how: Any) -> ElasticNemotronH:
        assert not [model for model in held if model() is not None], "two models are held at once"
        loaded.append(directory)
        made = load_model(directory, *how)
        held.append(weakref.ref(made))
        return made

    with patch.context() as during:
        during.setattr("elastic_core.training.job.load_model", load)
        yield loaded


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
def test_a_champion_that_was_measured_otherwise_is_measured_anew(
    change: dict[str, Any], published: Gate, here: Conditions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is registered with, a loss far below its own, would keep every other family from its place."""
    own = loss_on(published.teacher, published.teacher, published.corpus, MEASURED, "float32").cross_entropy
    champion, _ = published(own / 9, own / 9, under=replace(here, **change))
    with models_loaded(monkeypatch) as loaded:
        _, verdict = published(own * 1.02, own * 1.02)
        assert not verdict.promoted and f"against the champion's {own:.4f}" in verdict.reason
        assert published.champions() == {champion.registration}
        assert len(loaded) == len(BUDGETS)
        better, verdict = published(own * 0.99, own * 0.99)
        assert verdict.promoted and published.champions() == {better.registration}


def test_a_champion_that_was_measured_alike_is_neither_fetched_nor_measured(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    with models_loaded(monkeypatch) as loaded:
        gate(2.0, 3.0)
        _, verdict = gate(1.9, 2.9)  # its objects are nowhere
    assert verdict.promoted and not loaded


def test_a_champion_of_before_conditions_were_recorded_is_measured_anew(
    published: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    champion, _ = published(0.001, 0.001)
    client = MlflowClient(tracking_uri=published.registry, registry_uri=published.registry)
    for model in champion.models.values():
        client.delete_model_version_tag(*model.rsplit(":", 1), tracking.MEASURED)
    with models_loaded(monkeypatch) as loaded:
        assert published(1.0, 1.0)[1].promoted and len(loaded) == len(BUDGETS)


def test_a_champion_that_can_only_be_measured_otherwise_keeps_its_place(published: Gate, here: Conditions) -> None:
    """As where the family was evaluated on a GPU and this machine has none."""
    champion, _ = published(9.0, 9.0)
    _, verdict = published(1.0, 1.0, under=replace(here, device="cuda", dtype="bfloat16"))
    assert not verdict.promoted and published.champions() == {champion.registration}
    assert "its champion was measured by another dtype and device (float32, cpu)" in verdict.reason


def test_a_champion_that_comes_meanwhile_is_not_replaced_unseen(gate: Gate, here: Conditions) -> None:
    gate(2.0, 3.0, under=replace(here, tokens=7))
    release = gate.register(1.0, 1.0)
    verdict = promote.fn(release, gate.evaluations[release.registration], {}, {}, Promotion())
    assert not verdict.promoted and "run again to be compared" in verdict.reason


def test_a_champion_that_cannot_be_measured_on_this_text_keeps_its_place(gate: Gate, here: Conditions) -> None:
    champion, _ = gate(2.0, 3.0, under=replace(here, tokens=7))
    release = gate.register(1.0, 1.0)
    none = Measured(cross_entropy=0.0, conditions=None, impossible="it has another tokenizer")
    verdict = promote.fn(
        release, gate.evaluations[release.registration], dict.fromkeys(champion.models.values(), none), {}, Promotion()
    )
    assert not verdict.promoted and "cannot be measured: it has another tokenizer" in verdict.reason


def test_a_champion_that_somebody_else_registered_keeps_its_place(gate: Gate) -> None:
    client = MlflowClient(tracking_uri=gate.registry, registry_uri=gate.registry)
    for budget in BUDGETS:
        client.create_registered_model(f"{gate.family}-{budget}")
        client.create_model_version(f"{gate.family}-{budget}", "s3://b/x", await_creation_for=0)
        client.set_registered_model_alias(f"{gate.family}-{budget}", tracking.CHAMPION, "1")
    _, verdict = gate(1.0, 1.0)
    assert not verdict.promoted and "version 1, was not registered by elastic" in verdict.reason


def test_conditions_are_told_apart_by_what_a_loss_depends_on_and_nothing_else(corpus: Path, here: Conditions) -> None:
    def under(settings: Evaluation) -> Conditions:
        return conditions(corpus, settings, heldout_batches(corpus / HELDOUT_FILE, settings, 290), "float32", FULL)

    for same in ({"batch_size": 1}, {"problems": "x.jsonl"}, {"max_problems": 3}, {"max_new_tokens": 9}):
        assert under(replace(MEASURED, **same)).digest == here.digest
    for other in ({"sequence_length": 20}, {"heldout_tokens": 200}):
        assert under(replace(MEASURED, **other)).digest != here.digest


def test_a_text_is_read_by_another_tokenizer_with_its_own_end_and_no_token_spelled_out(tmp_path: Path) -> None:
    ours, theirs = (write_tokenizer(tmp_path / name, name) for name in ("ours", "chatml"))
    text = ours.encode("hello.", add_special_tokens=False)
    read = retokenised(torch.tensor([*text, ours.eos_token_id]), ours, theirs)
    ids = torch.cat([read.inputs_BT[0, :1], read.targets_BT[0]]).tolist()
    assert ids == [*theirs.encode("hello.", add_special_tokens=False), theirs.eos_token_id]
    assert read.learned == len(ids) - 1
    asked = ours.encode("<|user|>hello.", add_special_tokens=False)
    with pytest.raises(CannotMeasure, match=r"lacks the special token '<\|user\|>'"):
        retokenised(torch.tensor(asked), ours, theirs)
