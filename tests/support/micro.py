"""A family small enough to make in a test: the whole pipeline on a model of a few thousand parameters."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

ELASTIC = [sys.executable, "-m", "flows.cli"]
LIMIT_SECONDS = 1800.0  # far beyond what anything takes, also on a loaded machine; a test that hangs should end

MICRO = {
    "family": "micro",
    "dtype": "float32",
    "teacher": {
        "pretrain": {
            "model": {
                "hybrid_override_pattern": "M-M*-",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "mamba_num_heads": 4,
                "mamba_head_dim": 8,
                "ssm_state_size": 8,
                "n_groups": 2,
                "vocab_size": 300,
                "chunk_size": 16,
            },
            "sequence_length": 32,
            "batch_size": 8,
            "steps": 10,
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
        }
    },
    "data": {"sources": [{"path": "stories.jsonl"}, {"path": "sums.jsonl"}], "heldout_fraction": 0.2},
    "axes": {
        "hidden": [32, 24, 16],
        "ffn": [64, 48, 32],
        "mamba_heads": [4, 2],
        "mamba_head_dim": [8, 4],
        "attention_heads": [4, 2],
        "depth": [5, 4],
    },
    "budgets": [{"name": "l"}, {"name": "m", "params": 28000}, {"name": "s", "params": 20000}],
    "importance": {"samples": 8, "sequence_length": 32, "batch_size": 4, "depth_samples": 4, "random_orders": 2},
    "shapes": {"samples": 4, "sequence_length": 32, "batch_size": 4, "measurements": 40},
    "router": {"hidden_size": 8},
    "stages": [
        {
            "name": "stage1",
            "sequence_length": 32,
            "batch_size": 6,
            "micro_batch_size": 2,
            "steps": 60,
            "budgets": {"l": 1, "m": 1, "s": 1},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
            "checkpoint_every": 3,
        },
        {
            "name": "stage2",
            "sequence_length": 64,
            "batch_size": 10,
            "micro_batch_size": 1,
            "steps": 24,
            "budgets": {"l": 0.5, "m": 0.3, "s": 0.2},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
            "router": {"mode": "frozen"},
            "checkpoint_every": 3,
        },
    ],
    "evaluation": {
        "heldout_tokens": 512,
        "sequence_length": 32,
        "batch_size": 4,
        "problems": "heldout-sums.jsonl",
        "max_problems": 4,
        "max_new_tokens": 3,
    },
}


@dataclass(frozen=True)
class Command:
    """The `elastic` command on a state directory of its own, with nothing configured in the environment but `extra`."""

    recipe: Path
    home: Path
    extra: Mapping[str, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MLFLOW_", "ELASTIC_", "PREFECT_"))}
        return kept | {"ELASTIC_HOME": str(self.home), "OMP_NUM_THREADS": "1"} | dict(self.extra)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*ELASTIC, *arguments],
            env=self.environment(),
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def run(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        return self("run", str(self.recipe), *overrides)

    def processes(self, module: str) -> list[psutil.Process]:
        """Those that run a Python module on a file in this state directory."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = process.cmdline()
                if "-m" in line and line[line.index("-m") + 1] == module and line[-1].startswith(str(self.home)):
                    found.append(process)
        return found

    def written(self) -> set[Path]:
        """The directories that steps have written."""
        return set((self.home / "workspace").glob("*")) if self.home.exists() else set()


@dataclass(frozen=True)
class Run:
    """A run that ended well: what it said, and the directories that it wrote, by the step's name before the digits."""

    stdout: str
    stderr: str
    directories: frozenset[Path]

    def directory(self, name: str) -> Path:
        (found,) = (path for path in self.directories if path.name.rpartition("-")[0] == name)
        return found

    @property
    def family(self) -> Path:
        return self.directory("stage2") / "family"


def completed(command: Command, *overrides: str) -> Run:
    """Run to a good end."""
    before = command.written()
    done = command.run(*overrides)
    assert done.returncode == 0, done.stderr
    return Run(stdout=done.stdout, stderr=done.stderr, directories=frozenset(command.written() - before))


def write_micro(directory: Path) -> Path:
    """The recipe and its data; the path of the recipe."""
    words = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "it", "saw", "red", "blue", "bird"]
    choose = random.Random(0)
    stories = [" ".join(choose.choices(words, k=60)) for _ in range(120)]
    (directory / "stories.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))

    def problem(a: int, b: int) -> str:
        turns = [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]
        return json.dumps({"messages": turns, "task": "sum"}) + "\n"

    sums = [problem(a, b) for a in range(10) for b in range(10)]
    (directory / "sums.jsonl").write_text("".join(sums[:90]))
    (directory / "heldout-sums.jsonl").write_text("".join(sums[90:]))
    asked = [json.dumps({"question": f"9+{b}", "answer": str(9 + b)}) + "\n" for b in range(10)]
    (directory / "questions.jsonl").write_text("".join(asked))
    recipe = directory / "micro.yaml"
    recipe.write_text(yaml.safe_dump(MICRO))
    return recipe
