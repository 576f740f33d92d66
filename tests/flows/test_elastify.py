"""The pipeline as a user has it: real processes, a real object store, a real registry, stock clients."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from micro import LIMIT_SECONDS, Command, Run, completed
from mlflow import MlflowClient
from progress import steps_in
from safetensors.torch import load_file
from transformers import AutoTokenizer, NemotronHForCausalLM

from elastic_core.files.checkpoint import read_family
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.subnet import Subnet
from elastic_core.training.job import load_model
from flows.serving.services import embedded_services
from tasks import tracking
from tasks.artifacts import open_store, read_manifest
from tasks.reporting.scores import differ_in_scores_alone
from tasks.running.code import project_version
from tasks.settings import Settings

pytestmark = pytest.mark.services

FLOAT32_AGAINST_STOCK = 1e-5


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def assert_is_slice_with_scores(published: Path, cut: Path) -> None:
    """What is published is what was cut, and its card has scores."""
    there, here = files(published), files(cut)
    card, unscored = there.pop("README.md").decode(), here.pop("README.md").decode()
    assert there == here
    assert differ_in_scores_alone(card, unscored) and "| teacher |" in card


def cached(done: Run, titles: str) -> list[bool]:
    """Whether each step with such a title was cached, in order."""
    return [was for title, was in steps_in(done.stderr) if re.fullmatch(titles, title)]


def test_a_run_ends_with_the_table_the_registry_names_and_where_to_look(finished, command):
    for text in ("micro-l:1", "micro-m:1", "micro-s:1", "s3://", "index.html", "elastic pull"):
        assert text in finished.stdout
    for budget in read_family(finished.family).budgets:
        slice_directory = finished.directory(f"slice-{budget.name}")
        elements = sum(t.numel() for path in slice_directory.glob("*.safetensors") for t in load_file(path).values())
        assert elements == budget.params
        assert f"{elements:,}" in finished.stdout


def test_the_version_of_the_code_is_in_elastic_json_the_registry_mlflow_and_the_report(finished, command):
    version = project_version()
    assert read_family(finished.family).lineage["code"] == version
    report = finished.directory("report") / "results.json"
    assert json.loads(report.read_text())["links"]["code"] == version
    with embedded_services(command.home):
        settings = Settings.from_environment()
        registered = tracking.resolve(settings.registry, "micro-s:1")
        store = open_store(settings)
        manifest = read_manifest(store, registered.tags[tracking.MANIFEST])
        run = MlflowClient(tracking_uri=settings.tracking_uri).get_run(registered.run_id)
    assert registered.tags["elastic.code"] == run.data.tags["elastic.code"] == version
    assert manifest.metadata["lineage"]["code"] == version


def assert_stock_logits(elastic_directory: Path, subnet: Subnet, slice_directory: Path) -> None:
    elastic = load_model(elastic_directory, torch.device("cpu"), torch.float32)
    stock, info = NemotronHForCausalLM.from_pretrained(slice_directory, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(slice_directory)("the cat sat on the red mat", return_tensors="pt").input_ids
    with torch.no_grad():
        ours, theirs = elastic.logits(elastic(ids, subnet)), stock.eval()(ids).logits
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < FLOAT32_AGAINST_STOCK


@pytest.mark.parametrize("budget", ["l", "m", "s"])
def test_a_slice_in_stock_transformers_gives_the_elastic_models_logits(budget, finished):
    subnet = read_family(finished.family).budget(budget).subnet
    assert_stock_logits(finished.family, subnet, finished.directory(f"slice-{budget}"))


def test_any_size_between_two_budgets_is_a_slice_within_it(finished, command, tmp_path):
    family = read_family(finished.family)
    target = (family.budget("m").params + family.budget("s").params) // 2
    done = command("slice", str(finished.family), "--params", str(target), "-o", str(tmp_path / "between"))
    assert done.returncode == 0, done.stderr
    elements = sum(tensor.numel() for tensor in load_file(tmp_path / "between/model.safetensors").values())
    assert family.budget("s").params <= elements <= target
    assert f"{elements:,} parameters" in done.stdout


def test_elastic_pull_and_a_plain_mlflow_client_give_the_same_slice(finished, command, tmp_path):
    pulled = command("pull", "micro-s", "-o", str(tmp_path / "pulled"))
    assert pulled.returncode == 0, pulled.stderr
    with embedded_services(command.home):
        plain = [
            sys.executable,
            "-c",
            "import mlflow, sys; mlflow.artifacts.download_artifacts('models:/micro-s@champion', dst_path=sys.argv[1])",
            str(tmp_path / "plain"),
        ]
        subprocess.run(plain, check=True, timeout=LIMIT_SECONDS)
    assert files(tmp_path / "pulled") == files(tmp_path / "plain")
    assert_is_slice_with_scores(tmp_path / "pulled", finished.directory("slice-s"))


def test_the_elastic_checkpoint_of_a_registered_size_is_pulled_and_holds_the_others(finished, command, tmp_path):
    pulled = command("pull", "micro-s", "--elastic", "-o", str(tmp_path / "whole"))
    assert pulled.returncode == 0, pulled.stderr
    assert "the elastic checkpoint of micro-s version 1" in pulled.stdout
    assert_is_slice_with_scores(tmp_path / "whole", finished.family)


def test_running_again_takes_every_step_from_its_cache_and_asks_for_promotion_anew(finished, command):
    again = completed(command)
    assert [title for title, was in steps_in(again.stderr) if not was] == ["promote"], again.stderr
    assert cached(again, "distil stage.") == [True, True], again.stderr


@pytest.mark.slow
def test_what_was_deleted_from_the_registry_is_registered_anew(finished, command):
    with embedded_services(command.home):
        uri = Settings.from_environment().tracking_uri
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        for budget in "lms":
            client.delete_registered_model(f"micro-{budget}")
    again = completed(command)
    assert cached(again, "evaluate|register") == [True, False] and "micro-s:1" in again.stdout
    with embedded_services(command.home):
        assert {tracking.resolve(uri, f"micro-{budget}").version for budget in "lms"} == {1}


@pytest.mark.slow
def test_an_evaluation_of_another_length_registers_anew_measures_the_champions_anew_and_sends_no_object(
    finished, command
):
    """The files that are published stay as they are, and more registered versions point to them."""

    def published() -> tuple[set[str], dict[str, tracking.ModelVersion]]:
        with embedded_services(command.home):
            settings = Settings.from_environment()
            store = open_store(settings)
            listed = store.client.list_objects_v2(Bucket=store.bucket, Prefix="families/")["Contents"]
            entries = {b: tracking.by_alias(settings.registry, f"micro-{b}", tracking.CANDIDATE) for b in "lms"}
            return {entry["Key"] for entry in listed}, entries

    objects, before = published()
    again = completed(command, "evaluation.sequence_length=16")
    assert cached(again, "distil stage.") == [True] * 2 and cached(again, "slice .") == [True] * 3
    assert cached(again, "held-out loss of (pretrain|slice-.)") == [False] * 4 and cached(again, "register") == [False]
    assert cached(again, "answers of .+") == [True] * 4, "they depend on no length of text"
    assert cached(again, "held-out loss of champion .") == [False] * 3 and "no budget is worse" in again.stdout
    now, after = published()
    assert now == objects
    for budget, entry in after.items():
        assert entry.version == before[budget].version + 1
        assert (entry.source, entry.tags["elastic.version"]) == (
            before[budget].source,
            before[budget].tags["elastic.version"],
        )
        assert entry.metrics["cross_entropy"] != before[budget].metrics["cross_entropy"]
        assert entry.tags["elastic.measured_sha256"] != before[budget].tags["elastic.measured_sha256"]


@pytest.mark.slow
def test_a_benchmark_is_judged_once_for_each_model_and_anew_where_it_is_asked_otherwise(finished, command):
    def judged(temperature: float) -> Run:
        drawn = f"{{temperature: {temperature}, max_new_tokens: 3, system: null, thinking: false}}"
        asked = f"{{name: sums, path: questions.jsonl, format: exact, runs: 2, sampling: {drawn}}}"
        return completed(command, f"evaluation.benchmarks=[{asked}]")

    first = judged(0.5)
    assert cached(first, "bring sums") == [False] and cached(first, "judge .+ on sums") == [False] * 4
    assert cached(first, "distil stage.|evaluate") == [True] * 3
    assert "pass@1, percent" in first.stdout
    samples = sorted((command.home / "samples").glob("sums-*.jsonl"))
    assert [len(file.read_text().splitlines()) for file in samples] == [20] * 4
    other = judged(0.25)
    assert cached(other, "bring sums") == [True] and cached(other, "judge .+ on sums") == [False] * 4
    assert cached(judged(0.5), "bring sums|judge .+ on sums") == [True] * 5
    with embedded_services(command.home):
        entry = tracking.by_alias(Settings.from_environment().registry, "micro-s", tracking.CANDIDATE)
    assert 0 <= entry.metrics["sums.accuracy"] <= 1 and entry.tags[f"{tracking.JUDGED}sums"]


@pytest.mark.slow
def test_changing_a_stage_runs_again_from_that_stage_on(finished, command):
    done = completed(command, "stages.1.steps=6")
    assert cached(done, "distil stage.") == [True, False]
    before = ("train tokenizer", "prepare data", "pretrain teacher", "rotate teacher", "rank importance")
    for title in (*before, "reorder teacher", "compare orders"):
        assert cached(done, title) == [True], title
    for titles in ("held-out loss of (pretrain|slice-.)", "answers of .+"):
        assert cached(done, titles) == [True, False, False, False], f"{titles}: the teacher's own first"
    for titles in ("slice .", "speed of .+", "register"):
        assert cached(done, titles) and not any(cached(done, titles)), titles


@pytest.mark.slow
def test_a_family_with_ffn_per_layer_is_padded_for_stock_transformers(finished, command):
    run = completed(command, "axes.per_layer=[ffn]")
    family = read_family(run.family)
    # The router of so short a run may well choose one width for all: ask for a subnet that differs by layer.
    subnet = replace(family.budget("m").subnet, ffn=(32, 48))
    slice_checkpoint(run.family, subnet, run.family.parent / "uneven")
    assert_stock_logits(run.family, subnet, run.family.parent / "uneven")
    assert_stock_logits(run.family, family.budget("s").subnet, run.directory("slice-s"))


@pytest.mark.slow
def test_a_family_in_nested_storage_is_pulled_to_the_same_files_and_says_how(finished, command, tmp_path):
    completed(command, "storage=nested")
    for budget in ("s", "m", "l"):  # each over the one before
        done = command("pull", f"micro-{budget}@candidate", "-o", str(tmp_path / "pulled"))
        assert done.returncode == 0, done.stderr
        assert_is_slice_with_scores(tmp_path / "pulled", finished.directory(f"slice-{budget}"))
    with embedded_services(command.home):
        settings = Settings.from_environment()
        for budget in ("s", "m", "l"):
            entry = tracking.by_alias(settings.tracking_uri, f"micro-{budget}", tracking.CANDIDATE)
            assert entry.tags["elastic.storage"] == "nested"
            assert entry.tags["elastic.pull"] in entry.description
            assert ("any MLflow client" in entry.description) == (budget == "s")
    assert not list((command.home / "workspace").glob(".*.partial"))


def test_gc_lists_what_an_interrupted_run_left_and_removes_it_only_when_told(finished, command):
    left = command.home / "workspace" / ".slice-x.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(2048))
    with embedded_services(command.home):
        store = open_store(Settings.from_environment())
        store.client.put_object(Bucket=store.bucket, Key="families/micro/begun/s/x", Body=b"half")
        before = {entry["Key"] for entry in store.client.list_objects_v2(Bucket=store.bucket)["Contents"]}
    for arguments in (["gc"], ["gc", "--older-than", "0"]):
        listed = command(*arguments)
        assert listed.returncode == 0, listed.stderr
        assert ("families/micro/begun/" in listed.stdout) == ("2 KiB" in listed.stdout) == (len(arguments) > 1)
    assert left.exists() and "nothing was removed" in listed.stdout
    removed = command("gc", "--older-than", "0", "--delete")
    assert removed.returncode == 0, removed.stderr
    assert not left.exists()
    with embedded_services(command.home):
        store = open_store(Settings.from_environment())
        after = {entry["Key"] for entry in store.client.list_objects_v2(Bucket=store.bucket)["Contents"]}
    assert after == before - {"families/micro/begun/s/x"}


@pytest.mark.slow
def test_gc_frees_what_is_superseded_and_leaves_all_that_the_next_run_takes_from_its_cache(finished, command):
    def aliased(alias: str) -> dict[str, int]:
        entries = (tracking.by_alias(uri, f"micro-{budget}", alias) for budget in "lms")
        return {entry.name: entry.version for entry in entries}

    with embedded_services(command.home):
        uri = Settings.from_environment().registry
        before = {alias: aliased(alias) for alias in (tracking.CANDIDATE, tracking.CHAMPION)}
    other = completed(command, "stages.1.steps=7")
    gone = [other.directory("stage2"), other.directory("slice-s")]
    with embedded_services(command.home):
        for alias, versions in before.items():
            tracking.set_alias(uri, alias, versions)
    completed(command)
    removed = command("gc", "--older-than", "0", "--delete", "--yes")
    assert removed.returncode == 0, removed.stderr
    assert not any(directory.exists() for directory in gone)
    assert all(path.exists() for path in finished.directories if not path.name.startswith("curves-"))
    assert [title for title, was in steps_in(completed(command).stderr) if not was] == ["promote"]


def kill_inside(command: Command, stage: str, after_step: int) -> None:
    """Start the run, and kill -9 it and its training once the stage has passed a step."""
    process = command.start("run", str(command.recipe))
    deadline = time.monotonic() + LIMIT_SECONDS
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
    process.communicate(timeout=LIMIT_SECONDS)


def children(home: Path, program: str) -> list[int]:
    """Processes of a program that work for this state directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                line += os.readlink(entry / "cwd")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if program in line and str(home) in line:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_a_run_killed_in_both_stages_and_then_its_trainer_alone_ends_in_the_same_weights(finished, command, tmp_path):
    killed = Command(recipe=command.recipe, home=tmp_path / "home")
    for stage in ("stage1", "stage2"):
        kill_inside(killed, stage, after_step=5)
        deadline = time.monotonic() + 30
        while children(killed.home, "") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not children(killed.home, ""), "a killed run left processes behind"
        assert not list((killed.home / "workspace").glob(f"{stage}-*/family")), f"{stage} was over before it was killed"
    last = killed.start("run", str(killed.recipe))
    os.kill(wait_for_trainer(killed.home), signal.SIGKILL)
    _, stderr = last.communicate(timeout=LIMIT_SECONDS)
    assert last.returncode == 0, stderr
    (killed_family,) = (killed.home / "workspace").glob("stage2-*/family")
    assert files(killed_family) == files(finished.family)


def wait_for_trainer(home: Path) -> int:
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        if found := children(home, "elastic_core.training.job"):
            return max(found)
        time.sleep(0.05)
    raise AssertionError("no training process appeared")
