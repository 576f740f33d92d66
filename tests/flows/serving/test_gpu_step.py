"""Laws of the flow that does one step for another run."""

import importlib
import pkgutil
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.states import Crashed

import tasks
from elastic_core.schema import build, to_dict
from elastic_core.subnet import Subnet
from flows.elastify import pipeline
from flows.serving import gpu_step as worker
from flows.serving import guard
from flows.serving.gpu_step import gpu_step
from tasks import race
from tasks.running.recipe_run import ways
from tasks.running.steps import ON_GPU
from tasks.settings import ServiceError


class Crashes:
    """A server on which every earlier run of any deployment has just crashed."""

    def read_flow_runs(self, *, limit: int, **filters: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(state=Crashed()) for _ in range(limit)]


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def client(**options: object) -> Iterator[Crashes]:
        yield Crashes()

    this = SimpleNamespace(flow_run=SimpleNamespace(id=uuid4(), deployment_id=uuid4()))
    monkeypatch.setattr(guard, "get_client", client)
    monkeypatch.setattr(guard, "FlowRunContext", SimpleNamespace(get=lambda: this))


def begin() -> None:
    """Begin a step that does not exist, which is refused once it has begun."""
    with pytest.raises(ValueError, match="step 'none' is not one of"):
        gpu_step.fn(step="none", inputs={}, device="workers of gpu-step/gpu", runs={})


def test_steps_of_one_run_that_crash_keep_no_step_of_another_from_being_begun(crashes: None) -> None:
    with pytest.raises(ServiceError, match="the last 5 runs crashed"):
        guard.guard_run()
    begin()


def test_a_step_ends_with_the_worker_that_does_it(crashes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[bool] = []
    monkeypatch.setattr(guard, "die_with_parent", lambda: bound.append(True))
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(uuid4()))
    begin()
    assert bound == [True]


def test_a_worker_knows_every_step_that_needs_a_gpu() -> None:
    modules = [importlib.import_module(f"tasks.{found.name}") for found in pkgutil.iter_modules(tasks.__path__)]
    needed = {step.fn.__module__ for step in ON_GPU.values()} & {module.__name__ for module in modules}
    assert {"tasks.race", "tasks.distill"} <= needed
    assert needed <= {module.__name__ for module in vars(worker).values() if module in modules}


def test_a_lap_of_the_race_reaches_a_worker_as_it_was_sent() -> None:
    subnet = Subnet(hidden=8, ffn=(16,), mamba_heads=(2,), mamba_head_dim=4, attention_heads=(2,), layers=(0, 1))
    sent = {"subnets": {"s": subnet}, "start": "cut", "weights": ((1.0, 2.0), None)}
    hints = typing.get_type_hints(race.run_lap.fn)
    assert {name: build(hints[name], value, name) for name, value in to_dict(sent).items()} == sent


def test_a_step_of_the_race_is_none_of_the_pipelines_whose_change_makes_a_family_anew() -> None:
    of_the_pipeline = ways(pipeline)
    ours = {name for name, step in ON_GPU.items() if step.fn.__module__.startswith("tasks.")}  # other tests make steps
    assert ours - of_the_pipeline.keys() == {"run_lap"}
    assert {"prepare_data", "slice_budget", "pipeline"} <= of_the_pipeline.keys()
