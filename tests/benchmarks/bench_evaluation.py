"""Evaluating a random teacher of 709 million parameters in little more memory than two of it take.

BENCH_DIRECTORY=/a/large/disk pytest -m benchmark -s tests/benchmarks/bench_evaluation.py

Every measurement runs in a process whose data may not grow beyond 2.05 teachers in float32 and ROOM. The same process
cannot hold the four models that an evaluation held together before: teacher, reordered teacher, its shuffle, a slice.
BENCH_LAYERS=8 takes the first 8 layers only.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import record
from safetensors.torch import save_file

from elastic_core.cost import subnet_params
from elastic_core.files.checkpoint import read_config, write_weights
from elastic_core.geometry import ModelConfig
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Evaluation
from elastic_core.subnet import full_subnet
from elastic_core.training.curriculum import generator
from elastic_core.training.job import load_model
from tasks.corpus.heldout import heldout_batches
from tasks.corpus.record import HELDOUT_FILE
from tasks.evaluate import Reader, shared_loss

pytestmark = pytest.mark.benchmark

CONFIG = ModelConfig(
    hybrid_override_pattern=("M-" * 17 + "*-")[: int(os.environ.get("BENCH_LAYERS", 36))],
    hidden_size=1536,
    intermediate_size=6144,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=64,
    mamba_num_heads=48,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    vocab_size=32768,
)
TEXT = Evaluation(heldout_tokens=256, sequence_length=64)
MOST_RESIDENT = 2.05
ROOM = 3 * 2**29  # Python, torch, and what 64 tokens activate


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two models of one size, and text."""
    root = Path(os.environ.get("BENCH_DIRECTORY", tmp_path_factory.mktemp("evaluation")))
    for seed, name in enumerate(("teacher", "slice")):
        model = ElasticNemotronH(CONFIG)
        model.initialise(generator(seed))
        write_weights(root / name, CONFIG, model.state_dict(), torch.float32)
        del model
    save_file({"tokens": torch.arange(1000, dtype=torch.int32)}, root / HELDOUT_FILE)
    yield root


READERS: dict[str, dict[str, Any]] = {
    "loss and KL of a slice": {"model": "slice", "teacher": "teacher"},
    "cut": {"model": "teacher", "cut": True},
    "cut in random order": {"model": "teacher", "cut": True, "random_seed": 0},
}


def in_a_process(directory: Path, what: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, str(directory), json.dumps(what)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("what", READERS)
def test_a_measurement_fits_into_two_teachers(what: str, directory: Path) -> None:
    done = in_a_process(directory, READERS[what])
    assert done.returncode == 0, done.stderr
    weights = 4 * subnet_params(CONFIG, full_subnet(CONFIG))
    record(
        benchmark="evaluation",
        shape=f"{what}, {weights / 4e6:.0f} million parameters",
        unit="bytes",
        ours=float(done.stdout),
        theirs=MOST_RESIDENT * weights + ROOM,
        alternative="2.05 teachers and 1.5 GiB",
        target="1 is the bound",
    )


def test_four_models_do_not_fit(directory: Path) -> None:
    done = in_a_process(directory, {"models": 4})
    assert done.returncode != 0 and "memory" in done.stderr, done.stderr


def main(root: Path, what: dict[str, Any]) -> None:
    """Measure under the limit, and print the most bytes that were resident."""
    config = read_config(root / "teacher")
    limit = int(MOST_RESIDENT * 4 * subnet_params(config, full_subnet(config))) + ROOM
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    if models := what.get("models"):
        held = [load_model(root / "teacher", torch.device("cpu"), torch.float32) for _ in range(models)]
        raise SystemExit(len(held) != models)
    subnet = replace(full_subnet(config), hidden=1024) if what.get("cut") else None
    teacher = str(root / what["teacher"]) if "teacher" in what else None
    reader = Reader(
        model=str(root / what["model"]),
        dtype="float32",
        teacher=teacher,
        subnet=subnet,
        random_seed=what.get("random_seed"),
    )
    shared_loss(reader, heldout_batches(root / HELDOUT_FILE, TEXT, config.vocab_size))
    sys.stdout.write(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
