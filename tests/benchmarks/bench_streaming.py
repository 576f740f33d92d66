"""Slicing and reordering Nano-12B-v2, and slicing Nemotron 3 Nano 30B-A3B, on disk.

BENCH_DIRECTORY=/a/large/disk pytest -m benchmark -s tests/benchmarks/bench_streaming.py [-k 9b]

Measured are the speed beside `cp`, resident memory, and what kill -9 leaves behind. A checkpoint of the model's exact
shapes is written first, 24.6 GB or 63.2 GB of made-up weights, and deleted at the end. Where the disk has no room for
it and a copy, it has the first layers alone, as many as there is room for, and the benchmark says so; BENCH_LAYERS=17
takes the first 17. Each run of ours is followed by one of `cp`, which copies as many of the source's shards as move the
same number of bytes, read and written. Both begin with nothing left to write and nothing of the source in the page
cache, and end when everything is on the disk. Ours is timed after Python's imports.
"""

import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import RUNS, record
from nano import NANO_12B, NANO_30B
from safetensors import safe_open
from torch import Tensor

from elastic_core.cost import subnet_params
from elastic_core.files.checkpoint import CheckpointError, open_checkpoint, read_config, tensor_shapes, write_checkpoint
from elastic_core.files.reorder import Order, random_order, reorder_checkpoint
from elastic_core.files.shards import TensorInfo
from elastic_core.files.slicing import slice_checkpoint
from elastic_core.geometry import FFN, MAMBA, MOE, ModelConfig
from elastic_core.subnet import Subnet, full_subnet

MAX_RESIDENT_BYTES = 2**30  # C7
SHARD_BYTES = 10**9  # of the source; small, so that some number of shards comes near any number of bytes
SPACE = 2.1  # times the source: itself and the largest copy
LEAST_LAYERS = 6  # a layer of every kind
KILLS = 3

# One Mamba, three FFN and two attention layers: with Nano-9B-v2's widths, what is left has its parameters.
DROPPED_9B = (16, 17, 30, 33, 34, 48)


def subnet_9b(config: ModelConfig) -> Subnet:
    layers = tuple(layer for layer in range(config.num_layers) if layer not in DROPPED_9B)
    ffn = (15680,) * len(config.layers_of(FFN))
    return dataclasses.replace(full_subnet(config), hidden=4480, ffn=ffn, layers=layers)


def subnet_6b(config: ModelConfig) -> Subnet:
    ffn, heads = (10240,) * len(config.layers_of(FFN)), (96,) * len(config.layers_of(MAMBA))
    return dataclasses.replace(full_subnet(config), hidden=3840, ffn=ffn, mamba_heads=heads)


def order_of(config: ModelConfig) -> Order:
    return random_order(config, torch.Generator().manual_seed(0))


def subnet_12b_of_30b(config: ModelConfig) -> Subnet:
    """As Star Elastic cuts it: hidden channels, and the width of every expert."""
    return dataclasses.replace(full_subnet(config), hidden=1920, expert_ffn=(1024,) * len(config.layers_of(MOE)))


SUBNETS: dict[str, Callable[[ModelConfig], Subnet]] = {
    "9b": subnet_9b,
    "6b": subnet_6b,
    "12b of 30b": subnet_12b_of_30b,
}
MODELS = {"12b": NANO_12B, "30b": NANO_30B}
FORMS = [("12b", "9b"), ("12b", "6b"), ("12b", "reorder"), ("30b", "12b of 30b")]
TARGETS = dict.fromkeys(SUBNETS, "at most 1.25") | {"reorder": "as low as it goes"}


# In a child process, whose memory and bytes are those of the streaming alone


def measure(form: str, source: Path, target: Path) -> dict[str, Any]:
    config, before, start = read_config(source), system_calls(), time.perf_counter()
    if form in SUBNETS:
        digests = slice_checkpoint(source, SUBNETS[form](config), target)
    else:
        digests = reorder_checkpoint(source, order_of(config), target)
    seconds, after = time.perf_counter() - start, system_calls()
    moved = sum(after[key] - before[key] for key in ("rchar", "wchar"))
    return {"seconds": seconds, "moved": moved, "resident": peak_resident_bytes(), "digests": digests}


def system_calls() -> dict[str, int]:
    """Among others the bytes that this process has read and written, whatever the page cache made of them."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in lines}


def peak_resident_bytes() -> int:
    """VmHWM; ru_maxrss would begin at the parent's peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def start(form: str, source: Path, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, form, str(source), str(target)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def completed(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    assert process.returncode == 0
    row: dict[str, Any] = json.loads(out)
    return row


# The source, and copies of it


def first_layers(model: ModelConfig, layers: int) -> ModelConfig:
    return dataclasses.replace(model, hybrid_override_pattern=model.hybrid_override_pattern[:layers])


def weight_bytes(model: ModelConfig) -> int:
    return 2 * subnet_params(model, full_subnet(model))


def as_much_as_fits(model: ModelConfig, home: Path) -> ModelConfig:
    """The model, or those of its first layers that the free disk has room for."""
    most, free = int(os.environ.get("BENCH_LAYERS", model.num_layers)), shutil.disk_usage(home).free
    layers = max((n for n in range(1, most + 1) if SPACE * weight_bytes(first_layers(model, n)) < free), default=0)
    if layers < LEAST_LAYERS:
        pytest.skip(f"{home} has {free / 1e9:.0f} GB free, room for {layers} layers; set BENCH_DIRECTORY")
    config = first_layers(model, layers)
    if layers < model.num_layers:
        whole, there = (f"{weight_bytes(m) / 1e9:.1f} GB" for m in (model, config))
        asked = f"BENCH_LAYERS={most}" if layers == most else f"{home} has {free / 1e9:.0f} GB free"
        sys.__stdout__.write(f"\nonly {layers} of {model.num_layers} layers, {there} of {whole}: {asked}\n")
    return config


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = Path(os.environ.get("BENCH_DIRECTORY") or tmp_path_factory.mktemp("streaming"))
    config = as_much_as_fits(MODELS[request.param], home)
    plan = {name: TensorInfo(dtype=torch.bfloat16, shape=shape) for name, shape in tensor_shapes(config).items()}
    pool = torch.randn(2**25, generator=torch.Generator().manual_seed(0)).bfloat16()

    def blocks(name: str) -> Iterator[Tensor]:
        """Windows of one long row of normal numbers, so that a generator is not what takes the time."""
        rows, windows = torch.empty(plan[name].shape, device="meta"), random.Random(name)
        for block in rows.split(max(1, 2**24 // rows[0].numel())):
            begin = windows.randrange(len(pool) - block.numel())
            yield pool[begin : begin + block.numel()].view(block.shape)

    directory = home / "source"
    write_checkpoint(directory, config, plan, blocks, max_shard_bytes=SHARD_BYTES)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def target(source: Path) -> Iterator[Path]:
    directory = source.with_name("target")
    yield directory
    for left_over in (directory, directory.with_name(".target.partial")):
        shutil.rmtree(left_over, ignore_errors=True)


def cool(directory: Path) -> None:
    """Nothing left to write, and nothing of `directory` in the page cache."""
    os.sync()
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path, moved: int) -> float:
    """Bytes a second, read and written, of `cp` moving about `moved` bytes, until they are on the disk."""
    files = sorted(source.glob("*.safetensors"))[: max(1, round(moved / 2 / SHARD_BYTES))]
    cool(source)
    target.mkdir()
    begin = time.perf_counter()
    subprocess.run(["cp", *files, target], check=True)
    subprocess.run(["sync", *target.iterdir(), target], check=True)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return 2 * sum(path.stat().st_size for path in files) / seconds


def assert_holds(target: Path, source: Path, form: str) -> None:
    """A matrix of each end of the model, and one whose rows and columns both change, by safetensors' own reader."""
    config = read_config(source)
    of_layer = "experts.5.up_proj.weight" if config.layers_of(MOE) else "up_proj.weight"
    names = ("embeddings.weight", f"layers.1.mixer.{of_layer}")
    order, cut = order_of(config), read_config(target)
    for name in (*names, "lm_head.weight"):
        whole, found = stock_tensor(source, name), stock_tensor(target, name)
        if form in SUBNETS:
            assert torch.equal(found, whole[: len(found), : cut.hidden_size])
        else:
            rows = whole[order.ffn[0]] if "up_proj" in name else whole
            assert torch.equal(found, rows[:, order.hidden])


def stock_tensor(directory: Path, name: str) -> Tensor:
    stored = open_checkpoint(directory).tensors[name]
    with safe_open(stored.path, "pt") as file:
        return file.get_tensor(stored.name)


@pytest.mark.benchmark
@pytest.mark.parametrize(("source", "form"), FORMS, indirect=["source"])
def test_streaming_beside_cp(form: str, source: Path, target: Path) -> None:
    config, rows, copies = read_config(source), [], []
    for _ in range(RUNS):
        cool(source)
        rows.append(completed(start(form, source, target)))
        if len(rows) == 1:
            assert_holds(target, source, form)
        shutil.rmtree(target)
        copies.append(copy(source, target, rows[-1]["moved"]))
    params = subnet_params(config, SUBNETS.get(form, full_subnet)(config))
    resident, speeds = max(row["resident"] for row in rows), [row["moved"] / row["seconds"] for row in rows]
    record(
        benchmark="streaming",
        shape=f"{form}: {params:,} params, {rows[0]['moved'] / 1e9:.1f} GB moved",
        unit="s",
        ours=statistics.median(row["seconds"] for row in rows),
        theirs=rows[0]["moved"] / statistics.median(copies),
        alternative="cp and sync",
        target=TARGETS[form],
    )
    spread = [
        f"{name} {min(runs) / 1e9:.2f} to {max(runs) / 1e9:.2f}" for name, runs in (("ours", speeds), ("cp", copies))
    ]
    sys.__stdout__.write(f"{form}: peak resident {resident / 2**20:.0f} MiB; GB/s: {', '.join(spread)}\n")
    assert resident < MAX_RESIDENT_BYTES
    assert all(row["digests"] == rows[0]["digests"] for row in rows)


@pytest.mark.benchmark
@pytest.mark.parametrize("source", ["12b"], indirect=True)
def test_a_killed_slice_is_never_loadable_and_a_rerun_completes(source: Path, target: Path) -> None:
    cool(source)
    uninterrupted = completed(start("6b", source, target))
    shutil.rmtree(target)
    points = random.Random(0)
    for _ in range(KILLS):
        cool(source)
        process = start("6b", source, target)
        while not target.with_name(".target.partial").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(points.uniform(0, 0.7) * uninterrupted["seconds"])
        process.kill()
        process.communicate()
        assert not target.exists()
        with pytest.raises(CheckpointError):
            open_checkpoint(target.with_name(".target.partial"))
    assert completed(start("6b", source, target))["digests"] == uninterrupted["digests"]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
