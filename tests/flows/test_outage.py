"""What starts while Prefect's server is away waits for it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.serving.servers import PrefectServer
from tasks.running.gpu_pool import AWAY, start_run
from tasks.running.loopback import free_ports
from tasks.settings import ServiceError


@contextmanager
def running(server: PrefectServer) -> Iterator[SyncPrefectClient]:
    server.start()
    try:
        server.wait()
        with get_client(sync_client=True) as client:
            yield client
    finally:
        server.stop()


@pytest.mark.services
@pytest.mark.slow
def test_a_run_that_starts_while_the_server_is_away_says_so_and_is_started_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = PrefectServer(tmp_path / "prefect", tmp_path / "logs", free_ports(1)[0])
    arguments = ("gpu-step/default", "distill stage1", {"step": "distill"}, "0" * 64)
    with temporary_settings({PREFECT_API_URL: f"{server.url}/api"}), ThreadPoolExecutor(1) as pool:
        with running(server) as client:
            client.create_deployment(client.create_flow_from_name("gpu-step"), "default")
        starting = pool.submit(copy_context().run, start_run, *arguments)
        time.sleep(3.0)
        assert not starting.done()
        assert caplog.messages.count(f"distill stage1: {AWAY}") == 1
        with running(server) as client:
            started, joined = starting.result(60.0)
            assert not joined
            assert [(run.id, run.name, run.parameters) for run in client.read_flow_runs()] == [
                (started.id, *arguments[1:3])
            ]
            with pytest.raises(ServiceError, match="no deployment 'gpu-step/renamed'"):
                start_run("gpu-step/renamed", *arguments[1:])
