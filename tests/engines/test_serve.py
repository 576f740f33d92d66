"""vLLM as we start it, on this CPU: by `elastic serve`, asked by OpenAI's own client, and by the step that judges."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from transformers import AutoTokenizer

from elastic_core.files.checkpoint import write_weights
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.generate import complete
from elastic_core.geometry import FFN, ModelConfig
from elastic_core.judging import Benchmark, Engine, EngineKind, Sampling
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import Subnet, full_subnet
from flows.serving.services import embedded_services
from tasks import artifacts, judge, tracking
from tasks.corpus.tokenizer import train_tokenizer
from tasks.judging.started import program_for
from tasks.running.digests import artifact
from tasks.running.loopback import free_ports
from tasks.settings import HOME, Settings

pytestmark = [pytest.mark.services, pytest.mark.slow]

SECONDS = 600  # an engine that hangs should end
CONFIG = ModelConfig(
    hybrid_override_pattern="M-M*-",
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    vocab_size=512,
    chunk_size=64,
    max_position_embeddings=1024,
)
LARGE = full_subnet(CONFIG)
SUBNETS = {"l": LARGE, "s": dataclasses.replace(LARGE, hidden=48, ffn=(64,) * len(CONFIG.layers_of(FFN)))}
OPTIONS = "--enforce-eager --max-model-len 512 --max-num-seqs 4"


def written_family(root: Path) -> ElasticNemotronH:
    """A family of random weights, and its slices beside it."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:30]
    texts = (path.read_text() for path in library)
    train_tokenizer(texts, root / "tokenizer", vocab_size=CONFIG.vocab_size, max_length=CONFIG.max_position_embeddings)
    model = ElasticNemotronH(CONFIG)
    generator = torch.Generator().manual_seed(1)
    model.initialise(generator)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:  # so that answers are decided
                weight.normal_(std=1.5 / weight.shape[1] ** 0.5, generator=generator)
    write_weights(root / "family", CONFIG, model.state_dict(), torch.float32, source=root / "tokenizer")
    for budget, subnet in SUBNETS.items():
        slice_checkpoint(root / "family", subnet, root / budget)
    return model.eval()


def registered_family(root: Path) -> ElasticNemotronH:
    """Such a family in the registry of a state directory, its sizes champions."""
    model = written_family(root)
    with embedded_services(root / "home"):
        settings = Settings.from_environment()
        directories = {budget: root / budget for budget in SUBNETS}
        artifacts.publish(
            artifacts.open_store(settings), family="tiny", version="1", directories=directories, metadata={}
        )
        uri = artifacts.manifest_uri(settings.bucket, "tiny", "1")
        members = [
            tracking.Member(budget=budget, source=f"{uri.rpartition('/')[0]}/{budget}", metrics={}, tags={})
            for budget in SUBNETS
        ]
        made = tracking.register_family(
            settings.registry, family="tiny", version="1", manifest_uri=uri, run_id="", members=members
        )
        tracking.set_alias(settings.registry, tracking.CHAMPION, {entry.name: entry.version for entry in made.values()})
    return model


def greedy(model: ElasticNemotronH, subnet: Subnet, prompt: list[int], tokens: int) -> list[int]:
    (ids,) = complete(model, [prompt], subnet, max_new_tokens=tokens, stop_tokens={2})
    return ids


def asked(engine: Path, url: str) -> dict[str, Any]:
    """What OpenAI's client gets, which is in vLLM's environment."""
    python = Path(engine.read_text().splitlines()[0].removeprefix("#!"))
    program = Path(__file__).with_name("ask_openai.py")
    done = subprocess.run([python, program, url], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def test_a_registered_family_is_served_to_a_stock_client_and_again_when_its_engines_are_killed(
    vllm_program: Path, tmp_path: Path
) -> None:
    model = registered_family(tmp_path)
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "flows.cli", "serve", "tiny-s", "--port", str(port)]
    command += [
        "--engine",
        str(vllm_program),
        "--engine-options",
        f"--dtype float32 {OPTIONS}",
        "--cache",
        "64MiB",
        "--memory",
        "1GiB",
    ]
    environment = os.environ | {HOME: str(tmp_path / "home"), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (tmp_path / "serve.log").open("w") as log:
        serving = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    try:
        while "endpoint" not in (said := (tmp_path / "serve.log").read_text()):
            assert serving.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.2)
        started = psutil.Process(serving.pid).children(recursive=True)
        found = asked(vllm_program, f"{url}/v1")
        states, measured = requests.get(f"{url}/health", timeout=60).json(), requests.get(f"{url}/metrics", timeout=60)
        started += psutil.Process(serving.pid).children(recursive=True)
        for engine in psutil.Process(serving.pid).children():
            engine.kill()
        assert asked(vllm_program, f"{url}/v1") == found
        started += psutil.Process(serving.pid).children(recursive=True)
        serving.send_signal(signal.SIGINT)
        assert serving.wait(60) == 130, (tmp_path / "serve.log").read_text()
    finally:
        serving.kill()
    assert started and not psutil.wait_procs(started, timeout=10)[1]
    assert states["models"] == {"tiny-l": "running", "tiny-s": "running"}
    assert "vllm:request_success_total{" in measured.text and 'size="tiny-l"' in measured.text

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "s")
    prompt = tokenizer.encode("<|user|>What is 3 + 4?<|assistant|>", add_special_tokens=False)
    alone = tokenizer.decode(greedy(model, SUBNETS["s"], prompt, 16), skip_special_tokens=True)
    assert found["models"] == ["tiny-s", "tiny-l"]
    assert found["chat"] == "".join(found["pieces"]) == alone
    assert len(found["pieces"]) > 2
    assert "tiny-s, tiny-l" in found["refused"]

    thinking = prompt + tokenizer.encode("<think>\n", add_special_tokens=False)
    thought = tokenizer.decode(greedy(model, SUBNETS["s"], thinking, 5))
    assert found["thought"] == found["thought streamed"] == thought
    answering = thinking + tokenizer.encode(f"{thought}\n</think>\n\n", add_special_tokens=False)
    answer = tokenizer.decode(greedy(model, SUBNETS["l"], answering, 11), skip_special_tokens=True)
    assert found["answer"] == found["answer streamed"] == answer
    assert found["tokens"] == 16


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (
            "vllm",
            f"{OPTIONS} --kv-cache-memory-bytes {64 << 20}",
            r"vllm [.\d]+ --mamba_ssm_cache_dtype float32 --dtype float32 ",
        ),
        ("transformers", "", r"transformers [.\d]+ --dtype float32$"),
    ],
    ids=["vllm", "transformers"],
)
def test_the_step_that_judges_starts_an_engine_and_gets_our_own_decoders_answers(
    kind: EngineKind,
    options: str,
    said: str,
    engines: Path,
    vllm_program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / kind).symlink_to(vllm_program if kind == "vllm" else engines / "vllm/bin/transformers")
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    model, tokenizer = written_family(tmp_path), AutoTokenizer.from_pretrained(tmp_path / "s")
    rows = []
    for question in (f"What is {a} + {b}?" for a in range(2) for b in range(2)):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        answer = tokenizer.decode(greedy(model, SUBNETS["s"], prompt, 8), skip_special_tokens=True)
        rows.append({"question": question, "answer": answer})
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = Sampling(temperature=0, top_p=1, max_new_tokens=8, system=None, thinking=False)
    sums = Benchmark(name="sums", path=str(file), format="exact", runs=1, sampling=drawn)
    asked = Engine(program=kind, options=options, seconds=SECONDS)
    told = program_for(asked, "float32").told
    before = psutil.Process().children(recursive=True)
    score = judge.judge_started.fn(
        model=artifact(tmp_path / "s"),
        problems=judge.bring_problems.fn(benchmark=sums, identity="", workspace=str(tmp_path)),
        benchmark=sums,
        engine=asked,
        told=told,
        dtype="float32",
        unsafe_code=False,
    )
    assert re.match(said, told)
    assert len({row["answer"] for row in rows}) > 1  # so that an engine which gives one answer to all is seen
    assert (score.accuracy, score.problems) == (1.0, 4)
    assert set(psutil.Process().children(recursive=True)) <= set(before)
