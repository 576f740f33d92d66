"""Laws of the configuration: a recipe is strict, says what is wrong and where, and survives a round trip."""

import ast
import copy
import dataclasses
import inspect
import json
import math
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter, ValidationError

from elastic_core import budget, geometry, judging, sources
from elastic_core import recipe as config
from elastic_core.budget import Budget, LatencyTarget, MemoryTarget, Serving
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.recipe import Importance, Optimizer, Pretraining, Recipe
from elastic_core.schema import build, syntax_tree, to_dict

MODEL: dict[str, Any] = {
    "hybrid_override_pattern": "M-M*-",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 4,
    "ssm_state_size": 8,
    "n_groups": 2,
    "vocab_size": 64,
}

RECIPE = """
family: nano
teacher:
  pretrain:
    model: {MODEL}
    sequence_length: 64
    batch_size: 8
    steps: 1e2
    optimizer: {learning_rate: 1e-3, schedule: cosine}
data:
  sources:
    - {path: stdlib://}
    - {path: problems.jsonl, format: jsonl, max_tokens: 1e6}
  heldout_fraction: 0.1
axes:
  hidden: [16, 12, 8]
  ffn: [32, 16]
  mamba_heads: [8, 4]
  mamba_head_dim: [4, 2]
  attention_heads: [4, 2]
  depth: [5, 4]
  per_layer: [ffn]
budgets:
  - {name: l}
  - {name: m, params: 9e3}
  - {name: s, params: 6000}
stages:
  - name: stage1
    sequence_length: 64
    batch_size: 6
    steps: 10
    budgets: {l: 1, m: 1, s: 1}
    optimizer: {learning_rate: 9e-5}
  - name: stage2
    sequence_length: 128
    batch_size: 4
    micro_batch_size: 2
    steps: 10
    budgets: {l: 0.5, m: 0.3, s: 0.2}
    optimizer: {learning_rate: 9.0e-5, warmup_steps: 0}
    router: {mode: hard, temperature: [1.0, 0.05], scale: [1, 10]}
distillation: {teacher: trainable, ce_weight: 0.5}
""".replace("{MODEL}", json.dumps(MODEL))


def recipe_data() -> dict[str, Any]:
    data = yaml.safe_load(RECIPE)
    assert isinstance(data, dict)
    return data


def set_at(data: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy of `data` with `value` at `path`."""
    changed = copy.deepcopy(data)
    inner = changed
    for key in path[:-1]:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner[key]
    inner[path[-1]] = value
    return changed


HERE = tuple(module.__name__ for module in (config, budget, geometry, judging, sources))


def config_classes() -> list[type]:
    members = [
        c for module in (config, judging, sources) for _, c in inspect.getmembers(module, dataclasses.is_dataclass)
    ]
    return [c for c in dict.fromkeys(members) if c.__module__ in HERE]


def test_every_config_class_is_frozen_with_slots_and_keywords_only() -> None:
    recipe = build(Recipe, recipe_data())
    assert len(config_classes()) >= 15
    for cls in config_classes():
        assert cls.__dataclass_params__.frozen, cls  # type: ignore[attr-defined]
        assert "__slots__" in vars(cls), cls
        assert all(f.kw_only for f in dataclasses.fields(cls)), cls
        assert not hasattr(object.__new__(cls), "__dict__"), cls
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]


def test_yaml_to_recipe_and_back_is_the_identity() -> None:
    recipe = build(Recipe, recipe_data())
    plain = to_dict(recipe)
    assert build(Recipe, plain) == recipe
    assert build(Recipe, yaml.safe_load(yaml.safe_dump(plain))) == recipe
    assert build(Recipe, json.loads(json.dumps(plain))) == recipe
    assert build(Recipe, recipe) is recipe


def test_a_recipe_holds_what_its_file_says() -> None:
    recipe = build(Recipe, recipe_data())
    assert recipe.teacher.pretrain is not None
    assert recipe.teacher.pretrain.model == ModelConfig(**MODEL)
    assert recipe.axes.hidden == (16, 12, 8)
    assert recipe.axes.per_layer == ("ffn",)
    assert recipe.budgets == (Budget(name="l"), Budget(name="m", params=9000), Budget(name="s", params=6000))
    assert recipe.stages[0].budgets == {"l": 1.0, "m": 1.0, "s": 1.0}
    assert recipe.stages[1].optimizer == Optimizer(learning_rate=9e-5, warmup_steps=0)
    assert recipe.stages[1].router.scale == (1.0, 10.0)
    assert recipe.stages[1].tokens == 10 * 4 * 128
    assert recipe.data.sources[1].max_tokens == 1_000_000


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e9", 10**9),
        ("12.31e9", 12_310_000_000),
        (12.31e9, 12_310_000_000),
        ("6000", 6000),
        (6000.0, 6000),
        ("1_000", 1000),
        ("9007199254740993", 2**53 + 1),
        (2**53 + 1, 2**53 + 1),
    ],
)
def test_numbers_written_as_text_are_read_without_loss(text: object, number: int) -> None:
    params = build(Budget, {"name": "m", "params": text}).params
    assert params == number
    assert type(params) is int


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("16GiB@ctx=131072", MemoryTarget(bytes=16 * 2**30, serving=Serving(context=131072))),
        ("1.5 GB@ctx=8", MemoryTarget(bytes=1_500_000_000, serving=Serving(context=8))),
        (
            "300kB@ctx=1e3, batch=8, dtype=float32, prefill=64",
            MemoryTarget(bytes=300_000, serving=Serving(context=1000, batch=8, dtype="float32"), prefill=64),
        ),
        ("0.3TiB@ctx=8", MemoryTarget(bytes=int(0.3 * 2**40), serving=Serving(context=8))),
    ],
)
def test_a_memory_target_is_what_its_text_says(text: str, target: MemoryTarget) -> None:
    budget = build(Budget, {"name": "m", "memory": text})
    assert budget == Budget(name="m", memory=target)
    assert budget.target == target.bytes
    assert build(Budget, to_dict(budget)) == budget


@pytest.mark.parametrize(
    ("text", "target", "nanoseconds"),
    [
        ("12ms", LatencyTarget(seconds=0.012), 12_000_000),
        ("0.7us", LatencyTarget(seconds=7e-7), 700),
        ("1s@ctx=32768,batch=4", LatencyTarget(seconds=1.0, serving=Serving(context=32768, batch=4)), 10**9),
    ],
)
def test_a_latency_target_is_what_its_text_says(text: str, target: LatencyTarget, nanoseconds: int) -> None:
    budget = build(Budget, {"name": "m", "latency": text})
    assert budget == Budget(name="m", latency=target)
    assert budget.target == nanoseconds
    assert build(Budget, to_dict(budget)) == budget


def test_a_budget_says_what_it_is_in_its_own_unit() -> None:
    said = {
        "full": {},
        "8,900,000,000": {"params": 8.9e9},
        "16 GiB at ctx=131072,batch=1,dtype=bfloat16,prefill=2048": {"memory": "16GiB@ctx=131072"},
        "286.1 MiB at ctx=8,batch=1,dtype=bfloat16,prefill=2048": {"memory": "300MB@ctx=8"},
        "12.5 ms": {"latency": "12.5ms"},
        "12.5 ms at ctx=8,batch=2,dtype=bfloat16": {"latency": "12.5ms@ctx=8,batch=2"},
    }
    for text, target in said.items():
        assert str(build(Budget, {"name": "b", **target})) == text


def budgets(*targets: dict[str, Any]) -> dict[str, Any]:
    data = recipe_data()
    data["latency_table"] = "h100.json"
    data["budgets"] = [{"name": f"b{i}", **target} for i, target in enumerate(targets)]
    for stage in data["stages"]:
        stage["budgets"] = {"b0": 1}
    return data


def test_budgets_are_ordered_where_targets_can_be_compared_and_left_to_the_resolver_where_not() -> None:
    small, large = {"memory": "1GiB@ctx=8"}, {"memory": "2GiB@ctx=8"}
    for fine in (
        [{}, {"params": 2}, {"latency": "2ms"}, small, {"latency": "1ms"}, {"params": 1}],
        [large, small],
        [small, {"memory": "2GiB@ctx=8,batch=2"}],
    ):
        assert len(build(Recipe, budgets(*fine)).budgets) == len(fine)
    for rising in (
        [small, large],
        [small, small],
        [{"latency": "1ms"}, {"params": 5}, {"latency": "1ms"}],
        [{"params": 5}, small, {"params": 5}],
        [small, {}],
        [{}, {}],
    ):
        with pytest.raises(ValueError, match="must fall from the largest to the smallest, each size once"):
            build(Recipe, budgets(*rising))


def test_a_float_field_takes_whole_numbers_and_text() -> None:
    for text, number in [("9e-5", 9e-5), (1, 1.0), ("2", 2.0)]:
        rate = build(Optimizer, {"learning_rate": text}).learning_rate
        assert rate == number
        assert type(rate) is float


MODEL_AT = ("teacher", "pretrain", "model")

# (where, bad value, the one line that the user sees)
NOT_A_NAME = "is not a name: a letter or digit, then letters, digits, '.', '_' or '-', all ASCII, at most 100"
BAD_VALUES: list[tuple[tuple[str | int, ...], Any, str]] = [
    # keys
    (("sede",), 1, "sede is not a known setting; did you mean 'seed'?"),
    (("router", "hiden_size"), 1, "router.hiden_size is not a known setting; did you mean 'hidden_size'?"),
    (
        ("stages", 1, "optimizer", "lerning_rate"),
        1,
        "stages[1].optimizer.lerning_rate is not a known setting; did you mean 'learning_rate'?",
    ),
    (("promotion", "zzz"), 1, "promotion.zzz is not a known setting; known keys: margin, benchmarks"),
    (("stages", 0), {"name": "a"}, "stages[0].sequence_length is missing; it has no default"),
    # types
    (("teacher",), 3, "teacher is 3; expected a mapping"),
    (("stages",), {"a": 1}, "stages is {'a': 1}; expected a list"),
    (("budgets",), "12b", "budgets is '12b'; expected a list"),
    (("stages", 0, "budgets"), ["l"], "stages[0].budgets is ['l']; expected a mapping"),
    (("stages", 0, "batch_size"), "many", "stages[0].batch_size is 'many'; expected a number"),
    (("stages", 0, "batch_size"), 2.5, "stages[0].batch_size is 2.5; expected a whole number"),
    (("stages", 0, "batch_size"), None, "stages[0].batch_size is None; expected int"),
    (("stages", 0, "batch_size"), [6], "stages[0].batch_size is [6]; expected int"),
    (("budgets", 1, "params"), "small", "budgets[1].params is 'small'; expected a number"),
    ((*MODEL_AT, "intermediate_size"), "wide", "teacher.pretrain.model.intermediate_size is 'wide'; expected a number"),
    (
        (*MODEL_AT, "intermediate_size"),
        [32, "wide"],
        "teacher.pretrain.model.intermediate_size[1] is 'wide'; expected a number",
    ),
    (("distillation", "kl_weight"), math.nan, "distillation.kl_weight is nan; expected a finite number"),
    (
        ("stages", 0, "optimizer", "learning_rate"),
        "inf",
        "stages[0].optimizer.learning_rate is 'inf'; expected a finite number",
    ),
    (("stages", 0, "budgets", "l"), math.inf, "stages[0].budgets.l is inf; expected a finite number"),
    (("family",), 12, "family is 12; expected str"),
    (("ffn_layout",), "puzzle", "ffn_layout is 'puzzle'; expected one of: padded, list"),
    (("dtype",), "float16", "dtype is 'float16'; expected one of: float32, bfloat16"),
    (
        ("axes", "per_layer"),
        ["ffn", "hidden"],
        "axes.per_layer[1] is 'hidden'; expected one of: ffn, mamba_heads, attention_heads, expert_ffn",
    ),
    (("stages", 0, "router"), {"scale": [1.0]}, "stages[0].router.scale has 1 entries; expected 2"),
    # values
    *(
        (("family",), name, f"family {name!r} {NOT_A_NAME}")
        for name in ("a/b", "", "família", "_nano", "-nano", "n" * 101)
    ),
    (
        ("family",),
        "main.models.nano",
        "family 'main.models.nano' has a '.': CATALOG.SCHEMA.MODEL is a name in Unity Catalog, which registers "
        "MLflow's own model format alone, copied into its own storage, and no checkpoint in S3; leave out the '.' "
        "and use an MLflow registry",
    ),
    (
        (*MODEL_AT, "hybrid_override_pattern"),
        "M-X",
        "teacher.pretrain.model: hybrid_override_pattern='M-X' must be made of M (Mamba-2), * (attention), - (FFN) and "
        "E (mixture of experts); found X",
    ),
    (
        (*MODEL_AT, "hybrid_override_pattern"),
        "",
        "teacher.pretrain.model: hybrid_override_pattern='' must be made of M (Mamba-2), * (attention), - (FFN) and "
        "E (mixture of experts); found nothing",
    ),
    (
        (*MODEL_AT, "mamba_num_heads"),
        7,
        "teacher.pretrain.model: mamba_num_heads=7 is not a multiple of n_groups=2; nearest valid: 6 or 8",
    ),
    (
        (*MODEL_AT, "num_attention_heads"),
        1,
        "teacher.pretrain.model: num_attention_heads=1 is not a multiple of num_key_value_heads=2; nearest valid: 2",
    ),
    ((*MODEL_AT, "head_dim"), 0, "teacher.pretrain.model: head_dim=0 must be greater than 0"),
    (
        (*MODEL_AT, "intermediate_size"),
        [32, 32, 32],
        "teacher.pretrain.model: intermediate_size lists 3 widths; the pattern has 2 FFN layers",
    ),
    ((*MODEL_AT, "intermediate_size"), -1, "teacher.pretrain.model: intermediate_size=-1 must be greater than 0"),
    ((*MODEL_AT, "layer_norm_epsilon"), 0, "teacher.pretrain.model: layer_norm_epsilon=0.0 must be greater than 0"),
    (
        (*MODEL_AT, "time_step_max"),
        1e-4,
        "teacher.pretrain.model: time_step_max=0.0001 is below time_step_min=0.001",
    ),
    (("teacher", "pretrain", "steps"), 0, "teacher.pretrain: steps=0 must be greater than 0"),
    (("teacher", "path"), "nvidia/x", "teacher: name either path or pretrain, and not both"),
    (("data", "sources"), [], "data: sources is empty; name at least one"),
    (
        ("data", "sources", 0, "path"),
        "",
        "data.sources[0]: path is empty; name a file, a glob, a directory, s3://, hf:// or stdlib://",
    ),
    (("data", "sources", 1, "max_tokens"), 0, "data.sources[1]: max_tokens=0 must be greater than 0"),
    (("data", "heldout_fraction"), 1, "data: heldout_fraction=1.0 must lie between 0 and 1"),
    (("data", "shard_bytes"), 0, "data: shard_bytes=0 must be greater than 0"),
    (("data", "sources", 0, "weight"), -1, "data.sources[0]: weight=-1.0 must be at least 0"),
    (
        ("data", "sources", 0, "weight"),
        1,
        "data: source problems.jsonl has no weight, and others have one; give all sources one, or none",
    ),
    (
        ("data", "sources"),
        [{"path": "a", "name": "web"}, {"path": "b", "name": "web"}],
        "data: source 'web' is named twice; give each source a name of its own",
    ),
    (
        ("data", "sources"),
        [{"path": "a", "weight": 0}, {"path": "b", "weight": 0}],
        "data: no source has a weight above 0; raise one, or give none",
    ),
    (
        ("stages", 0, "sources"),
        {},
        "stages[0]: sources={} must give each source a weight of at least 0, and one a greater",
    ),
    (("stages", 0, "sources"), {"web": 1}, "stage stage1: source 'web' is not named in data.sources"),
    (("axes", "hidden"), [8, 16], "axes: hidden=[8, 16] must fall from the largest, each once"),
    (("axes", "depth"), [5, 5], "axes: depth=[5, 5] must fall from the largest, each once"),
    (("axes", "ffn"), [32, 0], "axes: ffn=[32, 0] must be greater than 0"),
    (("budgets",), [], "budgets [] must be at least one, each name once, whatever its case"),
    *(
        (
            ("budgets", 1, "name"),
            name,
            f"budgets ['l', {name!r}, 's'] must be at least one, each name once, whatever its case",
        )
        for name in ("l", "L")
    ),
    *((("budgets", 1, "name"), name, f"budgets[1]: budget {name!r} {NOT_A_NAME}") for name in ("m b", "größe", "-m")),
    (
        ("budgets", 1, "name"),
        "family",
        "budgets[1]: budget 'family' needs another name: the elastic checkpoint is stored as 'family'",
    ),
    (("budgets", 1, "params"), -5, "budgets[1]: params=-5 must be greater than 0"),
    (
        ("budgets", 2, "params"),
        9500,
        "budgets ['l', 'm', 's'] must fall from the largest to the smallest, each size once",
    ),
    (
        ("budgets", 2, "params"),
        9000,
        "budgets ['l', 'm', 's'] must fall from the largest to the smallest, each size once",
    ),
    (
        ("budgets", 1, "memory"),
        "16G@ctx=8",
        "budgets[1].memory is '16G@ctx=8'; expected an amount in B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, such as "
        "16GiB@ctx=131072",
    ),
    (("budgets", 1, "memory"), "16GiB", "budgets[1].memory is '16GiB', without a context; write 16GiB@ctx=131072"),
    (("budgets", 1, "memory"), "1GiB@ctx=0", "budgets[1].memory.serving: context=0 must be greater than 0"),
    (("budgets", 1, "memory"), "1GiB@ctx=8k", "budgets[1].memory.serving.context is '8k'; expected a number"),
    (("budgets", 1, "memory"), "0.1B@ctx=8", "budgets[1].memory: bytes=0 must be greater than 0"),
    (("budgets", 1, "memory"), "1GiB@ctx=8,prefill=0", "budgets[1].memory: prefill=0 must be greater than 0"),
    (
        ("budgets", 1, "memory"),
        "1GiB@ctx=8,dtype=int8",
        "budgets[1].memory.serving.dtype is 'int8'; expected one of: float32, bfloat16",
    ),
    (
        ("budgets", 1, "memory"),
        "1GiB@ctx=8,context=9",
        "budgets[1].memory: 'context=9' is not one of ctx=..., batch=..., dtype=..., prefill=..., each once",
    ),
    (
        ("budgets", 1, "memory"),
        "1GiB@ctx=8,batch=2,batch=3",
        "budgets[1].memory: 'batch=3' is not one of ctx=..., batch=..., dtype=..., prefill=..., each once",
    ),
    (
        ("budgets", 1, "memory"),
        {"bytes": 5},
        "budgets[1].memory.serving is missing; it has no default",
    ),
    (
        ("budgets", 1, "latency"),
        "12",
        "budgets[1].latency is '12'; expected an amount in us, ms, s, such as 12ms or 12ms@ctx=32768",
    ),
    (
        ("budgets", 1, "latency"),
        "-1ms",
        "budgets[1].latency is '-1ms'; expected an amount in us, ms, s, such as 12ms or 12ms@ctx=32768",
    ),
    (("budgets", 1, "latency"), "0s", "budgets[1].latency: seconds=0.0 must be at least a nanosecond"),
    (
        ("budgets", 1, "latency"),
        "12ms@batch=2",
        "budgets[1].latency is '12ms@batch=2', without a context; write 12ms@ctx=32768,batch=2",
    ),
    (
        ("budgets", 1, "latency"),
        "12ms@ctx=8,prefill=2",
        "budgets[1].latency: 'prefill=2' is not one of ctx=..., batch=..., dtype=..., each once",
    ),
    (("budgets", 1, "latency"), 0.012, "budgets[1].latency is 0.012; expected a mapping"),
    (
        ("budgets", 1, "memory"),
        {"bytes": 5, "serving": {"context": 8}},
        "budgets[1]: budget m has params and memory; give it one target, or none",
    ),
    (
        ("budgets", 1),
        {"name": "m", "latency": {"seconds": 0.012}},
        "budget m is a latency, which needs latency_table: the file that `elastic profile` measures on the device to "
        "serve from",
    ),
    (
        ("budgets", 2),
        {"name": "s"},
        "budgets ['l', 'm', 's'] must fall from the largest to the smallest, each size once",
    ),
    (("stages",), [], "stages [] must be at least one, each name once"),
    (("stages", 1, "name"), "stage1", "stages ['stage1', 'stage1'] must be at least one, each name once"),
    *((("stages", 1, "name"), name, f"stages[1]: stage {name!r} {NOT_A_NAME}") for name in ("a b", "étape", "../x")),
    (("stages", 1, "steps"), 0, "stages[1]: steps=0 must be greater than 0"),
    (
        ("stages", 1, "batch_size"),
        5,
        "stages[1]: batch_size=5 is not a multiple of micro_batch_size=2; nearest valid: 4 or 6",
    ),
    (
        ("stages", 0, "budgets"),
        {"l": 0},
        "stages[0]: budgets={'l': 0.0} must give each budget a share of at least 0, and some more",
    ),
    (
        ("stages", 0, "budgets"),
        {"l": 2, "s": -1},
        "stages[0]: budgets={'l': 2.0, 's': -1.0} must give each budget a share of at least 0, and some more",
    ),
    (("stages", 0, "budgets"), {"xl": 1}, "stage stage1: budget 'xl' is not one of l, m, s"),
    (("stages", 0, "optimizer", "learning_rate"), 0, "stages[0].optimizer: learning_rate=0.0 must be greater than 0"),
    (("stages", 0, "optimizer", "warmup_steps"), -1, "stages[0].optimizer: warmup_steps=-1 must be at least 0"),
    (
        ("stages", 0, "optimizer", "beta2"),
        1,
        "stages[0].optimizer: beta1=0.9, beta2=1.0: each must be at least 0 and below 1",
    ),
    (
        ("stages", 0, "optimizer", "final_fraction"),
        1.5,
        "stages[0].optimizer: final_fraction=1.5 must lie between 0 and 1",
    ),
    (
        ("stages", 1, "router", "temperature"),
        [1, 0],
        "stages[1].router: temperature=(1.0, 0.0) and scale=(1.0, 10.0) must be greater than 0",
    ),
    (("stages", 1, "router", "loss_weight"), -1, "stages[1].router: loss_weight=-1.0 must be at least 0"),
    (("distillation", "temperature"), 0, "distillation: temperature=0.0 must be greater than 0"),
    (
        ("distillation",),
        {"kl_weight": 0},
        "distillation: kl_weight=0.0, ce_weight=0.0: one must be greater than 0",
    ),
    (
        ("distillation", "ce_weight"),
        0,
        "distillation: teacher=trainable needs ce_weight > 0; without it the full budget has nothing to learn",
    ),
    (("importance",), {"comparison_tokens": -1}, "importance: comparison_tokens=-1 must be at least 0"),
    (("importance",), {"depth_samples": 0}, "importance: depth_samples=0 must be greater than 0"),
    (("shapes",), {"measurements": 0}, "shapes: measurements=0 must be greater than 0"),
    (("stages", 0, "full_share"), 1, "stages[0]: full_share=1.0 must be at least 0 and below 1"),
    (("stages", 0, "budget_rows"), 0, "stages[0]: budget_rows=0 must be greater than 0"),
    (("router",), {"hidden_size": 0}, "router: hidden_size=0 must be greater than 0"),
    (("evaluation",), {"batch_size": 0}, "evaluation: batch_size=0 must be greater than 0"),
    (("promotion",), {"margin": -0.1}, "promotion: margin=-0.1 must be at least 0"),
]

DESCRIPTION = re.compile(r"\. \w+: [A-Z`].*$")  # of a field, behind what is wrong with its value
BAD_IDS = [f"{'.'.join(map(str, path))}={value!r}"[:60] for path, value, _ in BAD_VALUES]


@pytest.mark.parametrize(("path", "value", "message"), BAD_VALUES, ids=BAD_IDS)
def test_a_bad_value_gets_one_line_with_its_path(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        build(Recipe, set_at(recipe_data(), path, value))
    assert DESCRIPTION.sub("", str(caught.value)) == message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("stages", 0, "batch_size"),
            "many",
            "stages[0].batch_size is 'many'; expected a number. batch_size: Sequences in a step, over all processes "
            "together. Example: `1536`.",
        ),
        (
            ("stages", 0, "router"),
            {"scale": [1.0, "x"]},
            "stages[0].router.scale[1] is 'x'; expected a number. scale: What the router's logits are multiplied by at "
            "the first step and at the last; it rises linearly. Example: `[1.0, 10.0]`.",
        ),
        (
            ("budgets", 1, "memory"),
            "1GiB@ctx=8k",
            "budgets[1].memory.serving.context is '8k'; expected a number. context: Tokens in a sequence at most, the "
            "prompt included. Example: `131072`.",
        ),
        (
            ("stages", 0),
            {"name": "a", "sequence_length": 1},
            "stages[0].batch_size is missing; it has no default. batch_size: Sequences in a step, over all processes "
            "together. Example: `1536`.",
        ),
    ],
    ids=["a number", "in a list", "as text", "missing"],
)
def test_who_writes_another_type_or_nothing_is_told_what_the_field_is(path, value, message) -> None:
    with pytest.raises(ValueError) as caught:
        build(Recipe, set_at(recipe_data(), path, value))
    assert str(caught.value) == message


@pytest.mark.parametrize(("path", "value", "_message"), BAD_VALUES, ids=BAD_IDS)
def test_pydantic_refuses_what_build_refuses(path: tuple[str | int, ...], value: Any, _message: str) -> None:
    plain = to_dict(build(Recipe, recipe_data()))  # with its numbers as numbers, as pydantic wants them
    with pytest.raises(ValidationError):
        TypeAdapter(Recipe).validate_python(set_at(plain, path, value))


def test_pydantic_builds_what_build_builds() -> None:
    recipe = build(Recipe, recipe_data())
    assert TypeAdapter(Recipe).validate_python(to_dict(recipe)) == recipe
    assert TypeAdapter(Recipe).validate_json(json.dumps(to_dict(recipe))) == recipe


@pytest.mark.parametrize("value", [True, 1, "yes"])
def test_a_switch_is_neither_a_number_nor_a_word(value: Any) -> None:
    """YAML tells `true` from `1`, so a mix-up is a mistake; pydantic converts these, as web forms need."""
    path: tuple[str | int, ...] = ("seed",) if value is True else ("stages", 0, "recompute")
    with pytest.raises(ValueError, match=f"^(seed|stages\\[0\\].recompute) is {value!r}; expected "):
        build(Recipe, set_at(recipe_data(), path, value))


def test_a_missing_root_setting_is_named() -> None:
    data = recipe_data()
    del data["family"]
    with pytest.raises(ValueError, match=r"^family is missing; it has no default\. family: "):
        build(Recipe, data)
    with pytest.raises(ValueError, match=r"^Recipe is None; expected a mapping$"):
        build(Recipe, None)


def test_layers_and_ordinals_agree_with_the_pattern() -> None:
    model = build(ModelConfig, {**MODEL, "intermediate_size": [32, 24]})
    assert (model.layers_of("M"), model.layers_of("-"), model.layers_of("*")) == ((0, 2), (1, 4), (3,))
    assert [model.ordinal(i) for i in range(model.num_layers)] == [0, 0, 1, 0, 1]
    assert model.ffn_sizes == (32, 24)
    assert build(ModelConfig, MODEL).ffn_sizes == (32, 32)
    assert (model.mamba_size, model.state_rows) == (8 * 4, 2 * 2 * 8)


def test_binding_fills_empty_axes_with_the_full_size_alone() -> None:
    model = ModelConfig(**MODEL)
    bound = Axes(hidden=(16, 8)).bind(model)
    assert bound == Axes(
        hidden=(16, 8), ffn=(32,), mamba_heads=(8,), mamba_head_dim=(4,), attention_heads=(4,), depth=(5,)
    )
    assert bound.bind(model) == bound


@pytest.mark.parametrize(
    ("axes", "model", "message"),
    [
        ({"hidden": (12, 8)}, {}, "axes.hidden begins with 12; it must begin with the teacher's 16"),
        ({"depth": (6, 5)}, {}, "axes.depth begins with 6; it must begin with the teacher's 5"),
        (
            {"mamba_heads": (8, 5)},
            {},
            "axes.mamba_heads=5 is not a multiple of n_groups=2; nearest valid: 4 or 6",
        ),
        (
            {"attention_heads": (4, 1)},
            {},
            "axes.attention_heads=1 is not a multiple of num_key_value_heads=2; nearest valid: 2",
        ),
        (
            {"per_layer": ("attention_heads",)},
            {"hybrid_override_pattern": "M-M-"},
            "axes.per_layer names attention_heads, but the teacher has no such layers",
        ),
        (
            {},
            {"intermediate_size": (32, 24)},
            "the teacher's intermediate_size differs by layer; an elastic model starts from one width",
        ),
    ],
)
def test_binding_refuses_choices_that_do_not_fit_the_teacher(
    axes: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        Axes(**axes).bind(ModelConfig(**{**MODEL, **model}))
    assert str(caught.value) == message


def test_pretraining_is_a_stage_at_the_full_budget() -> None:
    pretraining = build(Pretraining, recipe_data()["teacher"]["pretrain"])
    stage = pretraining.stage()
    assert stage.budgets == {"full": 1.0}
    assert stage.router.mode == "frozen"
    assert stage.tokens == 100 * 8 * 64
    assert stage.optimizer == pretraining.optimizer


def test_importing_the_configuration_imports_no_torch() -> None:
    code = "import sys, elastic_core.recipe; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_source_is_parsed_though_another_librarys_thread_parses_at_once(monkeypatch):
    parse, failures = ast.parse, ["AST constructor recursion depth mismatch (before=114, after=77)"] * 3

    def disturbed(source: str) -> ast.Module:
        if failures:
            raise SystemError(failures.pop())
        return parse(source)

    monkeypatch.setattr(ast, "parse", disturbed)
    assert ast.unparse(syntax_tree("a = 1")) == "a = 1"
    failures.extend(["a fault that stays"] * 99)
    with pytest.raises(SystemError, match="stays"):
        syntax_tree("a = 1")


def test_a_ranking_does_not_depend_on_how_it_is_compared_with_random_orders() -> None:
    settings = Importance(samples=8, scores="signed")
    assert dataclasses.replace(settings, comparison_tokens=0, random_orders=9).ranking == settings.ranking == settings
    for changes in ({"samples": 9}, {"hidden": "channels"}, {"scores": "added"}):
        assert build(Importance, to_dict(settings) | changes).ranking != settings.ranking
