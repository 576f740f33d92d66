"""Slices in the engines that people serve with: vLLM and llama.cpp give the elastic model's logits and answers.

Each engine lives in an environment of its own (`make test-all` makes them): vLLM pins another torch, llama.cpp's
converter another transformers. The programs beside this file run there.
"""

import dataclasses
import json
import math
import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from elastic_core.files.checkpoint import write_weights
from elastic_core.files.reorder import identity_order, write_order
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.generate import complete
from elastic_core.geometry import FFN, FfnLayout, ModelConfig
from elastic_core.judging import Benchmark, Endpoint, Sampling
from elastic_core.layers.norm import Energy
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import Subnet, full_subnet
from tasks.corpus.tokenizer import SPECIAL_TOKENS, train_tokenizer
from tasks.judging.endpoint import Served
from tasks.judging.judge import judge
from tasks.running.loopback import answers, free_ports
from tasks.running.processes import ChildProcess

pytestmark = [pytest.mark.services, pytest.mark.slow]

HERE = Path(__file__).parent
LOG_PROBABILITY = 1e-4  # a dozen layers in float32, summed in other orders; measured: 1e-5
SECONDS = 600  # an engine that hangs should end
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "2"}
ON_A_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

CONFIG = ModelConfig(
    hybrid_override_pattern="M-M*-M-M*-M-",
    hidden_size=128,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=8,
    mamba_head_dim=32,
    ssm_state_size=32,
    n_groups=2,
    vocab_size=512,
    chunk_size=64,
    max_position_embeddings=1024,
)
FULL = full_subnet(CONFIG)
LAYERS = len(CONFIG.layers_of(FFN))


def cut(**changes: Any) -> Subnet:
    return dataclasses.replace(FULL, **changes)


SUBNETS = {
    "l": FULL,
    "m": cut(hidden=112, ffn=(320,) * LAYERS, mamba_heads=(6,) * 5),
    "s": cut(
        hidden=80,
        ffn=(192,) * LAYERS,
        mamba_heads=(4,) * 5,
        mamba_head_dim=24,
        attention_heads=(2, 2),
        layers=(0, 1, 3, 4, 5, 6, 7, 9, 10, 11),
    ),
    "between": cut(hidden=96, ffn=(256,) * LAYERS, mamba_heads=(6,) * 5, mamba_head_dim=24),
    "per layer": cut(hidden=112, ffn=(320, 256, 192, 384, 256), mamba_heads=(6,) * 5),
}

# A token chooses among all experts, or among those of one group of two.
OF_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 96,
    "routed_scaling_factor": 2.5,
}
EXPERTS = dataclasses.replace(CONFIG, hybrid_override_pattern="MEM*EME", **OF_EXPERTS)
LATENT = dataclasses.replace(EXPERTS, moe_latent_size=48, n_group=2, topk_group=1)
FEWER = {"hidden": 96, "experts": 6, "expert_ffn": (40,) * 3, "shared_ffn": 64, "top_k": 2}
WITH_EXPERTS = {
    "experts": (EXPERTS, FEWER),
    "latent": (LATENT, FEWER),
    "puzzle": (EXPERTS, FEWER | {"expert_ffn": (64, 24, 40)}),
    "puzzle, latent": (LATENT, FEWER | {"expert_ffn": (64, 24, 40)}),
}

TEXTS = ["def f(x):\n    return 12", "naïve café, 中文", "</s><|user|> spelled", " two  spaces "]
CHATS = [
    [{"role": "user", "content": "What is 3 + 4?"}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "The capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Italy?"},
    ],
]
NEW_TOKENS = 16


@dataclass(frozen=True)
class Family:
    """An elastic model with its subnets and their slices by name."""

    model: ElasticNemotronH
    subnets: dict[str, Subnet]
    slices: dict[str, Path]
    tokenizer: PreTrainedTokenizerFast

    def prompts(self) -> list[list[int]]:
        """A token, some tokens, and more of them than a chunk of the scan has."""
        some = torch.randint(CONFIG.vocab_size, (200,), generator=torch.Generator().manual_seed(5)).tolist()
        return [some[:1], some[:40], some]

    def scores(self, name: str) -> list[torch.Tensor]:
        """Log-probabilities after each position of each prompt."""
        with torch.no_grad():
            hidden = [self.model(torch.tensor([ids]), self.subnets[name]) for ids in self.prompts()]
            return [self.model.logits(states)[0].double().log_softmax(-1) for states in hidden]

    def answers(self, name: str) -> list[list[int]]:
        asked = [self.tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in CHATS]
        stop = {self.tokenizer.eos_token_id}
        return complete(self.model, asked, self.subnets[name], max_new_tokens=NEW_TOKENS, stop_tokens=stop)

    def assert_gave(self, name: str, found: dict[str, Any]) -> None:
        """An engine's scores and answers are those of the elastic model at the subnet."""
        for ours, theirs in zip(self.scores(name), found["scores"], strict=True):
            rows = torch.tensor(theirs, dtype=torch.float64)
            assert rows.shape[0] and (rows - ours[-len(rows) :]).abs().max() < LOG_PROBABILITY
        stop = self.tokenizer.eos_token_id
        assert [[token for token in answer if token != stop] for answer in found["answers"]] == self.answers(name)


def unwritten(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The special tokens, and parts of characters."""
    parts = [token for token in range(CONFIG.vocab_size) if "\ufffd" in tokenizer.decode([token])]
    return [*range(len(SPECIAL_TOKENS)), *parts]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return made(tmp_path_factory.mktemp("engines"), CONFIG, SUBNETS)


def made(root: Path, config: ModelConfig, subnets: dict[str, Subnet], *, ffn_layout: FfnLayout = "padded") -> Family:
    """Random weights with decided answers, time steps far below transformers' old least one, 0.001; norms scaled."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]
    tokenizer = train_tokenizer(
        (path.read_text() for path in library),
        root / "tokenizer",
        vocab_size=CONFIG.vocab_size,
        max_length=CONFIG.max_position_embeddings,
    )
    generator = torch.Generator().manual_seed(1)
    model = ElasticNemotronH(config)
    model.initialise(generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=1.5 / math.sqrt(weight.shape[1]), generator=generator)
            if name.endswith("dt_bias"):
                weight.uniform_(-12.0, -2.0, generator=generator)  # softplus: from 6e-6 to 0.1
            if name.endswith("e_score_correction_bias"):
                weight.normal_(std=0.5, generator=generator)  # overrules scores
        model.lm_head.weight[unwritten(tokenizer)] = 0.0  # never the likeliest: llama.cpp shows no scores beside them
    energy_D = torch.linspace(2.0, 0.1, config.hidden_size)
    order = dataclasses.replace(identity_order(config), energy=energy_D)
    write_weights(
        root / "family",
        config,
        model.state_dict(),
        torch.float32,
        source=root / "tokenizer",
        beside=lambda staging: write_order(staging, order),
    )
    model.scale_norms(Energy(energy_D))
    slices = {name: root / name.replace(" ", "-") for name in subnets}
    for name, subnet in subnets.items():
        slice_checkpoint(root / "family", subnet, slices[name], ffn_layout=ffn_layout)
    return Family(model=model.eval(), subnets=subnets, slices=slices, tokenizer=tokenizer)


def ask(python: Path, program: str, question: dict[str, Any], **environment: str) -> Any:
    """Run a program of this folder with another Python; what it prints, from JSON."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    done = subprocess.run(
        [python, HERE / program],
        input=json.dumps(question),
        env=kept | OFFLINE | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def vllm(engines: Path, family: Family) -> dict[str, Any]:
    """All slices in vLLM, in one process, for importing it takes longer than they do."""
    return in_vllm(engines, family, family.slices, lends_experts=False)


def in_vllm(engines: Path, family: Family, models: dict[str, Path], *, lends_experts: bool) -> Any:
    question = {
        "models": {name: str(path) for name, path in models.items()},
        "prompts": family.prompts(),
        "chats": CHATS,
        "new_tokens": NEW_TOKENS,
        "lends_experts": lends_experts,
    }
    return ask(engines / "vllm/bin/python", "ask_vllm.py", question, **ON_A_CPU)


@pytest.fixture(scope="module")
def endpoint(engines: Path, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The smallest slice behind vLLM's own HTTP server."""
    (port,) = free_ports(1)
    directory = tmp_path_factory.mktemp("server")
    server = ChildProcess(directory / "vllm.log")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    module = [str(engines / "vllm/bin/python"), "-m", "vllm.entrypoints.openai.api_server"]
    where = ["--model", str(family.slices["s"]), "--served-model-name", "s", "--host", "127.0.0.1", "--port", str(port)]
    as_above = ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--max-model-len", "512"]
    server.start([*module, *where, *as_above], environment=kept | OFFLINE | ON_A_CPU, directory=directory)
    deadline = time.monotonic() + SECONDS
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.running(), server.last_words()
            assert time.monotonic() < deadline, server.last_words()
            time.sleep(0.5)
        yield Endpoint(url=f"http://127.0.0.1:{port}/v1", model="s", concurrency=4)
    finally:
        server.stop()


@pytest.fixture(scope="module")
def llamacpp(engines: Path, family: Family, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All slices in llama.cpp."""
    return in_llamacpp(engines, family, family.slices, tmp_path_factory.mktemp("gguf"))


def in_llamacpp(engines: Path, family: Family, slices: dict[str, Path], files: Path) -> Any:
    """What llama.cpp makes of slices, converted by its own converter."""
    python = engines / "llamacpp/bin/python"
    models = {name: {"from": str(path), "to": str(files / f"{path.name}.gguf")} for name, path in slices.items()}
    converter = str(engines / "llamacpp/converter")
    ask(python, "convert.py", {"models": list(models.values()), "converter": converter})
    return ask(
        python,
        "ask_llamacpp.py",
        {
            "models": {name: model["to"] for name, model in models.items()},
            "vocab_size": CONFIG.vocab_size,
            "prompts": family.prompts(),
            "chats": CHATS,
            "new_tokens": NEW_TOKENS,
        },
    )


@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
@pytest.mark.parametrize("name", SUBNETS)
def test_a_slice_in_an_engine_gives_the_elastic_models_logits_and_answers(
    name: str, engine: str, family: Family, request: pytest.FixtureRequest
) -> None:
    family.assert_gave(name, request.getfixturevalue(engine)[name])


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """A family of each kind of experts, with a slice that has the kind's name."""
    root, families = tmp_path_factory.mktemp("experts"), dict[str, Family]()
    for name, (config, sizes) in WITH_EXPERTS.items():
        full = full_subnet(config)
        fewer = dataclasses.replace(full, **sizes, latent=full.latent * 2 // 3)
        families[name] = made(root / name, config, {name: fewer}, ffn_layout="list")
    return families


def test_a_slice_with_experts_in_vllm_gives_the_elastic_models_logits_and_answers(
    engines: Path, with_experts: dict[str, Family]
) -> None:
    """vLLM routes; on a CPU it does not run experts that are not gated, which vllm_experts.py computes."""
    slices = {name: family.slices[name] for name, family in with_experts.items()}
    found = in_vllm(engines, with_experts["experts"], slices, lends_experts=True)
    for name, family in with_experts.items():
        family.assert_gave(name, found[name])


def test_a_slice_with_experts_in_llamacpp_gives_the_elastic_models_logits_and_answers(
    engines: Path, with_experts: dict[str, Family], tmp_path: Path
) -> None:
    """The converter reads no widths that differ where there is no latent: it writes moe_latent_size as a number."""
    slices = {name: family.slices[name] for name, family in with_experts.items() if name != "puzzle"}
    found = in_llamacpp(engines, with_experts["experts"], slices, tmp_path)
    for name in slices:
        with_experts[name].assert_gave(name, found[name])


def test_a_benchmark_asked_of_an_engines_server_has_our_own_decoders_answers(
    endpoint: Endpoint, family: Family, tmp_path: Path
) -> None:
    questions = [f"What is {a} + {b}?" for a in range(4) for b in range(5)]
    chats = [
        [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": question}]
        for question in questions
    ]
    tokenizer, stop = family.tokenizer, {family.tokenizer.eos_token_id}
    asked = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    ours = complete(family.model, asked, SUBNETS["s"], max_new_tokens=NEW_TOKENS, stop_tokens=stop)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in ours]
    assert len(set(texts)) > 10  # so that an engine which gives one answer to all is seen
    problems = tmp_path / "problems.jsonl"
    rows = [{"question": question, "answer": text} for question, text in zip(questions, texts, strict=True)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    greedy = Sampling(temperature=0, top_p=1, max_new_tokens=NEW_TOKENS, system="Answer in one word.", thinking=False)
    benchmark = Benchmark(name="sums", path=str(problems), format="exact", runs=2, sampling=greedy)
    score = judge(benchmark, Served(endpoint, "s", "", "digest", "digest"), tmp_path / "samples.jsonl")
    assert (score.problems, score.runs, score.accuracy, score.unanswered) == (20, 2, 1.0, 0.0)
    assert 0 < score.tokens <= NEW_TOKENS


def test_the_models_time_steps_tell_the_clamp(family: Family) -> None:
    """What the tests above would not see: they need a model that another clamp changes by far more than they allow."""
    clamped = ElasticNemotronH(dataclasses.replace(CONFIG, time_step_limit=(0.001, None))).eval()
    clamped.load_state_dict(family.model.state_dict())
    tokens = torch.tensor([family.prompts()[1]])
    with torch.no_grad():
        other, ours = (m.logits(m(tokens, FULL)).log_softmax(-1) for m in (clamped, family.model))
    assert (other - ours).abs().max() > 100 * LOG_PROBABILITY


def test_a_trained_tokenizer_is_the_same_in_transformers_4(engines: Path, family: Family) -> None:
    directory = family.slices["s"]
    question = {"model": str(directory), "texts": TEXTS, "chats": CHATS}
    found = ask(engines / "llamacpp/bin/python", "ask_transformers4.py", question)
    here = AutoTokenizer.from_pretrained(directory)
    assert found["version"].startswith("4.57.")
    assert found["texts"] == [here(text)["input_ids"] for text in TEXTS]
    assert found["chats"] == [
        here.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in CHATS
    ]
    assert found["batch"] == here(TEXTS, padding=True)["input_ids"]
    assert sorted(found["special"]) == sorted(here.all_special_tokens)
    assert found["longest"] == here.model_max_length == CONFIG.max_position_embeddings
