"""Laws of `elastic init`: any teacher gets a valid recipe that holds its budgets and trains on the tokens asked for."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from geometries import MODELS
from latency import random_table
from nano import NANO_12B
from typer.testing import CliRunner

from elastic_core.budget import Budget
from elastic_core.cost import LatencyCost, subnet_params
from elastic_core.files.stock_config import write_config
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.planning.draft import ROOM, draft_axes, draft_stages
from elastic_core.planning.profile import write_table
from elastic_core.schema import build
from elastic_core.subnet import full_subnet, smallest_subnet
from flows.cli import app
from flows.commands import teacher
from flows.commands.init import parse_budgets
from flows.commands.recipes import load_recipe
from flows.commands.reference import recipe_schema
from tasks.artifacts import Store, put_file

SMALL = ModelConfig(
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
    vocab_size=1024,
    max_position_embeddings=1024,
)


def written(
    directory: Path, model: ModelConfig, *arguments: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Path, str]:
    """The recipe that `elastic init` writes for a checkpoint of which only the config is here, and what it prints."""
    (directory / "teacher").mkdir()
    write_config(model, directory / "teacher", dtype)
    path = directory / "recipe.yaml"
    command = ["init", "--teacher", str(directory / "teacher"), "-o", str(path), *arguments]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return path, result.output


def refused(directory: Path, model: ModelConfig, *arguments: str) -> str:
    with pytest.raises(ValueError) as raised:
        written(directory, model, *arguments)
    assert "\n" not in str(raised.value)
    assert not (directory / "recipe.yaml").exists()
    return str(raised.value)


def targets(budgets: list[dict[str, Any]]) -> tuple[Budget, ...]:
    return tuple(build(Budget, budget) for budget in budgets)


@pytest.mark.parametrize("name", MODELS)
def test_every_teacher_gets_a_recipe_that_is_valid_and_whose_plan_holds_every_budget(name: str, tmp_path: Path) -> None:
    model, tokens = MODELS[name], 4e8
    path, output = written(tmp_path, model, "--tokens", str(tokens), "--gpus", "4")
    jsonschema.validate(yaml.safe_load(path.read_text()), recipe_schema())
    recipe = load_recipe(path)
    assert teacher.teacher_geometry(recipe) == recipe.teacher.model == model
    assert len(recipe.budgets) == 3
    result = CliRunner().invoke(app, ["plan", str(path), "--gpus", "4", "--json"], catch_exceptions=False)
    assert json.loads(result.output)["feasible"] is True
    assert sum(stage.tokens for stage in recipe.stages) == pytest.approx(tokens, rel=0.05)
    assert "look at its data" in output and "of the teacher" in output and "100.0 %" in output
    if name not in ("12b", "30b"):  # whose weights, gradients and moments alone are more than four such GPUs hold
        assert json.loads(result.output)["fits_on"] == [4]


@pytest.mark.parametrize("name", MODELS)
def test_the_axes_of_a_draft_divide_and_leave_room_below_the_smallest_budget(name: str) -> None:
    model = MODELS[name]
    params = subnet_params(model, full_subnet(model))
    budgets = targets(parse_budgets([f"{params // 2}"], params))
    axes = draft_axes(model, budgets).bind(model)  # which refuses what does not divide
    least = subnet_params(model, smallest_subnet(model, axes, range(model.num_layers)))
    assert least <= ROOM * params // 2
    if model.hidden_size % 128 == 0 and model.hidden_size >= 2048:
        assert all(size % 128 == 0 for size in axes.hidden)


def test_the_papers_teacher_gets_axes_that_surround_the_papers_sizes() -> None:
    axes = draft_axes(NANO_12B, targets(parse_budgets(["9b", "6.2b"], 12_310_001_152)))
    assert axes.hidden[0] == 5120 and axes.hidden[-1] <= 3840
    assert axes.ffn[-1] <= 10240 and axes.mamba_heads[-1] <= 112 and axes.attention_heads == (40, 32)
    assert axes.depth[0] == 62 and axes.depth[-1] >= 50


def test_a_batch_gives_every_budget_the_same_number_of_rows_on_every_gpu() -> None:
    budgets = targets(parse_budgets([], 12_310_001_152))
    for gpus in (1, 8, 64):
        for stage in draft_stages(NANO_12B, budgets, 10**11, gpus):
            assert stage.batch_size % (gpus * len(budgets)) == 0
            assert stage.rows_together(gpus) == gpus
            assert stage.steps <= 2000


def test_a_stage_that_does_not_fit_is_recomputed_then_offloaded_and_then_shortened(tmp_path: Path) -> None:
    path, _ = written(tmp_path, MODELS["12b"], "--gpus", "8", "--tokens", "2e9")
    first, second = load_recipe(path).stages
    assert first.recompute and not first.offload
    assert second.recompute and second.offload
    assert (first.sequence_length, second.sequence_length) == (8192, 49152)
    (tmp_path / "few").mkdir()
    path, _ = written(tmp_path / "few", MODELS["12b"], "--gpus", "4", "--tokens", "2e9")
    second = load_recipe(path).stages[1]
    assert second.offload and second.sequence_length < 49152


BUDGETS = {
    "8.9e9": {"name": "9b", "params": 8_900_000_000},
    "740M": {"name": "740m", "params": 740_000_000},
    "9b": {"name": "9b", "params": 9_000_000_000},
    "900000": {"name": "900k", "params": 900_000},
    "s=6.2b": {"name": "s", "params": 6_200_000_000},
    "a3b": {"name": "a3b", "active_params": 3_000_000_000},
    "12b=A2.0B": {"name": "12b", "active_params": 2_000_000_000},
    "16GiB@ctx=131072": {"name": "16gib", "memory": "16GiB@ctx=131072"},
    "card=16 GB@ctx=8192,batch=8": {"name": "card", "memory": "16 GB@ctx=8192,batch=8"},
    "1.5ms": {"name": "1_5ms", "latency": "1.5ms"},
    "fast=12ms@ctx=64": {"name": "fast", "latency": "12ms@ctx=64"},
}


@pytest.mark.parametrize(("text", "budget"), BUDGETS.items(), ids=BUDGETS)
def test_a_budget_is_asked_for_by_size_memory_or_latency(text: str, budget: dict[str, object]) -> None:
    assert parse_budgets([text], 14_310_001_152) == [{"name": "14b"}, budget]
    build(Budget, budget)


def test_the_teacher_has_a_name_of_its_own_among_the_budgets() -> None:
    assert [b["name"] for b in parse_budgets(["11.9b"], 12_310_001_152)] == ["full", "12b"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--budget", "small"],
            "--budget is 'small'; expected parameters, active parameters, memory or latency, such as 9b",
        ),
        (["--budget", "0"], "--budget is '0'; expected parameters"),
        (["--budget", "a16GiB@ctx=8"], "--budget is 'a16GiB@ctx=8'; expected parameters"),
        (["--budget", "16GiB"], r"budgets\[1\].memory is '16GiB', without a context; write 16GiB@ctx=131072"),
        (["--budget", "12ms"], "budget 12ms: a latency needs a latency table"),
        (["--budget", "3M"], "budget 3m: 3,000,000 parameters is above the teacher's"),
        (["--budget", "40k"], "budget 40k is too small for this teacher"),
        (["--budget", "500k", "--budget", "600k"], "must fall from the largest to the smallest"),
        (["--tokens", "1e5"], "stage2 has [0-9,]+ of the tokens, which are 2 steps, .* train on [0-9,]+ tokens"),
        (["--family", "a b"], "family 'a b' is not a name"),
        (["--data", "no/rows.jsonl"], "--data is 'no/rows.jsonl': no such file or directory here; correct it, or name"),
    ],
)
def test_what_no_recipe_can_hold_is_refused(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert re.search(says, refused(tmp_path, SMALL, *arguments))


def test_a_teacher_that_does_not_say_what_its_experts_are_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    write_config(NANO_12B, tmp_path / "teacher", torch.bfloat16)
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    pattern = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    (tmp_path / "teacher/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json: num_experts_per_tok=0 must be greater than 0"):
        teacher.geometry_at(str(tmp_path / "teacher"))


def test_a_recipe_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"recipe.yaml exists; name another file"):
        written(tmp_path, SMALL, "--tokens", "1e7", "--gpus", "1")
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


def test_a_budget_of_latency_takes_the_choices_that_were_measured(tmp_path: Path) -> None:
    axes = Axes(hidden=(128, 96), ffn=(384, 192), mamba_heads=(8, 4), attention_heads=(4, 2)).bind(SMALL)
    table = random_table(SMALL, axes, monotonic=True)
    write_table(tmp_path / "table.json", table)
    counted = LatencyCost(model=SMALL, fixed_times=table.fixed, times=table.times)
    ends = (full_subnet(SMALL), smallest_subnet(SMALL, axes, range(SMALL.num_layers)))
    target = f"fast={sum(map(counted.of, ends)) / 2e3:.0f}us"
    path, _ = written(
        tmp_path, SMALL, "--budget", target, "--latency-table", str(tmp_path / "table.json"), "--tokens", "1e7",
        "--gpus", "1",
    )  # fmt: skip
    recipe = load_recipe(path)
    assert recipe.latency_table == str(tmp_path / "table.json")
    assert recipe.axes.hidden == (128, 96) and recipe.axes.ffn == (384, 192)


@pytest.mark.parametrize(
    ("model", "stored", "computed"),
    [
        (SMALL, torch.float32, "float32"),
        (SMALL, torch.bfloat16, "bfloat16"),
        (SMALL, torch.float16, "bfloat16"),
        (NANO_12B, torch.float32, "bfloat16"),
    ],
    ids=["small-float32", "small-bfloat16", "small-float16", "large-float32"],
)
def test_a_small_teacher_in_float32_keeps_its_type(
    model: ModelConfig, stored: torch.dtype, computed: str, tmp_path: Path
) -> None:
    path, _ = written(tmp_path, model, "--tokens", "1e10", dtype=stored)
    assert f"\ndtype: {computed}\n" in path.read_text()
    assert load_recipe(path).dtype == computed


def test_data_that_are_named_are_the_sources(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    named = [str(tmp_path / "rows.jsonl"), "hf://org/name", "stdlib://", str(tmp_path / "later/*.jsonl")]
    options = [word for path in named for word in ("--data", path)]
    path, _ = written(tmp_path, SMALL, *options, "--tokens", "1e7", "--gpus", "1")
    assert [source.path for source in load_recipe(path).data.sources] == named


def test_every_path_of_a_recipe_is_absolute_and_without_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    write_config(SMALL, tmp_path / "teacher", torch.bfloat16)
    monkeypatch.chdir(tmp_path / "below")
    given = ["--teacher", "../teacher", "--data", "../rows.jsonl", "--tokens", "1e7", "--gpus", "1"]
    result = CliRunner().invoke(app, ["init", *given, "-o", "../recipe.yaml"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "recipe.yaml").read_text()
    assert ".." not in text
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.teacher.path, recipe.data.sources[0].path) == (f"{tmp_path}/teacher", f"{tmp_path}/rows.jsonl")
    (schema,) = re.findall(r"\$schema=(.*)", text)
    assert Path(schema).is_absolute() and Path(schema).is_file()


def test_the_geometry_of_a_teacher_in_a_bucket_is_read_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # which a teacher has no part in
    write_config(SMALL, tmp_path, torch.bfloat16)
    put_file(store, tmp_path / "config.json", f"s3://{store.bucket}/teachers/mine/config.json")
    assert teacher.geometry_at(f"s3://{store.bucket}/teachers/mine") == SMALL
