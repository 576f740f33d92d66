"""`elastic plan` says what the issue asks of it, from the recipe alone: no network, no weights."""

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import write_micro
from nano import NANO_12B
from typer.testing import CliRunner

from elastic_core.files.stock_config import write_config
from elastic_core.schema import to_dict
from flows.cli import app
from flows.commands.recipes import load_recipe

RECIPES = Path(__file__).parents[3] / "flows/recipes"
NANO, SMALL = str(RECIPES / "nano-12b.yaml"), str(RECIPES / "small.yaml")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a plan asks nobody")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def planned(*arguments: str) -> dict[str, Any]:
    data = json.loads(printed(*arguments, "--json"))
    assert isinstance(data, dict)
    return data


def refused(*arguments: str) -> str:
    with pytest.raises(ValueError) as raised:
        CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def row(text: str, *cells: str) -> str:
    """The line of a table that begins with these cells."""
    (found,) = [
        line for line in text.splitlines() if re.match("│ " + r" +│ +".join(map(re.escape, cells)) + r" +│", line)
    ]
    return found


def test_the_papers_recipe_is_planned_with_the_papers_numbers() -> None:
    text = printed(NANO)
    assert row(text, "12b", "full", "12,310,001,152")
    assert row(text, "12b", "62", "5120", "20480", "128 x 80", "40")  # layers, hidden, FFN, Mamba-2, attention
    assert "5,166" in row(text, "stage1", "5,166")
    assert "1,788" in row(text, "stage2", "1,788")
    for stage in ("stage1", "stage2"):
        assert row(text, stage, "1").endswith(" no │")
        assert row(text, stage, "64").endswith(" yes │")
    assert "It fits on 8 and 64 GPUs." in text
    assert "stage2 on 1 GPU: " in text


def test_the_papers_recipe_fits_on_one_node_by_offloading() -> None:
    text = printed(NANO, "stages.1.offload=false", "--gpus", "8")
    assert "It fits with offload: true" in text
    (mesh,) = planned(NANO, "--gpus", "8")["stages"][1]["meshes"]
    assert mesh["fits"] and mesh["memory"]["total"] < 75e9
    assert "stage2 keeps 33.3 GB for each GPU in pinned host memory" in printed(NANO, "--gpus", "8")


def test_the_papers_smaller_budgets_are_met() -> None:
    budgets = {budget["budget"]["name"]: budget for budget in planned(NANO)["budgets"]}
    for name, target in (("9b", 8_900_000_000), ("6b", 6_200_000_000)):
        assert budgets[name]["feasible"]
        assert 0.98 * target <= budgets[name]["params"] <= target


def test_a_recipe_of_experts_is_planned_with_all_parameters_and_the_active_ones() -> None:
    path = str(RECIPES / "nano3-30b.yaml")
    data = planned(path, "--gpus", "8,64")
    assert (data["teacher_params"], data["teacher_active_params"]) == (31_577_940_288, 3_580_076_352)
    assert data["feasible"] and data["fits_on"] == [64]
    sizes = {b["budget"]["name"]: (b["params"] / 1e9, b["active_params"] / 1e9) for b in data["budgets"]}
    assert sizes["23b"] == pytest.approx((23.1, 2.8), rel=0.01)
    assert sizes["12b"] == pytest.approx((12.3, 2.0), rel=0.02)
    assert sum(stage["tokens"] for stage in data["stages"]) == pytest.approx(160e9, rel=1e-3)
    shown = printed(path, "--gpus", "8")
    assert "31,577,940,288 parameters, 3,580,076,352 of them active" in " ".join(shown.split())
    assert "23,103,289,152" in shown and "2,783,000,384" in shown, "no number is broken over lines"
    assert "evaluation: 130 GB are needed" in shown and "it needs a GPU with more memory" in shown


def test_the_small_recipe_fits_one_gpu_for_about_an_hour_and_recomputation_halves_its_memory() -> None:
    assert "It fits on 1 GPU." in printed(SMALL, "--gpus", "1")
    plan = planned(SMALL, "--gpus", "1")
    assert [stage["stage"]["name"] for stage in plan["stages"]] == ["pretrain", "stage1", "stage2"]
    assert plan["stages"][2]["stage"]["sequence_length"] == 49152
    assert 50 / 60 < sum(mesh["hours"] for stage in plan["stages"] for mesh in stage["meshes"]) < 70 / 60
    without = planned(SMALL, "stages.1.recompute=false", "--gpus", "1")
    needed, more = (p["stages"][2]["meshes"][0]["memory"]["total"] for p in (plan, without))
    assert 2 * needed < more


def test_the_small_recipe_has_data_for_what_it_reads_and_shapes_that_the_kernels_take() -> None:
    recipe = load_recipe(Path(SMALL))
    pretraining = recipe.teacher.pretrain
    assert pretraining is not None
    read = [pretraining.stage(), *recipe.stages]
    there = sum(source.max_tokens or 0 for source in recipe.data.sources)
    assert max(stage.tokens for stage in read) < 1.1 * (1 - recipe.data.heldout_fraction) * there
    model = pretraining.model
    assert (model.mamba_head_dim, model.head_dim, model.ssm_state_size, model.chunk_size) == (64, 64, 128, 128)
    assert all(heads % 8 == 0 for heads in recipe.axes.mamba_heads)


def test_every_step_of_the_pipeline_is_planned() -> None:
    text, plan = printed(NANO, "--gpus", "64"), planned(NANO, "--gpus", "64")
    names = [step["name"] for step in plan["steps"]]
    assert names[:7] == ["teacher", "data", "rotation", "ranking", "reorder", "shapes", "orders"]
    assert names[-3:] == ["slices", "evaluation", "publish"]
    for name in set(names) - {"stage1", "stage2"}:  # which other tables have too
        assert row(text, name)
    spent = sum(step["dollars"] for step in plan["steps"])
    assert row(text, "64").endswith(f" ${spent:,.0f} │  yes │")
    assert plan["most_disk"] > plan["disk"] > sum(step["disk"] for step in plan["steps"][:2])
    assert plan["stages"][0]["meshes"][0]["between_hosts"] > 0


def test_what_benchmarks_take_at_most_is_planned(tmp_path: Path) -> None:
    """problems x runs x tokens for each model, by files that lie here or by what a built-in benchmark has."""
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(7)))
    own = f"{{name: sums, path: {file}, format: exact, runs: 3, sampling: {{max_new_tokens: 100}}}}"
    far = "{name: far, path: 's3://bucket/far', format: exact}"
    asked = (f"evaluation.benchmarks=[{{name: math-500}}, {own}, {far}]", "references=[{name: other, path: there}]")
    text, plan = printed(NANO, *asked), planned(NANO, *asked)
    math, sums, unknown = plan["benchmarks"]
    models = 1 + len(plan["budgets"]) + 1
    assert math["tokens"] == 500 * 8 * 32_768 * models
    assert sums["tokens"] == 7 * 3 * 100 * models
    assert unknown["tokens"] is None and unknown["gpu_hours"] == 0
    read = 2 * (2 * plan["teacher_params"] + sum(budget["params"] for budget in plan["budgets"]))  # bytes, in bfloat16
    assert math["gpu_hours"] == pytest.approx(500 * 8 * 32_768 / 32 * read / 3.35e12 / 3600)
    assert row(text, "math-500") and row(text, "sums") and "How many problems far has is not known" in text
    assert [step["dollars"] for step in plan["steps"]] == [step["dollars"] for step in planned(NANO)["steps"]]
    endpoint = "evaluation.endpoint={url: 'http://a:1/v1', model: '{path}'}"
    assert planned(NANO, *asked, endpoint)["benchmarks"][0]["gpu_hours"] == 0
    assert "none of them on GPUs of this run" in printed(NANO, *asked, endpoint)
    assert "Benchmarks are in no other table" not in printed(NANO)


def test_a_step_that_is_too_large_for_a_gpu_is_named() -> None:
    text = printed(NANO, "--gpus", "64", "evaluation.batch_size=64")
    assert "evaluation: " in text and "are needed on one GPU and 75.2 GB are there" in text


def test_little_to_spare_is_told() -> None:
    (mesh,) = planned(NANO, "--gpus", "64")["stages"][1]["meshes"]
    memory = f"{round(mesh['memory']['total'] / 0.94 / 0.99)}B"
    text = printed(NANO, "--gpus", "64", "--gpu-memory", memory)
    assert "stage2 on 64 GPUs fits with 1.0 % to spare" in text
    assert "fits with" not in printed(NANO, "--gpus", "64", "--gpu-memory", "141GB")


def test_json_holds_what_the_tables_show() -> None:
    alone = ("stages.1.offload=false", "--gpus", "8")
    text, plan = printed(NANO, *alone), planned(NANO, *alone)
    for stage in plan["stages"]:
        (mesh,) = stage["meshes"]
        parts = {name: size for name, size in mesh["memory"].items() if name != "total"}
        assert mesh["memory"]["total"] == sum(parts.values())
        assert f" {mesh['memory']['total'] / 1e9:.1f} │" in row(text, stage["stage"]["name"], "8")
        assert stage["flops"]["total"] == sum(size for name, size in stage["flops"].items() if name != "total")
    assert plan["feasible"]
    assert plan["fits_on"] == []


def test_the_options_are_the_machine_that_is_planned_for() -> None:
    plain, other = planned(NANO), planned(NANO, "--tflops", "1978", "--mfu", "0.2", "--price", "5", "--gpus", "1,8,64")
    for ours, theirs in zip(plain["stages"], other["stages"], strict=True):
        for mesh, twin in zip(ours["meshes"], theirs["meshes"], strict=True):
            assert mesh["gpu_hours"] == pytest.approx(twin["gpu_hours"])
            assert 2 * mesh["dollars"] == pytest.approx(twin["dollars"])
    kept = ("stages.1.offload=false", "--gpus", "8")
    assert planned(NANO, *kept)["fits_on"] == []
    assert planned(NANO, *kept, "--gpu-memory", "141GB")["fits_on"] == [8]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_plan_of_a_budget_that_cannot_be_met_fails_with_the_line_of_elastic_check(form: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", NANO, "budgets.2.params=4500000000", *form])
    said = "6b cannot be met by these axes; `elastic plan` says which choices would make room"
    assert (result.exit_code, str(result.exception)) == (1, said)
    assert result.output, "the plan is shown first"


def test_a_budget_that_cannot_be_met_is_named_with_what_would_help() -> None:
    text = CliRunner().invoke(app, ["plan", NANO, "budgets.2.params=4500000000"]).output
    (line,) = [line for line in text.splitlines() if line.startswith("budget 6b cannot be met")]
    assert "5,089,115,392 parameters, 589,115,392 parameters above it" in line
    assert "in axes.hidden" in line
    assert "It does not run as it stands" in text


def test_memory_budgets_are_shown_in_bytes() -> None:
    text = printed(NANO, "budgets.2={name: 6b, memory: '14GiB@ctx=32768'}")
    assert row(text, "6b", "14 GiB")


def test_a_local_teacher_is_read_from_its_config(tmp_path: Path) -> None:
    recipe = load_recipe(write_micro(tmp_path))
    assert recipe.teacher.pretrain is not None
    (tmp_path / "teacher").mkdir()
    write_config(recipe.teacher.pretrain.model, tmp_path / "teacher", torch.float32)
    named, trained = ("teacher={path: teacher}", "family=micro")
    assert (
        planned(str(tmp_path / "micro.yaml"), named)["teacher_params"]
        == planned(str(tmp_path / "micro.yaml"), trained)["teacher_params"]
    )


@pytest.mark.parametrize("path", ["org/model", "org/model@v1", "hf://org/model", "s3://bucket/model"])
def test_a_teacher_of_unknown_geometry_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(NANO, f"teacher={{path: '{path}'}}")
    assert f"'{path}'" in line and "put the geometry of its config.json under teacher.model" in line


def test_a_geometry_beside_a_trained_teacher_is_refused() -> None:
    model = json.dumps(to_dict(NANO_12B))
    assert "a teacher that is trained has pretrain.model" in refused(SMALL, f"teacher.model={model}")


def test_a_budget_above_the_teacher_is_refused_as_it_is_by_a_run() -> None:
    assert "is above the teacher's 12,310,001,152" in refused(NANO, "budgets.1.params=13000000000")


def test_a_stage_that_waits_for_the_network_is_told_with_the_micro_batch_that_ends_it() -> None:
    experts = str(RECIPES / "nano3-30b.yaml")
    told = "stage1 on 64 GPUs waits for what they send one another"
    assert told not in printed(experts, "--gpus", "64")
    sparse = printed(experts, "--gpus", "64", "stages.0.micro_batch_size=1")
    (line,) = [line for line in sparse.splitlines() if line.startswith(told)]
    assert "micro_batch_size: 2 ends that" in line
    slow = {"a faster network does": ["--network", "1GB"], "faster links between GPUs do": ["--link", "1GB"]}
    for remedy, options in slow.items():
        assert f"No larger micro-batch that fits ends that; {remedy}" in printed(experts, "--gpus", "64", *options)
    assert "of tokens if every expert lay whole on one GPU" in sparse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8,none"], "--gpus is '8,none'; expected numbers of GPUs, such as 1,8,64"),
        (["--gpus", "0"], "--gpus is '0'"),
        (["--gpu-memory", "80"], "--gpu-memory is '80'; expected an amount in B, kB"),
        (["--gpu-memory", "80GB@ctx=1"], "expected an amount alone, such as 80GB"),
        (["--gpu-memory", "0GB"], "memory=0 must be greater than 0"),
        (["--mfu", "40"], "mfu=40.0 must be above 0 and at most 1"),
        (["--tflops", "0"], "must be greater than 0"),
        (["--price", "-1"], "dollars_per_hour=-1.0 must be at least 0"),
        (["--core-price", "-1"], "dollars_per_core_hour=-1.0 must be at least 0"),
        (["--on-a-host", "0"], "on_a_host=0 must be greater than 0"),
        (["--network", "0GB"], "network=0 must be greater than 0"),
    ],
)
def test_an_option_that_means_nothing_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    assert message in refused(NANO, *arguments)
