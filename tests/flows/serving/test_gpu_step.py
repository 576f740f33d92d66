"""Laws of the flow that does one step for another run."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from uuid import uuid4

import pytest
from prefect.states import Crashed

from flows.serving import guard
from flows.serving.gpu_step import gpu_step
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
