"""Laws of steps that need a GPU: where they are done."""

from pathlib import Path

import pytest

from tasks.running import gpu, steps
from tasks.settings import HOME, ServiceError


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The deployments that were asked to do a step; each says that it failed."""
    found: list[str] = []

    def refuse(deployment: str, *arguments: object) -> None:
        found.append(deployment)
        raise ServiceError("the step failed on the worker")

    monkeypatch.setenv(HOME, str(tmp_path))
    monkeypatch.setenv(gpu.DEPLOYMENT_VARIABLE, "gpu-step/gpu")
    monkeypatch.setattr(steps, "run_on_workers", refuse)
    monkeypatch.setattr(steps, "_known", lambda *arguments, **named: None)
    return found


@steps.step(on_gpu=True)
def learn_on_gpu(seed: int) -> int:
    return seed


def test_a_step_is_done_by_the_deployment_that_the_environment_names(asked: list[str]) -> None:
    with pytest.raises(ServiceError), steps._turn(learn_on_gpu, {"seed": 1}):
        pass
    assert asked == ["gpu-step/gpu"]


def test_a_step_that_is_done_for_another_run_is_done_here_under_the_key_that_the_other_looks_for(
    asked: list[str],
) -> None:
    wanted = steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key
    token = gpu.worker_of.set("gpu-step/gpu")
    try:
        with steps._turn(learn_on_gpu, {"seed": 1}) as done_elsewhere:
            assert not done_elsewhere
        assert steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key == wanted
    finally:
        gpu.worker_of.reset(token)
    assert not asked
