"""What counts of a completion when problems are answered, and of held-out text."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from micro import MICRO
from records import CONDITIONS
from safetensors.torch import load_file, save_file
from templates import write_tokenizer
from trainee import documents_and_mask, write_family, write_tokens

from elastic_core.budget import Budget
from elastic_core.cost import subnet_params
from elastic_core.files import reorder
from elastic_core.files.checkpoint import ResolvedBudget, write_weights
from elastic_core.geometry import ModelConfig
from elastic_core.layers.norm import Energy
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Evaluation
from elastic_core.schema import build
from elastic_core.subnet import full_subnet
from elastic_core.training.curriculum import generator
from elastic_core.training.job import load_model
from elastic_core.training.tokens import IGNORED
from tasks import evaluate
from tasks.corpus.chats import Chat
from tasks.corpus.documents import digest_files
from tasks.corpus.heldout import heldout_batches, predicted
from tasks.corpus.problems import Problem
from tasks.corpus.record import HELDOUT_FILE
from tasks.evaluate import heldout_loss
from tasks.judging import exact
from tasks.promote import loss_on
from tasks.records import Artifact
from tasks.running.digests import artifact

MODEL = build(ModelConfig, MICRO["teacher"]["pretrain"]["model"])


@pytest.mark.parametrize(
    ("template", "said", "accuracy"),
    [
        ("nemotron3", "add one</think>\n\n{}", 1.0),
        ("nemotron3", "{}", 0.0),
        ("qwen3", "<think>\nadd one\n</think>\n\n{}", 1.0),
        ("qwen3", "{}", 1.0),
        ("ours", " {} ", 1.0),
        ("ours", "{}!", 0.0),
    ],
)
def test_what_follows_the_last_thought_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str, said: str, accuracy: float
) -> None:
    tokenizer = write_tokenizer(tmp_path, template)
    problems = [
        Problem(question=Chat([{"role": "user", "content": f"{a}+1?"}]), answer=str(a + 1), task="sum", where="")
        for a in range(4)
    ]
    answers = [tokenizer.encode(said.format(a + 1), add_special_tokens=False) for a in range(4)]
    monkeypatch.setattr(exact, "complete", lambda *args, **options: answers)
    settings = Evaluation(max_new_tokens=max(map(len, answers)) + 1)
    found = exact.tally(problems, exact.matches(ElasticNemotronH(MODEL), tokenizer, problems, settings))
    assert found == exact.Answers(problems=4, accuracy=accuracy, by_task={"sum": accuracy}, cut=0.0)


def test_an_answer_that_came_to_the_limit_of_tokens_counts_as_it_stands_and_as_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = write_tokenizer(tmp_path, "ours")
    question = Chat([{"role": "user", "content": "1+1?"}])
    problems = [Problem(question=question, answer=answer, task="sum", where="") for answer in ("2", "2", "22", "23")]
    two, stop = tokenizer.encode("2", add_special_tokens=False)[0], MODEL.eos_token_id

    def decode(*_: object, **limits: int) -> Iterator[torch.Tensor]:
        rows = [[two, stop], [two, two], [two, two], [two, two]]
        return map(torch.tensor, zip(*rows, strict=True))

    monkeypatch.setattr("elastic_core.generate.decode", decode)
    found = exact.matches(ElasticNemotronH(MODEL), tokenizer, problems, Evaluation(max_new_tokens=2))
    assert [tuple(match) for match in found] == [(True, False), (False, True), (True, True), (False, True)]
    assert exact.tally(problems, found) == exact.Answers(problems=4, accuracy=0.5, by_task={"sum": 0.5}, cut=0.75)


def test_what_is_decoded_together_does_not_depend_on_the_number_of_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 an answer may depend on the rows beside it."""
    family = write_family(tmp_path / "family")
    tokenizer = write_tokenizer(family, "ours")
    chats = [[{"role": "user", "content": f"{a}+1?"}, {"role": "assistant", "content": str(a + 1)}] for a in range(45)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    decoded = list[list[list[int]]]()

    def decode(model: object, prompt_BT: torch.Tensor, *_: object, **__: object) -> Iterator[torch.Tensor]:
        decoded.append(prompt_BT.tolist())
        for token in tokenizer.encode("7", add_special_tokens=False):
            yield torch.full((len(prompt_BT),), token)

    monkeypatch.setattr("elastic_core.generate.decode", decode)
    monkeypatch.setattr(evaluate, "on_devices", lambda function, shares: [function(share) for share in shares])
    found = dict[int, Any]()
    for count in (1, 2, 3):
        decoded.clear()
        monkeypatch.setattr(evaluate, "devices", lambda count=count: count)
        settings = Evaluation(problems=str(tmp_path / "problems.jsonl"), max_problems=45)
        answers = evaluate.measure_answers.fn(
            model=artifact(family), settings=settings, problems_digest=None, dtype="float32"
        )
        assert answers == exact.Answers(problems=45, accuracy=1 / 45, by_task={"all": 1 / 45}, cut=0.0)
        found[count] = sorted(decoded)
    assert found[1] == found[2] == found[3]
    assert sum(map(len, found[1])) == 45 and max(map(len, found[1])) > 1


def test_a_held_out_loss_is_the_mean_over_what_is_learned_of_documents_read_alone(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "heldout.safetensors", **documents_and_mask())
    family = load_model(write_family(tmp_path / "family"), torch.device("cpu"), torch.float32)
    settings = Evaluation(heldout_tokens=400, sequence_length=40, batch_size=3)
    batches = heldout_batches(path, settings, family.config.vocab_size)
    nats = []
    for batch in batches:
        assert batch.packing is not None
        for row, first, end in batch.packing.spans:
            targets = batch.targets_BT[row, first:end]
            with torch.inference_mode():
                hidden = family(batch.inputs_BT[row : row + 1, first:end], full_subnet(family.config))
                log_probs = family.logits(hidden)[0].log_softmax(-1)
            nats += [-float(log_probs[t, target]) for t, target in enumerate(targets.tolist()) if target != IGNORED]
    loss, _ = heldout_loss(family, full_subnet(family.config), batches)
    assert len(nats) == predicted(batches) < 400
    assert loss == pytest.approx(sum(nats) / len(nats), rel=1e-5)  # float32 sums in another order


def test_held_out_rows_come_from_all_over_the_file_whose_sources_lie_one_after_the_other(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "heldout.safetensors")
    tokens = load_file(path)["tokens"]
    rows = (len(tokens) - 1) // 40
    read = heldout_batches(path, Evaluation(heldout_tokens=160, sequence_length=40, batch_size=3), 10**6)
    places = [0, rows // 4, rows // 2, 3 * rows // 4]
    assert len(set(places)) == 4 and places[-1] > 4
    expected = torch.stack([tokens[40 * row : 40 * row + 40] for row in places])
    assert torch.equal(torch.cat([batch.inputs_BT for batch in read]), expected.long())
    assert [len(batch.inputs_BT) for batch in read] == [3, 1]


def test_held_out_text_of_which_nothing_is_learned_is_refused(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "heldout.safetensors", learned=torch.zeros(500, dtype=torch.uint8))
    with pytest.raises(ValueError, match="none of the 10 sequences read holds a token to learn"):
        heldout_batches(path, Evaluation(heldout_tokens=400, sequence_length=40), 32)


# Weights far larger than what a few tokens activate.
WIDE = replace(
    MODEL,
    hybrid_override_pattern=8 * MODEL.hybrid_override_pattern,
    hidden_size=256,
    intermediate_size=1024,
    vocab_size=512,
)
TEXT = Evaluation(heldout_tokens=24, sequence_length=8, batch_size=1)
MOST_RESIDENT = 2.05  # teachers: two, and what a batch activates


@pytest.fixture(scope="module")
def measured_on(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A teacher, another model of its size with norms that are scaled, and held-out text."""
    root = tmp_path_factory.mktemp("wide")
    for seed, name in enumerate(("teacher", "other")):
        model = ElasticNemotronH(WIDE)
        model.initialise(generator(seed))
        write_weights(root / name, WIDE, model.state_dict(), torch.float32)
    energy_D = torch.linspace(2.0, 0.1, WIDE.hidden_size)
    reorder.write_order(root / "other", replace(reorder.identity_order(WIDE), energy=energy_D))
    (root / "corpus").mkdir()
    save_file({"tokens": torch.arange(200, dtype=torch.int32)}, root / "corpus" / HELDOUT_FILE)
    return {name: artifact(root / name) for name in ("teacher", "other", "corpus")}


@pytest.fixture
def measuring(measured_on: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], Any]]:
    """Everything that loads a model to measure it."""
    monkeypatch.setattr(evaluate, "conditions", lambda *_: CONDITIONS)
    monkeypatch.setattr("tasks.promote.conditions", lambda *_: CONDITIONS)
    monkeypatch.setattr("tasks.promote.read_record", lambda _: SimpleNamespace(tokenizer_sha256=digest_files({})))
    teacher, other, corpus = (measured_on[name] for name in ("teacher", "other", "corpus"))
    whole = full_subnet(WIDE)
    text: dict[str, Any] = {"corpus": corpus, "settings": TEXT, "dtype": "float32"}
    cut: dict[str, Any] = {"reordered": other, "subnet": replace(whole, hidden=128), **text}
    return {
        "loss": lambda: evaluate.measure_loss.fn(model=other, teacher=teacher, **text),
        "cut": lambda: evaluate.measure_cut.fn(random_seed=None, **cut),
        "random cut": lambda: evaluate.measure_cut.fn(random_seed=3, **cut),
        "decoding": lambda: evaluate.measure_decoding.fn(model=other, **text),
        "champion": lambda: loss_on(Path(other.path), Path(teacher.path), Path(corpus.path), TEXT, "float32"),
    }


@pytest.mark.parametrize("what", ["loss", "cut", "random cut", "decoding", "champion"])
def test_no_measurement_holds_more_than_two_teachers(what: str, measuring: dict[str, Callable[[], Any]]) -> None:
    one = 4 * subnet_params(WIDE, full_subnet(WIDE))
    with LiveBytes() as memory:
        measuring[what]()
    assert (2 if what == "loss" else 1) * one <= memory.peak <= MOST_RESIDENT * one


def test_two_processes_measure_as_one_to_the_bit(
    measuring: dict[str, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = measuring["loss"]()
    monkeypatch.setattr(evaluate, "devices", lambda: 2)
    assert measuring["loss"]() == alone


def test_a_random_cut_is_the_cut_of_the_model_in_that_order(
    measured_on: dict[str, Artifact], measuring: dict[str, Callable[[], Any]]
) -> None:
    model = load_model(Path(measured_on["other"].path), torch.device("cpu"), torch.float32)
    order = reorder.random_order(WIDE, generator(3, "random order"))
    model.load_state_dict(reorder.reorder_weights(model.state_dict(), order, WIDE))
    model.scale_norms(Energy(torch.linspace(2.0, 0.1, WIDE.hidden_size)[order.hidden]))
    subnet = replace(full_subnet(WIDE), hidden=128)
    batches = heldout_batches(Path(measured_on["corpus"].path) / HELDOUT_FILE, TEXT, WIDE.vocab_size)
    assert measuring["random cut"]() == heldout_loss(model, subnet, batches)[0] != measuring["cut"]()


def test_an_evaluation_asks_one_step_for_each_number_of_each_budget(
    measured_on: dict[str, Artifact], measuring: dict[str, Callable[[], Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, other, corpus = (measured_on[name] for name in ("teacher", "other", "corpus"))
    whole = full_subnet(WIDE)
    half = replace(whole, hidden=128)
    budgets = [ResolvedBudget(budget=Budget(name=n), subnet=at, params=1) for n, at in (("l", whole), ("s", half))]
    asked: list[str] = []

    def run(step: Any, **inputs: Any) -> Any:
        asked.append(step.name)
        return step.fn(**inputs)

    monkeypatch.setattr(evaluate, "run", run)
    monkeypatch.setattr(evaluate.checkpoint, "read_family", lambda _: SimpleNamespace(budgets=budgets))
    found = evaluate.evaluate.fn(
        teacher=teacher,
        reordered=other,
        family=other,
        slices={"l": other, "s": other},
        corpus=corpus,
        settings=TEXT,
        problems_digest=None,
        dtype="float32",
        seed=3,
    )
    of_a_budget = ["measure_loss", "measure_decoding", "measure_cut", "measure_cut"]
    assert asked == ["measure_loss", *of_a_budget, *of_a_budget]
    assert (found.heldout_tokens, found.problems, found.teacher_accuracy) == (24, 0, None)
    loss, (large, small) = measuring["loss"](), found.budgets
    assert (large.cross_entropy, large.kl) == (small.cross_entropy, small.kl) == (loss.cross_entropy, loss.kl)
    assert large.cut_cross_entropy == pytest.approx(large.cross_entropy, rel=1e-6)
    assert small.cut_cross_entropy == measuring["cut"]()
    assert small.random_cut_cross_entropy == measuring["random cut"]()
    assert large.weight_bytes == 4 * large.params < large.memory_bytes
