"""The pipeline as a user has it: real processes, a real object store, a real registry, stock clients."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, NemotronHForCausalLM

from elastic_core.checkpoint import read_family
from elastic_core.job import load_model
from flows.services import embedded_services

pytestmark = pytest.mark.slow

FLOAT32_AGAINST_STOCK = 1e-5


def family_directory(command) -> Path:
    return command.step_directory("stage2") / "family"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def cached(done: subprocess.CompletedProcess[str]) -> dict[str, list[bool]]:
    steps: dict[str, list[bool]] = {}
    for name, how in re.findall(r"^(\w+) +(cached|[\d.]+ s)$", done.stderr, flags=re.MULTILINE):
        steps.setdefault(name, []).append(how == "cached")
    return steps


def test_a_run_ends_with_the_table_the_registry_names_and_where_to_look(finished, command):
    for text in ("micro-l:1", "micro-m:1", "micro-s:1", "s3://", "index.html", "elastic pull"):
        assert text in finished.stdout
    for budget in read_family(family_directory(command)).budgets:
        slice_directory = command.step_directory(f"slice-{budget.name}")
        elements = sum(t.numel() for path in slice_directory.glob("*.safetensors") for t in load_file(path).values())
        assert elements == budget.params
        assert f"{elements:,}" in finished.stdout


@pytest.mark.parametrize("budget", ["l", "m", "s"])
def test_a_slice_in_stock_transformers_gives_the_elastic_models_logits(budget, finished, command):
    directory = command.step_directory(f"slice-{budget}")
    elastic = load_model(family_directory(command), torch.device("cpu"), torch.float32)
    subnet = read_family(family_directory(command)).budget(budget).subnet
    stock, info = NemotronHForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(directory)("the cat sat on the red mat", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = elastic.logits(elastic(ids, subnet)), stock.eval()(ids).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < FLOAT32_AGAINST_STOCK


def test_elastic_pull_and_a_plain_mlflow_client_give_the_same_slice(finished, command, tmp_path):
    pulled = command("pull", "micro-s", "-o", str(tmp_path / "pulled"))
    assert pulled.returncode == 0, pulled.stderr
    environment = command.environment()
    with embedded_services(command.home, environment):
        plain = [
            sys.executable,
            "-c",
            "import mlflow, sys; mlflow.artifacts.download_artifacts('models:/micro-s@champion', dst_path=sys.argv[1])",
            str(tmp_path / "plain"),
        ]
        subprocess.run(plain, env=environment, check=True, timeout=120)
    expected = files(command.step_directory("slice-s"))
    assert files(tmp_path / "pulled") == files(tmp_path / "plain") == expected


def test_running_again_takes_every_step_from_its_cache(finished, command):
    again = command.run()
    assert again.returncode == 0, again.stderr
    assert cached(again) and all(all(steps) for steps in cached(again).values()), again.stderr


def test_changing_a_stage_runs_again_from_that_stage_on(finished, command):
    changed = command.run("stages.1.steps=6")
    assert changed.returncode == 0, changed.stderr
    steps = cached(changed)
    assert steps["distill"] == [True, False]
    for name in ("train_tokenizer", "prepare_data", "pretrain_teacher", "rank_importance", "reorder_teacher"):
        assert steps[name] == [True], name
    for name in ("slice_budget", "evaluate", "register"):
        assert not any(steps[name]), name


def kill_inside(command, stage: str, after_step: int) -> None:
    """Start the run, and kill -9 it and its training once the stage has passed a step."""
    process = command.start("run", str(command.recipe))
    deadline = time.monotonic() + 240
    pattern = f"{stage}-*/metrics.jsonl"
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        found = list((command.home / "workspace").glob(pattern))
        if found and found[0].read_text().count("\n") >= after_step:
            break
        time.sleep(0.005)
    else:
        raise AssertionError(f"{stage} never reached step {after_step}")
    process.send_signal(signal.SIGKILL)
    process.communicate()


def trainers(home: Path) -> list[int]:
    """Processes that train for this state directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "elastic_core.job" in line and str(home) in line:
                found.append(int(entry.name))
    return found


def test_a_run_killed_in_both_stages_and_then_its_trainer_alone_ends_in_the_same_weights(finished, command, tmp_path):
    killed = type(command)(recipe=command.recipe, home=tmp_path / "home")
    for stage in ("stage1", "stage2"):
        kill_inside(killed, stage, after_step=5)
        deadline = time.monotonic() + 30
        while trainers(killed.home) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not trainers(killed.home), "a killed run left its trainer behind"
        assert not (killed.step_directory(stage) / "family").exists(), f"{stage} was over before it was killed"
    last = killed.start("run", str(killed.recipe))
    os.kill(wait_for_trainer(killed.home), signal.SIGKILL)
    _, stderr = last.communicate(timeout=300)
    assert last.returncode == 0, stderr
    assert files(family_directory(killed)) == files(family_directory(command))


def wait_for_trainer(home: Path) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if found := trainers(home):
            return max(found)
        time.sleep(0.05)
    raise AssertionError("no training process appeared")
