"""Laws of what runs on the gpu pool."""

from pathlib import Path

import yaml

from flows.commands.recipes import load_recipe
from flows.serving.deployments import deployments
from tasks.running.gpu_pool import DEPLOYMENT_VARIABLE

ROOT = Path(__file__).parents[3]


def test_a_run_on_the_gpu_pool_asks_no_deployment_whatever_its_workers_environment_names() -> None:
    applied = {
        one.entrypoint: one.environment.get(DEPLOYMENT_VARIABLE)
        for one in deployments(load_recipe(ROOT / "flows/recipes/tiny.yaml"))
        if one.pool == "gpu"
    }
    written = {
        one["entrypoint"]: one["work_pool"]["job_variables"]["env"].get(DEPLOYMENT_VARIABLE)
        for one in yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]
        if one["work_pool"]["name"] == "gpu"
    }
    assert applied == written and len(applied) == 2
    assert set(applied.values()) == {""}
