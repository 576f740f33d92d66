"""What counts of a completion when problems are answered, and of held-out text."""

from pathlib import Path

import pytest
import torch
from micro import MICRO
from safetensors.torch import load_file
from templates import write_tokenizer
from trainee import documents_and_mask, write_family, write_tokens

from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Evaluation
from elastic_core.schema import build
from elastic_core.subnet import full_subnet
from elastic_core.training.job import load_model
from elastic_core.training.tokens import IGNORED
from tasks import evaluate
from tasks.corpus.chats import Chat
from tasks.corpus.problems import Problem
from tasks.evaluate import heldout_batches, heldout_loss, predicted

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
    monkeypatch.setattr(evaluate, "complete", lambda *args, **options: answers)
    found = evaluate.answer(ElasticNemotronH(MODEL), tokenizer, problems, Evaluation())
    assert found == evaluate.Answers(accuracy=accuracy, by_task={"sum": accuracy})


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
