"""One Prefect server for all tests of running steps."""

from collections.abc import Iterator

import pytest

from flows.serving.servers import PrefectServer
from tasks.running.loopback import free_ports


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("prefect")
    server = PrefectServer(home / "prefect", home / "logs", free_ports(1)[0])
    server.start()
    try:
        server.wait()
        yield f"{server.url}/api"
    finally:
        server.stop()
