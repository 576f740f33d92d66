"""Whatever a user gets wrong ends in one line that says what to do, a non-zero exit, and nothing half made."""

import fcntl
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import prefect
import pytest
import torch
import yaml
from micro import LIMIT_SECONDS
from mlflow import MlflowClient
from prefect.logging.configuration import setup_logging
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from safetensors.torch import load_file, save_file

from elastic_core.budget import Budget
from elastic_core.files import reorder
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.recipe import Router
from elastic_core.schema import build
from elastic_core.training.curriculum import generator
from flows.cli import main
from flows.commands.run import PREFECT_LOGGING
from tasks.artifacts import Store
from tasks.corpus.tokenizer import load_tokenizer, train_tokenizer
from tasks.rank import reorder_teacher
from tasks.running.digests import artifact
from tasks.running.training import train
from tasks.settings import BUCKET, ENDPOINT_S3, HOME, TRACKING_URI, Settings
from tasks.teacher import write_fresh_model

MODEL = ModelConfig(
    hybrid_override_pattern="M-*-",
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    vocab_size=280,
    chunk_size=16,
)

RECIPE: dict[str, Any] = {
    "family": "bad",
    "dtype": "float32",
    "teacher": {"path": "teacher"},
    "data": {"sources": [{"path": "stories.jsonl"}], "heldout_fraction": 0.2},
    "axes": {"hidden": [32, 16], "ffn": [48, 24], "mamba_heads": [4, 2], "attention_heads": [4, 2]},
    "budgets": [{"name": "l"}, {"name": "s", "params": 18000}],
    "importance": {"samples": 4, "sequence_length": 32, "batch_size": 4, "depth_samples": 4},
    "shapes": {"samples": 4, "sequence_length": 32, "batch_size": 4, "measurements": 40},
    "router": {"hidden_size": 8},
    "stages": [
        {
            "name": "stage1",
            "sequence_length": 32,
            "batch_size": 2,
            "steps": 4,
            "budgets": {"l": 1, "s": 1},
            "optimizer": {"learning_rate": 1e-3},
        },
    ],
    "evaluation": {"heldout_tokens": 256, "sequence_length": 32},
}


@pytest.fixture(scope="module")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One Prefect server for all, as quiet as the command has it, and nothing of it in anyone's home."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PREFECT_LOGGING.items():
            patch.setenv(name, value)
        setup_logging()
        ours = {PREFECT_HOME: tmp_path_factory.mktemp("prefect"), PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(ours), prefect_test_harness(180):
            yield PREFECT_API_URL.value()
    setup_logging()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its documents and its teacher, all of them good. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("inputs")
    choose = random.Random(0)
    words = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "it", "saw", "red", "blue", "bird"]
    stories = [" ".join(choose.choices(words, k=30)) for _ in range(40)]
    (directory / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    train_tokenizer(stories, directory / "tokenizer", vocab_size=MODEL.vocab_size)
    write_fresh_model(directory / "teacher", MODEL, directory / "tokenizer", seed=0)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return directory


# What may stand before the complaint: steps that are done, none of which trains, and what they told.
STEP = "(fetch teacher|prepare data|rotate teacher|rank importance|reorder teacher|choose shapes|compare orders)"
PROGRESS = re.compile(
    rf"{STEP} +(cached|[\d.]+ s)|teacher .*: \d+ layers, hidden size \d+|.+: \d+ %, [\w. ]+ left|"
    ".+: the order of importance is no better than a random one; .+"
)
# The step that a directory of the workspace is of; a stage's own is not here, since it is what a next attempt needs.
MADE_BY = {
    "corpus": "prepare data",
    "rotated": "rotate teacher",
    "importance": "rank importance",
    "reordered": "reorder teacher",
    "shaped": "choose shapes",
}

Refused = Callable[..., str]
Change = Callable[[Path], None]


@pytest.fixture
def refused(
    settings: Settings,
    store: Store,
    prefect_api: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Refused:
    """Runs `elastic` in this process, holds it to the law of this file, and returns the line that it ended with."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # Typer sets its own
    for logger in map(logging.getLogger, ("elastic_core", "tasks", "flows")):
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "level", logger.level)

    def run(*arguments: str | Path, code: int = 1) -> str:
        monkeypatch.setattr(sys, "argv", ["elastic", *map(str, arguments)])
        secrets = [value for name, value in os.environ.items() if "SECRET" in name]
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capfd.readouterr()
        assert stop.value.code == code, out + err
        *progress, line = err.splitlines()
        assert line.startswith("elastic: "), err
        assert all(PROGRESS.fullmatch(before) for before in progress), err
        assert not any(secret in out + err for secret in secrets)
        assert not out
        assert_nothing_is_half_made(settings.home, err)
        assert "Contents" not in store.client.list_objects_v2(Bucket=settings.bucket)
        assert not MlflowClient(settings.tracking_uri).search_registered_models("name LIKE 'bad-%'")
        return line

    return run


def assert_nothing_is_half_made(home: Path, told: str) -> None:
    assert not list(home.rglob("*.partial"))
    assert not list(home.glob("workspace/stage1-*/family"))
    for path in home.glob("workspace/*"):
        if not path.name.startswith(("stage1-", "shards-")):  # they go on where they were
            made_by = MADE_BY[path.name.rpartition("-")[0]]
            assert re.search(rf"^{made_by} +[\d.]+ s$", told, re.MULTILINE), path


# The teacher


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(teacher: Path) -> None:
        tensors = load_file(teacher / "model.safetensors")
        change(tensors)
        save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**changes: object) -> Change:
    def apply(teacher: Path) -> None:
        found = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps(found | changes))

    return apply


def truncate(teacher: Path) -> None:
    path = teacher / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def lose_a_shard(teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    places = {name: f"model-0000{1 + (name == 'lm_head.weight')}-of-00002.safetensors" for name in tensors}
    (teacher / "model.safetensors").unlink()
    first = "model-00001-of-00002.safetensors"
    save_file({name: tensors[name] for name in tensors if places[name] == first}, teacher / first)
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def add_an_index(teacher: Path) -> None:
    weight_map = dict.fromkeys(load_file(teacher / "model.safetensors"), "model.safetensors")
    (teacher / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def leave_a_pointer(name: str) -> Change:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"
    return lambda teacher: (teacher / name).write_text(pointer)


def lose_the_tokenizer(teacher: Path) -> None:
    for path in teacher.glob("*token*"):
        path.unlink()


def grow_the_tokenizer(teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    tokenizer.add_tokens(["<one-too-many>"])
    tokenizer.save_pretrained(teacher)


NORM = "backbone.norm_f.weight"

BAD_TEACHERS: dict[str, tuple[Change, str]] = {
    "truncated shard": (truncate, r"model.safetensors: is truncated"),
    "missing shard": (lose_a_shard, r"model-00002-of-00002.safetensors: there is no such file"),
    "weights and an index": (add_an_index, r"holds model.safetensors and model.safetensors.index.json, and some"),
    "weights that Git LFS did not fetch": (
        leave_a_pointer("model.safetensors"),
        r"model.safetensors: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`",
    ),
    "tokenizer that Git LFS did not fetch": (
        leave_a_pointer("tokenizer.json"),
        r"tokenizer.json: is a Git LFS pointer",
    ),
    "time_step_limit as text": (
        config(time_step_limit="[0, inf]"),
        r"time_step_limit is '\[0, inf\]'; expected a list",
    ),
    "wrong dtype": (weights(lambda t: t.update({NORM: t[NORM].long()})), rf"{NORM}: has dtype torch.int64"),
    "NaN weight": (weights(lambda t: t[NORM].fill_(math.nan)), rf"{NORM}: holds NaN"),
    "extra key": (weights(lambda t: t.update({"backbone.extra": torch.ones(3)})), r"unexpected: backbone.extra \[3\]"),
    "missing key": (weights(lambda t: t.pop(NORM)), rf"missing: {NORM} \[32\]"),
    "config that contradicts the weights": (config(hidden_size=64), r"has shape \[280, 32\]; .* implies \[280, 64\]"),
    "no config": (lambda teacher: (teacher / "config.json").unlink(), r"config.json: there is no such file"),
    "layers of experts": (config(hybrid_override_pattern="M-*E"), r"num_experts_per_tok=0 must be greater than 0"),
    "another architecture": (config(model_type="llama"), r"model_type is 'llama'; only 'nemotron_h' is supported"),
    "Mamba heads that no group takes": (
        config(n_groups=3, mamba_n_groups=3),
        r"mamba_num_heads=4 is not a multiple of n_groups=3",
    ),
    "query heads that no KV head takes": (config(num_attention_heads=3), r"num_attention_heads=3 is not a multiple"),
    "no tokenizer": (lose_the_tokenizer, r"no tokenizer can be loaded .*; add the teacher's tokenizer.json"),
    "tokenizer above the vocabulary": (grow_the_tokenizer, r"has 281 tokens but the model's vocab_size is 280"),
}


@pytest.mark.parametrize(("change", "says"), BAD_TEACHERS.values(), ids=BAD_TEACHERS)
def test_a_bad_teacher_is_refused(change: Change, says: str, refused: Refused, inputs: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(inputs / "teacher", teacher)
    change(teacher)
    assert re.search(says, refused("run", inputs / "recipe.yaml", f"teacher.path={teacher}"))


@pytest.mark.parametrize(
    "path", ["org/name", "no/such/directory", "/no/such/directory"], ids=["offline", "relative", "absolute"]
)
def test_a_teacher_that_is_nowhere_is_refused(
    path: str, refused: Refused, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("run", inputs / "recipe.yaml", f"teacher.path={path}")
    why = ": there is no such directory" if path.startswith("/") else ", and the Hub does not give it"
    assert f"teacher.path '{path}' is not here{why}" in line


def test_a_teacher_that_is_not_in_the_bucket_is_refused(refused: Refused, inputs: Path, settings: Settings) -> None:
    uri = f"s3://{settings.bucket}/no/teacher"
    assert f"{uri} holds no objects; check the prefix" in refused("run", inputs / "recipe.yaml", f"teacher.path={uri}")


# The recipe

BAD_SETTINGS: dict[str, tuple[list[str], str]] = {
    "unknown key": (["stages.0.step=3"], r"stages\[0\].step is not a known setting; did you mean 'steps'\?"),
    "value of another type": (["seed=often"], r"seed is 'often'; expected a number"),
    "override without a value": (["seed"], r"override 'seed' is not key=value"),
    "override that is no YAML": (["axes.hidden=[32"], r"override 'axes.hidden=\[32': the value is not YAML"),
    "override of no list entry": (["stages.7.steps=3"], r"override stages.7.steps: '7' is not a position"),
    "Mamba heads that no group takes": (
        ["axes.mamba_heads=[4,3]"],
        r"axes.mamba_heads=3 is not a multiple of n_groups=2",
    ),
    "query heads that no KV head takes": (
        ["axes.attention_heads=[4,3]"],
        r"axes.attention_heads=3 is not a multiple of num_key_value_heads=2",
    ),
    "axis that is not the teacher's": (["axes.hidden=[24,16]"], r"axes.hidden begins with 24; .* the teacher's 32"),
    "axis that rises": (["axes.ffn=[24,48]"], r"axes: ffn=\[24, 48\] must fall from the largest"),
    "budget above the teacher": (
        ["budgets.1.params=1e6"],
        r"budget s: 1,000,000 parameters is above the teacher's 31,884",
    ),
    "budget below the smallest subnet": (
        ["budgets.1.params=10"],
        r"budget s: 10 parameters is below the smallest subnet",
    ),
    "memory in no known unit": (
        ["budgets.1={name: s, memory: 16G@ctx=64}"],
        r"budgets\[1\].memory is '16G@ctx=64'; expected an amount in B, kB, .* such as 16GiB@ctx=131072",
    ),
    "memory at no context": (
        ["budgets.1={name: s, memory: 16GiB}"],
        r"budgets\[1\].memory is '16GiB', without a context; write 16GiB@ctx=131072",
    ),
    "memory above the teacher": (
        ["budgets.1={name: s, memory: 16GiB@ctx=64}"],
        r"budget s: 16 GiB is above the teacher's [\d.]+ KiB; lower it, or give no target",
    ),
    "memory below the smallest subnet": (
        ["budgets.1={name: s, memory: 1KiB@ctx=64}"],
        r"budget s: 1 KiB is below the smallest subnet of these axes, [\d.]+ KiB",
    ),
    "latency without a table": (
        ["budgets.1={name: s, latency: 1ms}"],
        r"budget s is a latency, which needs latency_table: the file that `elastic profile` measures",
    ),
    "latency table that is nowhere": (
        ["budgets.1={name: s, latency: 1ms}", "latency_table=no.json"],
        r"no.json: there is no such file; measure a latency table with `elastic profile`",
    ),
    "latency table that is none": (["latency_table=recipe.yaml"], r"recipe.yaml: is not valid JSON"),
    "budget given twice": (
        ["budgets=[{name: l}, {name: s, params: 18000}, {name: s, params: 17000}]"],
        r"budgets \['l', 's', 's'\] must be at least one, each name once",
    ),
    "budget with a slash": (["budgets.1.name=s/x"], r"budgets\[1\]: budget 's/x' is not a name: a letter or digit"),
    "seed below 0": (["seed=-1"], r"seed=-1 must be at least 0 and below 2\^63"),
    "no path": (["data.sources.0.path="], r"data.sources\[0\].path"),
    "empty path": (["data.sources.0.path=''"], r"data.sources\[0\]: path is empty; name a file"),
    "empty teacher": (["teacher.path=''"], r"teacher: path is empty; name a directory"),
    "empty problems": (["evaluation.problems=''"], r"evaluation: problems is empty; name a file"),
    "override of nothing": (["=3"], r"override '=3' is not key=value"),
    "two targets": (
        ["budgets.1.memory=16GiB@ctx=64"],
        r"budgets\[1\]: budget s has params and memory; give it one target, or none",
    ),
    "stage of an unknown budget": (["stages.0.budgets={xl: 1}"], r"stage stage1: budget 'xl' is not one of l, s"),
    "stage longer than the data": (
        ["stages.0.sequence_length=100000"],
        r"stage stage1: train.safetensors holds \d+ tokens",
    ),
    "calibration longer than the data": (["importance.sequence_length=100000"], r"importance: train.safetensors holds"),
    "evaluation longer than the held-out data": (
        ["evaluation.sequence_length=100000"],
        r"evaluation: heldout.safetensors holds \d+ tokens, too few for a sequence of 100000",
    ),
    "sources that match nothing": (["data.sources.0.path=no-*.jsonl"], r"no-\*.jsonl: no file matches"),
    "no problems file": (["evaluation.problems=no.jsonl"], r"no.jsonl: No such file"),
}


@pytest.mark.parametrize(("overrides", "says"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_refused(overrides: list[str], says: str, refused: Refused, inputs: Path) -> None:
    assert re.search(says, refused("run", inputs / "recipe.yaml", *overrides))


BAD_RECIPES: dict[str, tuple[bytes, str]] = {
    "no YAML": (b"family: a\nstages: [", r"recipe.yaml, line 2: is not YAML"),
    "no mapping": (b"- family\n", r"recipe.yaml: is not a recipe; expected a mapping"),
    "no text": (b"\xff\xfe\x00", r"recipe.yaml: is not text in UTF-8"),
    "empty": (b"", r"recipe.yaml: is not a recipe; expected a mapping"),
    "key given twice": (b"family: a\nseed: 1\nseed: 2\n", r"recipe.yaml, line 3: is not YAML \(seed is given twice\)"),
    "something missing": (b"family: a\n", r"recipe.yaml: teacher is missing; it has no default"),
}


@pytest.mark.parametrize(("content", "says"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_bad_recipe_is_refused(content: bytes, says: str, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert re.search(says, refused("run", tmp_path / "recipe.yaml"))


def test_a_recipe_that_is_nowhere_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory); name a recipe" in refused("run", tmp_path / "no.yaml")


# The data

GOOD_ROW = json.dumps({"text": "the cat sat"}) + "\n"
ROLE = json.dumps({"messages": [{"role": "robot", "content": "beep"}]}) + "\n"

BAD_DATA: dict[str, tuple[str, str]] = {
    "row that is no JSON": (GOOD_ROW + '{"text": "the', r"rows.jsonl line 2 is not JSON"),
    "row that is no object": (GOOD_ROW + "[1]\n", r"rows.jsonl line 2 is not a JSON object"),
    "row without the field": (GOOD_ROW + '{"story": "a"}\n', r"rows.jsonl line 2 has neither 'text' nor 'messages'"),
    "field that is no text": (GOOD_ROW + '{"text": 3}\n', r"rows.jsonl line 2: 'text' holds int, not text"),
    "role that the template refuses": (GOOD_ROW + ROLE, r"rows.jsonl line 2: the chat template refuses it"),
    "empty file": ("", r"rows.jsonl: the file is empty"),
    "rows without content": ('{"text": ""}\n', r"rows.jsonl: the dataset is empty"),
    "too few documents to hold some out": (GOOD_ROW, r"1 documents leave"),
}


@pytest.mark.parametrize(("content", "says"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_refused(content: str, says: str, refused: Refused, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert re.search(says, refused("run", inputs / "recipe.yaml", f"data.sources.0.path={tmp_path / 'rows.jsonl'}"))


def test_a_dataset_that_the_hub_does_not_give_is_refused(
    refused: Refused, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("run", inputs / "recipe.yaml", "data.sources.0.path=hf://org/name")
    assert "data.sources 'hf://org/name' is not here, and the Hub does not give it" in line


BAD_PROBLEMS: dict[str, tuple[str, str]] = {
    "line that is no JSON": ("beep\n", r"problems.jsonl line 1 is not JSON"),
    "line without messages": ('{"text": "a"}\n', r"problems.jsonl line 1 has no 'messages', the last of which is the"),
    "role that the template refuses": (
        ROLE.replace("}]", '}, {"role": "assistant", "content": "3"}]'),
        r"problems.jsonl line 1: the chat template refuses it \(role robot is not",
    ),
}


@pytest.mark.parametrize(("content", "says"), BAD_PROBLEMS.values(), ids=BAD_PROBLEMS)
def test_bad_problems_are_refused_before_anything_is_trained(
    content: str, says: str, refused: Refused, inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "problems.jsonl").write_text(content)
    line = refused("run", inputs / "recipe.yaml", f"evaluation.problems={tmp_path / 'problems.jsonl'}")
    assert re.search(says, line)


@pytest.mark.services
def test_a_loss_that_is_not_finite_ends_the_run_at_the_first_attempt(
    refused: Refused, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def counted(*arguments: Any, **named: Any) -> None:
        attempts.append(arguments)
        train(*arguments, **named)

    monkeypatch.setattr("tasks.distill.run_training", counted)
    diverging = ["stages.0.optimizer.learning_rate=1e30", "stages.0.optimizer.warmup_steps=0"]
    line = refused("run", inputs / "recipe.yaml", *diverging)
    assert re.search(r"stage stage1, step \d: loss nan .*; lower optimizer.learning_rate", line)
    assert len(attempts) == 1


# The machine


@pytest.fixture
def closed_port() -> Iterator[str]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


BAD_MACHINES: dict[str, tuple[dict[str, str], str]] = {
    "wrong secret key": ({"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, r"S3 rejects the key \(SignatureDoesNotMatch\)"),
    "wrong access key": ({"AWS_ACCESS_KEY_ID": "nobody"}, r"S3 rejects the key \(InvalidAccessKeyId\)"),
    "bucket that refuses writes": (
        {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"},
        r"s3://test-.*: S3 answers AccessDenied to PutObject; this key may not do that",
    ),
    "no such bucket": ({BUCKET: "no-such-bucket"}, r"s3://no-such-bucket .*: the bucket does not exist; create it"),
    "no bucket named": ({BUCKET: ""}, r"ELASTIC_BUCKET is not set"),
    "bucket that is a URI": ({BUCKET: "s3://models"}, r"ELASTIC_BUCKET='s3://models' is not a bucket name"),
    "no S3 server": ({ENDPOINT_S3: "http://{closed_port}"}, r"cannot reach S3 .*; check AWS_ENDPOINT_URL_S3"),
    "no MLflow server": (
        {TRACKING_URI: "http://someone:hunter2@{closed_port}"},
        r"MLflow at http://\*\*\*@127.0.0.1:\d+ does not answer; check MLFLOW_TRACKING_URI",
    ),
    "MLflow in files": ({TRACKING_URI: "mlruns"}, r"MLFLOW_TRACKING_URI='mlruns' is not a server or database URI"),
    "state directory below a file": ({HOME: "{file}/home"}, r"the state directory .*/file/home cannot be written"),
}


@pytest.mark.parametrize(("variables", "says"), BAD_MACHINES.values(), ids=BAD_MACHINES)
def test_a_bad_machine_is_refused(
    variables: dict[str, str],
    says: str,
    refused: Refused,
    inputs: Path,
    closed_port: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(closed_port=closed_port, file=tmp_path / "file"))
    line = refused("run", inputs / "recipe.yaml")
    assert re.search(says, line)
    assert "hunter2" not in line


def test_a_prefect_server_that_is_away_is_told(refused: Refused, inputs: Path, closed_port: str) -> None:
    with temporary_settings({PREFECT_API_URL: f"http://{closed_port}/api"}):
        line = refused("run", inputs / "recipe.yaml")
    assert re.search(r"Prefect at http://127.0.0.1:\d+/api does not answer .*; check PREFECT_API_URL", line)


class Figurehead(BaseHTTPRequestHandler):
    """A Prefect server that answers who it is, and can do nothing."""

    def do_GET(self) -> None:
        answers = {"/api/health": True, "/api/admin/version": prefect.__version__}
        self.send_response(200 if self.path in answers else 404)
        self.end_headers()
        self.wfile.write(json.dumps(answers.get(self.path)).encode())

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_prefect_server_that_fails_is_told(refused: Refused, inputs: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Figurehead) as server:
        threading.Thread(target=server.serve_forever).start()
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{server.server_port}/api"}):
            line = refused("run", inputs / "recipe.yaml")
        server.shutdown()
    assert re.search(r"Prefect fails: .*404 Not Found.*; check PREFECT_API_URL, then run this again", line)


# A process of its own


def start(arguments: list[str], home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        env={**os.environ, "PREFECT_HOME": str(home / "prefect"), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def machine(settings: Settings, prefect_api: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The environment of a process that uses the servers of these tests."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    return settings


@pytest.mark.services
def test_a_refusal_is_the_same_line_in_a_process_of_its_own(machine: Settings, inputs: Path) -> None:
    process = start(["run", str(inputs / "recipe.yaml"), "data.sources.0.path=recipe.yaml"], machine.home)
    out, err = process.communicate(timeout=LIMIT_SECONDS)
    assert (process.returncode, out) == (1, "")
    *progress, line = err.splitlines()
    assert line.startswith("elastic: ") and all(PROGRESS.fullmatch(before) for before in progress), err
    assert "recipe.yaml: cannot tell one format by the names (.yaml)" in line


@pytest.mark.services
def test_ctrl_c_ends_the_run_and_its_training_with_one_line(machine: Settings, inputs: Path) -> None:
    process = start(["run", str(inputs / "recipe.yaml"), "stages.0.steps=1000000"], machine.home)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not list(machine.home.glob("workspace/stage1-*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    try:
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (130, ""), err
    *progress, line = err.splitlines()
    assert line == "elastic: interrupted; run the same command again to go on"
    assert all(PROGRESS.fullmatch(before) for before in progress), err
    (work,) = machine.home.glob("workspace/stage1-*")
    with (work / "lock").open("w") as lock:  # the training holds it for as long as it lives
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# The other commands


@pytest.fixture(scope="module")
def family(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An elastic checkpoint made of the teacher, in random order."""
    workspace = tmp_path_factory.mktemp("family")
    reorder.write_order(inputs / "tokenizer", reorder.random_order(MODEL, generator("order")))
    made = reorder_teacher.fn(
        teacher=artifact(inputs / "teacher"),
        ranking=artifact(inputs / "tokenizer"),
        axes=build(Axes, RECIPE["axes"]),
        budgets=tuple(build(Budget, budget) for budget in RECIPE["budgets"]),
        settings=build(Router, RECIPE["router"]),
        lineage={},
        latency_table=None,
        seed=0,
        workspace=str(workspace),
    )
    return Path(made.path)


BAD_COMMANDS: dict[str, tuple[str, str]] = {
    "slice: unknown budget": ("slice {family} --budget xl -o {out}", r"there is no budget 'xl'; known: l, s"),
    "slice: below the smallest": ("slice {family} --params 10 -o {out}", r"10 parameters is below the smallest subnet"),
    "slice: more than all": (
        "slice {family} --params 1e12 -o {out}",
        r"--params 1,000,000,000,000 is above the model's [\d,]+ parameters; lower it",
    ),
    "init: no number of tokens": (
        "init --teacher {teacher} --budget 10k --tokens inf -o {out}",
        r"--tokens inf is not a number of tokens; give one such as 1e9",
    ),
    "slice: no size": ("slice {family} --params inf -o {out}", r"--params inf is not a size"),
    "slice: both": (
        "slice {family} --budget s --params 2e4 -o {out}",
        r"give one of --budget, --params, --active-params, --memory, --l",
    ),
    "slice: two sizes": ("slice {family} --memory 1MB@ctx=9 --params 2e4 -o {out}", r"give one of --budget, --params"),
    "slice: neither": (
        "slice {family} -o {out}",
        r"give one of --budget, --params, --active-params, --memory, --latency",
    ),
    "slice: memory in no known unit": (
        "slice {family} --memory 16G@ctx=8 -o {out}",
        r"memory is '16G@ctx=8'; expected",
    ),
    "slice: memory at no context": ("slice {family} --memory 16GiB -o {out}", r"memory is '16GiB', without a context"),
    "slice: memory below the smallest": (
        "slice {family} --memory 1KiB@ctx=8 -o {out}",
        r"budget memory: 1 KiB is below the smallest subnet of these axes, [\d.]+ KiB",
    ),
    "slice: latency without a unit": (
        "slice {family} --latency 12 -o {out}",
        r"latency is '12'; expected an amount in us",
    ),
    "slice: latency without a table": (
        "slice {family} --latency 12ms -o {out}",
        r"budget latency: a latency needs a latency table; measure one",
    ),
    "slice: latency by no table": (
        "slice {family} --latency 12ms --profile {file} -o {out}",
        r"file: is not valid JSON",
    ),
    "slice: table without a latency": (
        "slice {family} --params 2e4 --profile {file} -o {out}",
        r"--profile is the table that --latency is read from; give both, or neither",
    ),
    "profile: no recipe": ("profile {out} -o {out}.json", r"out: cannot be read .*; name a recipe"),
    "profile: no recipe but a file": ("profile {file} -o {out}", r"file: is not a recipe"),
    "profile: no family": ("profile {teacher} -o {out}", r"elastic.json: there is no such file"),
    "profile: into no directory": ("profile {family} -o {out}/table.json", r"out: there is no such directory; make it"),
    "profile: no context": ("profile {family} -o {out} --context 0", r"context=0 must be greater than 0"),
    "slice: no family": ("slice {teacher} --budget s -o {out}", r"elastic.json: there is no such file"),
    "slice: no directory": ("slice {out} --budget s -o {out}", r"elastic.json: there is no such file"),
    "slice: into a full directory": ("slice {family} --budget s -o {teacher}", r"teacher: exists already; remove it"),
    "slice: below a file": ("slice {family} --budget s -o {file}/out", r"file: File exists; check the path"),
    "pull: unknown model": ("pull nobody -o {out}", r"nobody is not in MLflow: it has no 'nobody'"),
    "pull: unknown version": ("pull nobody:3 -o {out}", r"nobody:3 is not in MLflow: it has no 'nobody'"),
    "pull: malformed name": ("pull models:/a@b@c -o {out}", r"'models:/a@b@c' is not a model; write NAME, NAME@ALIAS"),
    "eval: no checkpoint": ("eval {out} --heldout {file}", r"config.json: there is no such file"),
    "eval: unknown budget": ("eval {family} --heldout {file} --budget xl", r"there is no budget 'xl'; known: l, s"),
    "eval: no held-out file": ("eval {family} --heldout {out}", r"out holds no tokens .*; name heldout.safetensors"),
    "eval: not tokens": ("eval {family} --heldout {file}", r"file holds no tokens .*; name heldout.safetensors"),
    "eval: documents": (
        "eval {family} --heldout {rows}",
        r"rows holds text, not tokens; name heldout.safetensors of a prepared corpus, which `elastic run` leaves",
    ),
    "eval: other tensors": (
        "eval {family} --heldout {family}/router.safetensors",
        r"router.safetensors holds no tokens",
    ),
    "eval: tokens of another vocabulary": ("eval {family} --heldout {foreign}", r"holds token 280, but .* is 280; use"),
    "eval: no tokens asked for": (
        "eval {family} --heldout {file} --tokens 0",
        r"heldout_tokens=0 must be greater than 0",
    ),
    "generate: no checkpoint": ("generate {out} hello", r"config.json: there is no such file"),
    "generate: a budget of a size that was cut": (
        "generate {teacher} hello --budget s",
        r"elastic.json: there is no such file: only an elastic checkpoint, which has it, holds budgets",
    ),
    "generate: unknown budget to go on with": ("generate {family} hello --then xl", r"there is no budget 'xl'"),
}


@pytest.mark.parametrize(("command", "says"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_command_that_cannot_be_done_is_refused(
    command: str, says: str, refused: Refused, inputs: Path, family: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "rows").write_text('{"text": "hello"}\n')
    save_file({"tokens": torch.full((1000,), MODEL.vocab_size, dtype=torch.int32)}, tmp_path / "foreign")
    beside = {name: tmp_path / name for name in ("out", "file", "foreign", "rows")}
    line = refused(*command.format(family=family, teacher=inputs / "teacher", **beside).split())
    assert re.search(says, line)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


BAD_USAGE: dict[str, tuple[str, str]] = {
    "no such command": ("fly", r"No such command 'fly'; --help tells more"),
    "no recipe": ("run", r"Missing argument 'recipe'; --help tells more"),
    "no such option": ("pull a --into b", r"No such option: --into"),
    "no temperature": ("generate a hello --temperature -1", r"Invalid value for '--temperature'"),
    "no number": ("slice a -o b --params many", r"Invalid value for '--params'"),
    "no dtype": ("profile a -o b --dtype int8", r"Invalid value for '--dtype'"),
}


@pytest.mark.parametrize(("command", "says"), BAD_USAGE.values(), ids=BAD_USAGE)
def test_a_command_that_is_not_understood_is_refused(command: str, says: str, refused: Refused) -> None:
    assert re.search(says, refused(*command.split(), code=2))
