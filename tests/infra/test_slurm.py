"""infra/slurm: the allocation becomes a cluster that only its job can use, and its first node starts the run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "infra/slurm/elastic.sbatch"
WORKSPACE = {"ELASTIC_WORKSPACE": "s3://models/workspace"}


@pytest.fixture
def submitted(tmp_path: Path):
    """Runs the job's script as Slurm does on the first of two nodes; `srun` only says what it was given."""
    programs = {
        "scontrol": '[ "$*" = "show hostnames gpu[3-4]" ] && printf "gpu3\\ngpu4\\n"',
        "srun": 'printf "%s\\n" "$@"; env | grep ^RAY_ >&2',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
        of_slurm = {"SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_JOB_NUM_NODES": "2", "USER": "ada"}
        known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **of_slurm, **environment}
        return subprocess.run(["bash", FILE, *arguments], env=known, capture_output=True, text=True)

    return run


def test_every_node_joins_and_the_first_starts_the_run(submitted) -> None:
    done = submitted(WORKSPACE, "nano-12b", "stages.1.steps=3")
    assert done.returncode == 0, done.stderr
    ray, _, entry = done.stdout.partition("--\n")
    assert ray.split() == [
        *("--kill-on-bad-exit=0", "ray", "symmetric-run", "--address", "gpu3:6379"),
        *("--min-nodes", "2"),
    ]
    assert entry.split() == ["env", "RAY_ADDRESS=gpu3:6379", "elastic", "run", "nano-12b", "stages.1.steps=3"]


def test_each_job_has_a_token_of_its_own_that_no_argument_shows(submitted) -> None:
    jobs = [submitted(WORKSPACE) for _ in range(2)]
    tokens = {token for job in jobs for token in re.findall(r"^RAY_AUTH_TOKEN=([0-9a-f]{64})$", job.stderr, re.M)}
    assert len(tokens) == 2
    assert all("RAY_AUTH_MODE=token\n" in job.stderr for job in jobs)
    assert not any(token in job.stdout for token in tokens for job in jobs)


def test_a_job_without_a_workspace_is_refused_before_ray_starts(submitted) -> None:
    done = submitted({}, "nano-12b")
    assert done.returncode != 0 and not done.stdout
    assert "ELASTIC_WORKSPACE: is the s3:// prefix" in done.stderr


def test_ray_has_the_command_and_its_options() -> None:
    pytest.importorskip("ray")
    asked = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "symmetric-run", "--help"], capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    assert {"--address", "--min-nodes"} <= set(re.findall(r"--[a-z-]+", asked.stdout))
