"""Laws of steps that need a GPU: where they are done, and how faults of Prefect's server end or delay them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Completed, Running

from elastic_core.files.locks import is_held
from tasks.running import gpu, steps
from tasks.settings import HOME, ServiceError


@pytest.fixture
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
    token = gpu.device_of_run.set("workers of gpu-step/gpu")
    try:
        with steps._turn(learn_on_gpu, {"seed": 1}) as done_elsewhere:
            assert not done_elsewhere
        assert steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key == wanted
    finally:
        gpu.device_of_run.reset(token)
    assert not asked


def test_workers_that_elastic_up_started_share_results_with_runs_of_their_machine(monkeypatch, asked) -> None:
    by_name = steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key
    monkeypatch.setenv(gpu.DEVICE_VARIABLE, gpu.this_device())
    on_workers = steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key
    monkeypatch.delenv(gpu.DEPLOYMENT_VARIABLE)
    assert steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key == on_workers != by_name


def test_a_step_inside_a_step_that_has_the_devices_has_them_too(tmp_path: Path) -> None:
    with gpu.device_to_oneself(tmp_path), gpu.device_to_oneself(tmp_path):
        (lock,) = (tmp_path / "locks").iterdir()
        assert is_held(lock)
    assert not is_held(lock)
    with gpu.device_to_oneself(tmp_path):
        assert is_held(lock), "once more, for the next step"


def answer(status: int) -> PrefectHTTPStatusError:
    request = httpx.Request("GET", "http://prefect/api/flow_runs")
    response = httpx.Response(status, request=request, text="an answer of the server")
    return PrefectHTTPStatusError(f"answer {status}", request=request, response=response)


def missing() -> ObjectNotFound:
    """What Prefect's client makes of a 404."""
    error = ObjectNotFound(http_exc=answer(404))
    error.__cause__ = error.http_exc
    return error


class Server:
    """A stand-in for Prefect's: it gives the `answers` in turn, those that are errors by raising them."""

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def _next(self, *asked: object, **named: object) -> Any:
        found = self.answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    read_deployment_by_name = read_flow_runs = read_flow_run = _next


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()

    @contextmanager
    def client(**options: object) -> Iterator[Server]:
        yield made

    monkeypatch.setattr(gpu, "get_client", client)
    monkeypatch.setattr(gpu, "POLL_SECONDS", 0.0)
    return made


def entry(state: Any) -> SimpleNamespace:
    return SimpleNamespace(id=uuid4(), state=state, name="owl")


def begin() -> Any:
    return gpu.start_run("gpu-step/gpu", "distill stage1", {}, "0" * 64)


def wait(caller: UUID | None = None) -> Any:
    return gpu._final_state(entry(None), "distill stage1", caller)


PASSING = [answer(500), answer(503), answer(429), httpx.ConnectError("refused"), httpx.ReadTimeout("too slow")]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: str(fault))
def test_a_fault_of_the_server_that_passes_is_waited_out_and_said_once(
    fault: Exception, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    goes_on, done = entry(Running()), entry(Completed())
    server.answers = [fault, fault, SimpleNamespace(id=uuid4()), fault, SimpleNamespace(id=uuid4()), [goes_on]]
    assert begin() == (goes_on, True)
    server.answers = [fault, fault, goes_on, done]
    assert wait() is done.state
    assert caplog.messages == [f"distill stage1: {gpu.AWAY}"] * 2


@pytest.mark.parametrize("ask", [begin, wait])
def test_a_server_that_stays_away_ends_the_run_in_the_end(
    ask: Callable[[], Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LONGEST_OUTAGE_SECONDS", -1.0)
    server.answers = [answer(503)]
    with pytest.raises(ServiceError, match="Prefect's server stays away: answer 503") as error:
        ask()
    assert error.value.transient


@pytest.mark.parametrize("ask", [begin, wait])
def test_a_refusal_of_the_server_is_not_waited_out(ask: Callable[[], Any], server: Server) -> None:
    server.answers = [answer(403)]
    with pytest.raises(PrefectHTTPStatusError, match="answer 403"):
        ask()


def test_a_deployment_that_is_missing_is_named_at_once(server: Server) -> None:
    server.answers = [missing()]
    with pytest.raises(ServiceError, match=r"no deployment 'gpu-step/gpu'.*ELASTIC_GPU_DEPLOYMENT") as error:
        begin()
    assert not error.value.transient


def test_a_run_that_somebody_deleted_is_named_at_once(server: Server) -> None:
    server.answers = [missing()]
    with pytest.raises(
        ServiceError, match=r"run owl, which does distill stage1, was deleted.*start this run again"
    ) as error:
        wait()
    assert not error.value.transient
    server.answers = [entry(Running()), missing()]
    with pytest.raises(ServiceError, match=r"this run was deleted.*start a new one"):
        wait(uuid4())
