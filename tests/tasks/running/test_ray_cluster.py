"""Laws of a Ray cluster: three hosts that share nothing but servers make one family, and no host makes a step again."""

import re
import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
import yaml
from hosts import GATEWAY, Host, reachable, three_hosts, why_not
from micro import ELASTIC, write_micro
from prefect.client.orchestration import SyncPrefectClient

from flows.serving.servers import MlflowServer, ObjectStore, PrefectServer
from tasks import distill, evaluate, rank, teacher  # noqa: F401 - each adds its steps to ON_GPU
from tasks.artifacts import ensure_bucket
from tasks.running.loopback import free_ports
from tasks.running.steps import ON_GPU
from tasks.settings import BUCKET, ENDPOINT_S3, HOME, PREFECT_API, TRACKING_URI, WORKSPACE, Settings

pytestmark = pytest.mark.services

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Cluster:
    """Three hosts, of which h1 does no steps and h3 is not yet a part, and what each has in its environment."""

    hosts: list[Host]
    environment: Mapping[str, str]

    def elastic(self, host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
        return host.run([*ELASTIC, *arguments], self.environment)

    def join(self, host: Host) -> None:
        begin(host, self.environment, f"--address={self.environment['RAY_ADDRESS']}", "--num-cpus=1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        hosts = stack.enter_context(three_hosts())
        environment = {**services(stack, tmp_path_factory.mktemp("servers")), **of_a_host(hosts[0])}
        address = f"{hosts[0].address}:6379"
        begin(hosts[0], environment, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        made = Cluster(hosts, {**environment, "RAY_ADDRESS": address})
        made.join(hosts[1])
        yield made


def services(stack: ExitStack, directory: Path) -> dict[str, str]:
    """The servers that all hosts reach, and what a client of theirs has to know."""
    store = ObjectStore(directory / "s3", directory)
    stack.callback(store.stop)
    store.start()
    known = store.environment()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**known, TRACKING_URI: "sqlite://"}.items():
            patch.setenv(name, value)
        ensure_bucket(Settings.from_environment())
        prefect_port, mlflow_port = free_ports(2)
        database = f"sqlite:///{directory}/mlflow.db"
        mlflow = MlflowServer(directory, directory, mlflow_port, database=database, bucket=known[BUCKET])
        prefect = PrefectServer(directory / "prefect", directory, prefect_port)
        for server in (prefect, mlflow):
            stack.callback(server.stop)
            server.start()
        for server in (prefect, mlflow):
            server.wait()
    for port in (int(store.url.rpartition(":")[2]), prefect_port, mlflow_port):
        stack.enter_context(reachable(port))
    known = {name: value.replace("127.0.0.1", GATEWAY) for name, value in known.items()}
    return {
        **known,
        ENDPOINT_S3: known[ENDPOINT_S3],
        PREFECT_API: f"http://{GATEWAY}:{prefect_port}/api",
        TRACKING_URI: f"http://{GATEWAY}:{mlflow_port}",
        WORKSPACE: f"s3://{known[BUCKET]}/workspace",
    }


def of_a_host(host: Host) -> dict[str, str]:
    return {
        HOME: str(host.state / "home"),
        "PREFECT_HOME": str(host.state / "prefect"),
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # else each host looks for all fonts first
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # else 15: other tests would come first
    }


def begin(host: Host, environment: Mapping[str, str], *options: str) -> None:
    """Make a host part of the cluster."""
    own = [f"--node-ip-address={host.address}", f"--temp-dir={host.state}/ray", "--object-store-memory=80000000"]
    done = host.run([*RAY, "start", *own, *options], environment)
    assert done.returncode == 0, done.stdout + done.stderr


def write_small(directory: Path) -> None:
    """The micro recipe with one stage and little to measure: what it makes is of no interest."""
    file = write_micro(directory)
    recipe = yaml.safe_load(file.read_text())
    recipe["stages"] = [{**recipe["stages"][1], "steps": 4}]
    recipe["teacher"]["pretrain"]["steps"] = 4
    recipe["shapes"]["measurements"] = 4
    recipe["evaluation"] |= {"heldout_tokens": 128, "max_problems": 1, "max_new_tokens": 1}
    file.write_text(yaml.safe_dump(recipe))


def bring_recipe(host: Host, source: Path) -> Path:
    """The recipe and its files on one host, where no other sees them."""
    place = host.state / "recipe"
    assert host.run(["cp", "--recursive", str(source), str(place)], {}).returncode == 0
    return place / "micro.yaml"


def made(done: subprocess.CompletedProcess[str]) -> dict[str, Counter[str]]:
    """How often each step for a GPU was made, and how often taken from the cache, in a run that ended well."""
    assert done.returncode == 0, done.stderr
    steps: dict[str, Counter[str]] = {}
    for name, how in re.findall(r"^(\w+) +(cached|[\d.]+ s)$", done.stderr, flags=re.MULTILINE):
        if name in ON_GPU:
            steps.setdefault(name, Counter())["cached" if how == "cached" else "made"] += 1
    return steps


def places(cluster: Cluster) -> list[str]:
    """The hosts on which steps were done, by the lines of log of all runs; one for each step."""
    said: list[str] = []
    with SyncPrefectClient(api=cluster.environment[PREFECT_API]) as client:
        while page := client.read_logs(offset=len(said)):
            said += [line.message for line in page]
    return [found[1] for line in said if (found := re.fullmatch(r".+ is done on (\w+)", line))]


def test_hosts_that_share_no_disk_make_one_family_and_go_on_with_what_a_lost_host_made(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_small(tmp_path)
    asking, first, second = cluster.hosts
    recipe, *_ = [bring_recipe(host, tmp_path) for host in cluster.hosts]
    steps = made(cluster.elastic(asking, "run", str(recipe)))
    assert {"pretrain_teacher", "rank_importance", "distill", "evaluate"} <= steps.keys()
    assert places(cluster) == [first.name] * sum(how["made"] for how in steps.values()), "each once"

    first.kill()
    cluster.join(second)
    later = made(cluster.elastic(asking, "run", str(recipe), "stages.0.steps=5"))
    assert later["rank_importance"] == Counter(cached=1) and later["distill"] == Counter(made=1)
    assert places(cluster)[-2:] == [second.name] * 2, "the stage and the evaluation, from what the lost host made"

    again = made(cluster.elastic(second, "run", str(recipe), "stages.0.steps=5"))
    assert all(again[name].keys() == {"cached"} for name in steps)
