"""Laws of steps on the gpu pool: how faults of Prefect's server end or delay them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.states import Completed, Running

from tasks.running import gpu_pool
from tasks.settings import ServiceError


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

    monkeypatch.setattr(gpu_pool, "get_client", client)
    monkeypatch.setattr(gpu_pool, "POLL_SECONDS", 0.0)
    return made


def entry(state: Any) -> SimpleNamespace:
    return SimpleNamespace(id=uuid4(), state=state, name="owl")


def begin() -> Any:
    return gpu_pool.start_run("gpu-step/gpu", "distill stage1", {}, "0" * 64)


def wait(caller: UUID | None = None) -> Any:
    return gpu_pool._final_state(entry(None), "distill stage1", caller)


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
    assert caplog.messages == [f"distill stage1: {gpu_pool.AWAY}"] * 2


@pytest.mark.parametrize("ask", [begin, wait])
def test_a_server_that_stays_away_ends_the_run_in_the_end(
    ask: Callable[[], Any], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_pool, "LONGEST_OUTAGE_SECONDS", -1.0)
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
