"""What counts of a completion when problems are answered."""

from pathlib import Path

import pytest
from micro import MICRO
from templates import write_tokenizer

from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Evaluation
from elastic_core.schema import build
from tasks import evaluate
from tasks.corpus.chats import Chat
from tasks.corpus.problems import Problem

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
