"""Laws of the latency table: what is timed is the slice's own layer at the context, and a file holds what was timed."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from latency import random_table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elastic_core.budget import Budget, Dtype, LatencyTarget, Serving
from elastic_core.cost import budget_cost, choices
from elastic_core.files.shards import CheckpointError
from elastic_core.geometry import ATTENTION, FFN, MAMBA, Axes, ModelConfig
from elastic_core.layers.kind import LayerShape
from elastic_core.layers.kinds import KINDS
from elastic_core.planning.profile import _Bench, measure, read_table, write_table
from elastic_core.subnet import full_subnet

MODEL = ModelConfig(
    hybrid_override_pattern="M-M*-",
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=2,
    vocab_size=100,
    chunk_size=16,
)
AXES = Axes(hidden=(32, 16), ffn=(64, 32), mamba_heads=(4, 2), mamba_head_dim=(8, 4), attention_heads=(4, 2)).bind(
    MODEL
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("context", [1, 20])
def test_a_table_has_a_time_for_every_choice(context: int, dtype: Dtype) -> None:
    serving, seen = Serving(context=context, batch=2, dtype=dtype), []
    table = measure(MODEL, AXES, serving, CPU, repeats=2, progress=lambda done, total: seen.append((done, total)))
    parts = len(AXES.hidden) * (1 + 2 + 4 + 2)
    assert len(table.fixed) + len(table.layers) == parts
    assert seen == [(done + 1, 2 * parts) for done in range(2 * parts)]
    assert (table.serving, table.model) == (serving, MODEL)
    assert "CPU" in table.device
    table.check(MODEL, AXES)
    budget = Budget(name="b", latency=LatencyTarget(seconds=1.0, serving=serving))
    assert budget_cost(MODEL, budget, table).of(full_subnet(MODEL)) > 0


def flops(step: Callable[[], object]) -> int:
    """Those of matrix products; of attention too, done by its formula, for a kernel's are not counted on a CPU."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_a_part_does_the_work_of_the_slices_layer_at_the_context() -> None:
    batch, context = 3, 20
    shapes = [shape for kind in KINDS for shape in choices(MODEL, AXES, kind)]
    bench = _Bench(MODEL, Serving(context=context, batch=batch, dtype="float32"), CPU, shapes, AXES.hidden)
    states = MODEL.state_rows
    for hidden in AXES.hidden:
        assert flops(bench.fixed(hidden)) == 2 * batch * hidden * MODEL.vocab_size
    for shape in shapes:
        if shape.kind == FFN:
            products = 2 * shape.hidden * shape.width
        elif shape.kind == ATTENTION:
            products = 2 * shape.hidden * MODEL.head_dim * (shape.width + MODEL.num_key_value_heads)
            products += 2 * shape.width * MODEL.head_dim * context
        else:
            channels = shape.width * shape.mamba_head_dim
            products = shape.hidden * (3 * channels + states + shape.width) + channels * MODEL.ssm_state_size
        assert flops(bench.layer(shape)) == 2 * batch * products, shape


def test_a_part_can_be_run_again_and_again_at_the_same_context() -> None:
    bench = _Bench(MODEL, Serving(context=9, dtype="float32"), CPU, choices(MODEL, AXES, ATTENTION), AXES.hidden)
    step = bench.layer(LayerShape(kind=ATTENTION, hidden=32, width=4))
    assert flops(step) == flops(step)
    assert torch.equal(step(), step())  # type: ignore[arg-type]


def test_a_model_without_some_kind_of_layer_is_measured(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, hybrid_override_pattern="M-")
    axes = Axes(ffn=(64, 32)).bind(model)
    table = measure(model, axes, Serving(context=4, dtype="float32"), CPU, repeats=1)
    assert {layer.kind for layer in table.layers} == {MAMBA, FFN}
    table.check(model, axes)


def test_a_table_reads_back(tmp_path: Path) -> None:
    table = random_table(MODEL, AXES)
    write_table(tmp_path / "table.json", table)
    assert read_table(tmp_path / "table.json") == table


BAD_TABLES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing key": (lambda t: t.pop("device"), "is not a latency table: device is missing"),
    "unknown key": (lambda t: t.update(devices="x"), "devices is not a known setting; did you mean 'device'"),
    "a time of zero": (lambda t: t["layers"][0].update(nanoseconds=0), "nanoseconds=0 must be greater than 0"),
    "a time that is infinite": (lambda t: t["fixed"].update({"32": float("inf")}), r"fixed\.32 is inf; expected a fin"),
    "a time that is no number": (
        lambda t: t["layers"][2].update(nanoseconds="long"),
        r"layers\[2\]\.nanoseconds is 'l",
    ),
    "a time in parts": (
        lambda t: t["layers"][2].update(nanoseconds=1.5),
        r"layers\[2\]\.nanoseconds is 1\.5; expected a",
    ),
    "a shape twice": (lambda t: t["layers"].append(t["layers"][0]), "a shape is listed more than once"),
    "no serving": (lambda t: t["serving"].update(context=0), "serving: context=0 must be greater than 0"),
    "no model": (lambda t: t["model"].update(n_groups=3), "is not a multiple of n_groups=3"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_table_is_refused_in_one_line_that_names_the_file(case: str, tmp_path: Path) -> None:
    change, message = BAD_TABLES[case]
    path = tmp_path / "table.json"
    write_table(path, random_table(MODEL, AXES))
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_table(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("fast")
    with pytest.raises(CheckpointError, match=r"text\.json: is not valid JSON"):
        read_table(tmp_path / "text.json")
    for missing in (tmp_path / "no.json", tmp_path):
        with pytest.raises(CheckpointError, match="there is no such file; measure a latency table"):
            read_table(missing)
