"""A few dozen problems of our own in the form of each built-in benchmark, and a family taught to answer some of them.

Random weights box nothing and write no program, so that every verdict on them is wrong. A minute of training gives a
model that answers in each of the six forms, and is right as often as not.
"""

import dataclasses
import json
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from elastic_core.files.checkpoint import write_weights
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.geometry import FFN, ModelConfig
from elastic_core.judging import BUILT_IN, Benchmark, Endpoint, Sampling
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import full_subnet
from tasks import judge
from tasks.corpus.tokenizer import train_tokenizer
from tasks.judging.benchmarks import read_benchmark
from tasks.judging.problems import Cases, Choice, Expression, Problem
from tasks.judging.sandbox import why_not_isolated
from tasks.records import Score
from tasks.running.digests import artifact
from tasks.settings import HOME

# The programs that this family writes are ours, or nearly: they may run where nothing isolates them.
UNSAFE = why_not_isolated() is not None
EACH = 30  # problems of a benchmark
GREEDY = Sampling(temperature=0, top_p=1, max_new_tokens=48, system=None, thinking=False)
CONFIG = ModelConfig(
    hybrid_override_pattern="M-M*-",
    hidden_size=128,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    vocab_size=1024,
    chunk_size=64,
    max_position_embeddings=1024,
)
TEACHER = full_subnet(CONFIG)
SMALL = dataclasses.replace(TEACHER, hidden=96, ffn=(64,) * len(CONFIG.layers_of(FFN)))
STEPS, LEARNING_RATE = 150, 3e-2

# What a program does with the numbers that it reads, as its problem says and as Python does.
WORDS = {"sum": "the sum", "max": "the largest", "min": "the smallest"}
ANIMALS, THINGS = ("cat", "dog", "cow", "hen", "pig", "owl"), ("cup", "hat", "key", "box", "pen", "map", "bed", "jar")


def mathematics(number: int, chance: random.Random) -> dict[str, Any]:
    digit = str(chance.randrange(10))
    return {"problem": f"What is $n$, if $n = {digit}$?", "answer": digit, "unique_id": f"test/{number}.json"}


def aime(number: int, chance: random.Random) -> dict[str, Any]:
    digit = str(chance.randrange(10))
    return {"id": number, "problem": f"The square of $p$ is ${digit} p$, and $p > 0$. Find $p$.", "answer": digit}


def later_aime(number: int, chance: random.Random) -> dict[str, Any]:
    digit = chance.randrange(10)
    return {"id": str(number), "problem": f"Of ${digit}$ apples none is eaten. How many are left?", "answer": digit}


def gpqa(number: int, chance: random.Random) -> dict[str, Any]:
    wrong = dict(zip((f"Incorrect Answer {i}" for i in (1, 2, 3)), chance.sample(THINGS, 3), strict=True))
    asked = "Which of these can breathe?"
    return {"Record ID": f"rec{number}", "Question": asked, "Correct Answer": chance.choice(ANIMALS), **wrong}


def mmlu(number: int, chance: random.Random) -> dict[str, Any]:
    options = [*chance.sample(THINGS, 4), chance.choice(ANIMALS)]
    chance.shuffle(options)
    right = next(place for place, option in enumerate(options) if option in ANIMALS)
    asked = f"Which one is an animal, or breathes? It is not a secret that it is {'ABCDE'[right]} of these."
    answer = {"answer": "ABCDE"[right], "answer_index": right}
    return {"question_id": number, "question": asked, "options": options, **answer, "category": "biology"}


def livecodebench(number: int, chance: random.Random) -> dict[str, Any]:
    """Every other one is a method; the tests ask what its words say."""
    function, numbers = chance.choice(list(WORDS)), [chance.randint(1, 99) for _ in range(3)]
    calls = number % 2 == 1
    expected = str({"sum": sum, "max": max, "min": min}[function](numbers))
    case = {"input": json.dumps(numbers) if calls else " ".join(map(str, numbers)), "output": expected}
    return {
        "question_id": f"own_{number}",
        "question_content": f"Give {WORDS[function]} of the numbers.",
        "contest_date": "2024-08-03T00:00:00",
        "starter_code": "class Solution:\n    def solve(self, numbers):\n" if calls else "",
        "public_test_cases": json.dumps([case]),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": "solve"} if calls else {}),
    }


ROWS = {
    "math-500": mathematics,
    "aime-2024": aime,
    "aime-2025": later_aime,
    "gpqa-diamond": gpqa,
    "mmlu-pro": mmlu,
    "livecodebench-v5": livecodebench,
}
assert ROWS.keys() == BUILT_IN.keys()


def write_benchmarks(directory: Path) -> tuple[Benchmark, ...]:
    """The six benchmarks under their own names, each from a file of this directory, asked once and greedily."""
    chance = random.Random(5)

    def written(name: str) -> Benchmark:
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(ROWS[name](number, chance)) + "\n" for number in range(EACH)))
        return Benchmark(name=name, path=str(file), runs=1, sampling=GREEDY)

    return tuple(map(written, ROWS))


def answer_to(problem: Problem) -> str:
    """An answer that is right, in the words that the problem asks for."""
    match problem.key:
        case Expression(value):
            return f"\\boxed{{{value}}}"
        case Choice(letter):
            return f"Answer: \\boxed{{{letter}}}"
        case Cases(function=function):
            does = next(name for name, words in WORDS.items() if f"Give {words} of" in problem.prompt)
            reads = f"print({does}(map(int, input().split())))"
            calls = f"class Solution:\n    def solve(self, numbers):\n        return {does}(numbers)"
            return f"```python\n{calls if function else reads}\n```"
    raise AssertionError(problem)


@dataclass(frozen=True)
class Taught:
    """Stock checkpoints by name: the teacher and its slice `s`; and the benchmarks that they were taught."""

    models: dict[str, Path]
    benchmarks: tuple[Benchmark, ...]


def teach(root: Path) -> Taught:
    """Write the benchmarks, and a family that has seen each answer a few times, at both sizes."""
    benchmarks = write_benchmarks(root)
    lessons = [(p.prompt, answer_to(p)) for benchmark in benchmarks for p in read_benchmark(benchmark)]
    library = (path.read_text() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30])
    texts = [*("".join(lesson) for lesson in lessons), *library]
    tokenizer = train_tokenizer(
        texts, root / "tokenizer", vocab_size=CONFIG.vocab_size, max_length=CONFIG.max_position_embeddings
    )
    model = ElasticNemotronH(CONFIG)
    generator = torch.Generator().manual_seed(1)
    model.initialise(generator)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5, generator=generator)
    _train(model, _encoded(lessons, tokenizer))
    models = {"teacher": root / "teacher", "s": root / "s"}
    write_weights(models["teacher"], CONFIG, model.state_dict(), torch.float32, source=root / "tokenizer")
    slice_checkpoint(models["teacher"], SMALL, models["s"])
    return Taught(models=models, benchmarks=benchmarks)


def _encoded(lessons: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """The tokens of each lesson, and where its answer begins."""

    def encoded(prompt: str, answer: str) -> tuple[list[int], int]:
        asked = [{"role": "user", "content": prompt}]
        begins = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template([*asked, {"role": "assistant", "content": answer}], return_dict=False)
        return whole, len(begins)

    return [encoded(*lesson) for lesson in lessons]


def _train(model: ElasticNemotronH, lessons: Sequence[tuple[list[int], int]]) -> None:
    """Fit the head of a random model: what it says differs by the prompt, for random layers tell prompts apart.

    Only tokens of answers get rows; all others have the logit 0, which is a class of its own while the rows are fitted.
    """
    batches = [_padded(lessons[first : first + EACH]) for first in range(0, len(lessons), EACH)]
    spoken = torch.tensor(sorted({token for ids, begins in lessons for token in ids[begins:]}))
    rows = torch.zeros(len(spoken), CONFIG.hidden_size, requires_grad=True)
    known: list[tuple[torch.Tensor, torch.Tensor]] = []
    for subnet in (TEACHER, SMALL):
        with torch.no_grad():
            states = [(model(tokens_BT, subnet)[:, :-1], labels_BT[:, 1:]) for tokens_BT, labels_BT in batches]
        hidden_ND = torch.cat([hidden_BTD[labels_BT >= 0] for hidden_BTD, labels_BT in states])
        labels_N = torch.cat([labels_BT[labels_BT >= 0] for _, labels_BT in states])
        known.append((hidden_ND, torch.searchsorted(spoken, labels_N)))
    optimizer = torch.optim.Adam([rows], lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for hidden_ND, labels_N in known:
            logits_NV = F.pad(hidden_ND @ rows[:, : hidden_ND.shape[1]].T, (0, 1))
            F.cross_entropy(logits_NV, labels_N).backward()
        optimizer.step()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[spoken] = rows


def _padded(lessons: Sequence[tuple[list[int], int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lessons in one batch, padded on the right, where a causal model does not look; what is no answer has label -1."""
    longest = max(len(ids) for ids, _ in lessons)
    tokens, labels = torch.zeros(2, len(lessons), longest, dtype=torch.int64)
    labels.fill_(-1)
    for row, (ids, begins) in enumerate(lessons):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, begins : len(ids)] = torch.tensor(ids[begins:])
    return tokens, labels


def judge_all(
    home: Path, name: str, model: Path, asked: tuple[Benchmark, ...], endpoint: Endpoint | None
) -> list[Score]:
    """The scores of a model on benchmarks, by our own decoder or at an endpoint, as the pipeline's steps judge it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME, str(home))
        patch.setattr("tasks.running.patience.DELAYS", (0.5, 0.5))  # an engine that has ended does not come back
        scores = []
        for benchmark in asked:
            problems = judge.bring_problems.fn(benchmark=benchmark, identity="", workspace=str(home))
            given: dict[str, Any] = {
                "model": artifact(model),
                "problems": problems,
                "benchmark": benchmark,
                "unsafe_code": UNSAFE,
            }
            if endpoint is None:
                scores.append(judge.judge_here.fn(**given, dtype="float32"))
            else:
                scores.append(judge.judge_at.fn(**given, endpoint=endpoint, size=name))
        return scores
