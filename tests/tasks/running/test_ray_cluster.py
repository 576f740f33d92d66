"""Laws of a Ray cluster: three hosts that share nothing but servers make one family, and no host makes a step again."""

import json
import re
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest
import yaml
from hosts import GATEWAY, RUN_SECONDS, Host, reachable, three_hosts, why_not
from micro import ELASTIC, write_micro
from prefect.client.orchestration import SyncPrefectClient

from flows.serving.servers import MlflowServer, ObjectStore, PrefectServer
from tasks import distill, evaluate, rank, teacher  # noqa: F401 - each adds its steps to ON_GPU
from tasks.artifacts import ensure_bucket
from tasks.artifacts.documents import documents, read_document
from tasks.running.loopback import free_ports
from tasks.running.ray_steps import GONE_SECONDS
from tasks.running.steps import ON_GPU
from tasks.running.workspace import shared_workspace
from tasks.settings import BUCKET, ENDPOINT_S3, HOME, PREFECT_API, TRACKING_URI, WORKSPACE, Settings

pytestmark = pytest.mark.services

# The gradient of a batch is a sum over its rows, in another order where they lie in three processes. Adam divides it by
# its own size, so that float32's rounding, 1e-7, grows over the steps, but by far less than this.
SUM_ORDER = 1e-5
STEPS = 12
NODES = r"distil stage2: node \d of 3 is (\w+)"
TRAINER = "-u -m elastic_core.training.job"
IN_ONE = "stages.0.micro_batch_size=3"  # three micro-steps a step, which two hosts cannot divide

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@dataclass(frozen=True)
class Cluster:
    """Three hosts of one processor each, and what each has in its environment."""

    hosts: list[Host]
    environment: Mapping[str, str]

    def elastic(self, host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
        return host.run([*ELASTIC, *arguments], self.environment)

    def begin(self, number: int, log: Path, *arguments: str) -> subprocess.Popen[str]:
        """The command on one of the hosts, while it runs; what it says is in a file."""
        with log.open("w") as file:
            return self.hosts[number].start([*ELASTIC, *arguments], self.environment, stdout=file, stderr=file)

    def said(self, since: int = 0) -> list[str]:
        """The lines of log of all runs, but for the first ones."""
        found: list[str] = []
        with SyncPrefectClient(api=self.environment[PREFECT_API]) as client:
            while page := client.read_logs(offset=len(found)):
                found += [line.message for line in page]
        return found[since:]

    def documents(self, under: str) -> list[bytes]:
        """What the workspace has under a name, but for files by digest."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            shared = shared_workspace()
            assert shared is not None
            keys = sorted(key for key in documents(shared.store, f"{shared.root}{under}") if "/files/" not in key)
            return [read_document(shared.store, key) or b"" for key in keys]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    pytest.importorskip("ray")
    if reason := why_not():
        pytest.skip(reason)
    with ExitStack() as stack:
        hosts = stack.enter_context(three_hosts())
        environment = {**services(stack, tmp_path_factory.mktemp("servers")), **of_a_host(hosts[0])}
        address = f"{hosts[0].address}:6379"
        begin(hosts[0], environment, "--head", "--port=6379", "--num-cpus=1", "--include-dashboard=false")
        for host in hosts[1:]:
            begin(host, environment, f"--address={address}", "--num-cpus=1")
        yield Cluster(hosts, {**environment, "RAY_ADDRESS": address})


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
    """The micro recipe with little to measure, and one stage, whose steps three processes and one can divide alike.

    It learns cross-entropy too, so that every budget has a gradient far from zero.
    """
    file = write_micro(directory)
    recipe = yaml.safe_load(file.read_text())
    divided = {"batch_size": 9, "micro_batch_size": 1, "budget_rows": 3, "shares": "fixed"}
    recipe["stages"] = [{**recipe["stages"][1], **divided, "steps": STEPS, "checkpoint_every": 5}]
    recipe["stages"][0]["optimizer"] = {"learning_rate": 3e-4, "warmup_steps": 2}
    recipe["distillation"] = {"ce_weight": 1.0}
    recipe["teacher"]["pretrain"]["steps"] = 4
    recipe["shapes"]["measurements"] = 4
    recipe["evaluation"] |= {"heldout_tokens": 128, "max_problems": 1, "max_new_tokens": 1}
    file.write_text(yaml.safe_dump(recipe))


def bring_recipe(host: Host, source: Path) -> Path:
    """The recipe and its files on one host, where no other sees them."""
    place = host.state / "recipe"
    assert host.run(["cp", "--recursive", str(source), str(place)], {}).returncode == 0
    return place / "micro.yaml"


def made(code: int | None, said: str) -> dict[str, Counter[str]]:
    """How often each step for a GPU was made, and how often taken from the cache, in a run that ended well."""
    assert code == 0, said
    steps: dict[str, Counter[str]] = {}
    for name, how in re.findall(r"^(\w+) +(cached|[\d.]+ s)$", said, flags=re.MULTILINE):
        if name in ON_GPU:
            steps.setdefault(name, Counter())["cached" if how == "cached" else "made"] += 1
    return steps


def wait_until(holds: Callable[[], bool], runs: "subprocess.Popen[str]", log: Path) -> None:
    """Wait for what comes while a process runs, whose lines are in a file."""
    end = time.monotonic() + RUN_SECONDS
    while not holds():
        assert runs.poll() is None and time.monotonic() < end, log.read_text()
        time.sleep(1)


def found(pattern: str, lines: list[str]) -> list[str]:
    return [match[1] for line in lines if (match := re.fullmatch(pattern, line))]


def losses(cluster: Cluster) -> list[list[float]]:
    """Of each stage whose result the workspace has, the loss of every step."""
    stages = []
    for record in cluster.documents("results/distill-"):
        (rows,) = cluster.documents(f"blobs/{json.loads(record)['result']['metrics_sha256']}")
        by_step = {row["step"]: row["loss"] for row in map(json.loads, rows.splitlines())}
        stages.append([by_step[step] for step in range(STEPS)])
    return stages


def test_a_run_that_begins_again_elsewhere_joins_the_training_under_way_and_ctrl_c_ends_it_on_all_hosts(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_small(tmp_path)
    recipes = [bring_recipe(host, tmp_path) for host in cluster.hosts]
    endless = ["stages.0.steps=1000000", "stages.0.checkpoint_every=1000000"]

    def trainers() -> set[int]:
        return {process for host in cluster.hosts for process in host.processes(TRAINER)}

    before, after = tmp_path / "before.log", tmp_path / "after.log"
    killed = cluster.begin(0, before, "run", str(recipes[0]), *endless)
    wait_until(lambda: len(found(NODES, cluster.said())) == 2 and len(trainers()) == 3, killed, before)
    training = trainers()
    killed.kill()
    killed.wait()
    again = cluster.begin(1, after, "run", str(recipes[1]), *endless)
    wait_until(lambda: "distil stage2 is under way already" in after.read_text(), again, after)
    time.sleep(GONE_SECONDS)  # until then the killed one counts as waiting
    assert trainers() == training
    again.send_signal(signal.SIGINT)
    assert again.wait(RUN_SECONDS) != 0 and "Traceback" not in after.read_text(), after.read_text()
    assert not trainers()
    assert len(found(r"distil stage2 is done on (\w+)", cluster.said())) == 1
    for host in cluster.hosts:
        assert host.run(["rm", "--recursive", f"{host.state}/recipe"], {}).returncode == 0


def test_hosts_that_share_no_disk_train_together_and_any_of_them_has_what_a_lost_one_made(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_small(tmp_path)
    asking = cluster.hosts[0]
    recipe, *_ = [bring_recipe(host, tmp_path) for host in cluster.hosts]
    before = len(cluster.said())
    run = cluster.elastic(asking, "run", str(recipe))
    steps = made(run.returncode, run.stderr)
    assert {"pretrain_teacher", "rank_importance", "distill", "evaluate"} <= steps.keys()
    said = cluster.said(before)
    places = found(r".+ is done on (\w+)", said)
    assert len(places) == sum(how["made"] for how in steps.values()), "each once"
    (first,), others = found(r"distil stage2 is done on (\w+)", said), found(NODES, said)
    assert sorted([first, *others]) == [host.name for host in cluster.hosts]

    lost, left = cluster.hosts[1:]
    lost.kill()
    alone = cluster.elastic(asking, "run", str(recipe), IN_ONE)
    later = made(alone.returncode, alone.stderr)
    assert later["rank_importance"] == Counter(cached=1) and later["distill"] == Counter(made=1)
    assert found(NODES, cluster.said(before)) == others, "one host alone"
    together, in_one = losses(cluster)
    assert together == pytest.approx(in_one, abs=SUM_ORDER)

    again = cluster.elastic(left, "run", str(recipe), IN_ONE)
    assert all(how.keys() == {"cached"} for how in made(again.returncode, again.stderr).values())
