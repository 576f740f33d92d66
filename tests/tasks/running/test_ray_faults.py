"""Laws of lost hosts: whichever dies, in whichever step, the run ends with what an undisturbed one makes, once."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml
from hosts import Host
from laws import BUDGETS, Outcome, watching
from micro import LIMIT_SECONDS, write_micro
from ray_hosts import Cluster, bring_recipe, found, ray_cluster, wait_until

pytestmark = pytest.mark.faults

# A stage that goes on with one host of two sums a batch's gradient in another order: float32's rounding, 1e-7, which
# Adam divides by its own size.
SUM_ORDER = 1e-5
STEPS = 24
SOME = 4  # steps, after which a trainer is killed
# Steps that a cluster does, by their titles, and which of the hosts that do it dies.
FIRST, OTHER = "the first", "another"
LOST = {"rank importance": FIRST, "distil stage1": FIRST, "distil stage2": OTHER, "evaluate": FIRST}
# Steps of the host that asks, and what it has when it does them.
KILLED = {"prepare_data": "home/workspace/tokenizer-*", "register": "home/workspace/report-*"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The first host has Ray's head and asks; the others do the steps."""
    with ray_cluster(tmp_path_factory.mktemp("servers"), (0, 1, 1)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro recipe, with stages that two hosts and one can divide alike, long enough to be killed in."""
    file = write_micro(tmp_path_factory.mktemp("recipe"))
    recipe = yaml.safe_load(file.read_text())
    divided = {"batch_size": 36, "micro_batch_size": 1, "budget_rows": 2, "shares": "fixed", "steps": STEPS}
    slow = {"optimizer": {"learning_rate": 3e-4, "warmup_steps": 2}, "router": {"mode": "frozen"}}
    recipe["stages"] = [{**stage, **divided, **slow, "checkpoint_every": 2} for stage in recipe["stages"]]
    recipe["distillation"] = {"ce_weight": 1.0}  # every budget has a gradient far from zero
    recipe["teacher"]["pretrain"]["steps"] = 4
    recipe["shapes"]["measurements"] = 4
    recipe["evaluation"] |= {"max_problems": 1, "max_new_tokens": 1}
    file.write_text(yaml.safe_dump(recipe))
    return file.parent


@pytest.fixture(scope="module")
def clean(cluster: Cluster, recipe: Path) -> Outcome:
    """What a run makes to which nothing happens."""
    files = [bring_recipe(host, recipe) for host in cluster.hosts]
    done = cluster.elastic(cluster.hosts[0], "run", str(files[0]), "family=clean")
    assert done.returncode == 0, done.stderr
    with cluster.place() as place:
        return place.outcome("clean")


def test_each_host_that_works_is_lost_and_the_run_ends_without_a_hand(
    cluster: Cluster, recipe: Path, clean: Outcome, tmp_path: Path
) -> None:
    cluster.forget()
    files = [bring_recipe(host, recipe) for host in cluster.hosts]
    since, log = len(cluster.said()), tmp_path / "run.log"
    with cluster.place() as place, watching(place):
        run = cluster.begin(0, log, "run", str(files[0]), "family=lost")
        for title, which in LOST.items():
            first, other = wait_until(lambda title=title: at_work(cluster, title, since), run, log)
            lost = first if which is FIRST else other
            lost.lose()
            cluster.join(lost)
            bring_recipe(lost, recipe)
        assert run.wait(LIMIT_SECONDS) == 0, log.read_text()
        outcome = place.outcome("lost")
    for title in LOST:
        assert len(found(rf"{title} is done on (\w+)", cluster.said(since))) > 1, f"{title} was not begun again"
    assert outcome.files.keys() == clean.files.keys()
    assert by_point(outcome.curves) == pytest.approx(by_point(clean.curves), abs=SUM_ORDER)
    assert versions(cluster, "lost") == {f"lost-{name}": 1 for name in BUDGETS}


def test_the_host_that_asks_dies_with_all_servers_and_a_run_begun_again_goes_on(
    cluster: Cluster, recipe: Path, clean: Outcome, tmp_path: Path
) -> None:
    cluster.forget()
    asking, log = cluster.hosts[0], tmp_path / "run.log"
    files = [bring_recipe(host, recipe) for host in cluster.hosts]
    with cluster.place() as place, watching(place):
        for sign in KILLED.values():
            run = cluster.begin(0, log, "run", str(files[0]), "family=killed")
            wait_until(lambda sign=sign: asking.glob(sign), run, log)
            asking.kill()
            cluster.servers.kill()
            run.wait()
            cluster.servers.start_again()
            # All hosts end before one joins: Ray begins no head where it sees a process of a cluster at that address.
            for host in cluster.hosts:
                host.kill()
            for host in cluster.hosts:
                cluster.join(host)
        done = cluster.elastic(asking, "run", str(files[0]), "family=killed")
        assert done.returncode == 0, done.stderr
        outcome = place.outcome("killed")
    assert (outcome.weights, outcome.curves) == (clean.weights, clean.curves)
    assert versions(cluster, "killed") == {f"killed-{name}": 1 for name in BUDGETS}


def at_work(cluster: Cluster, title: str, since: int) -> list[Host]:
    """The hosts that do a step, that which has it first; none before it is well begun."""
    said = cluster.said(since)
    names = found(rf"{title} is done on (\w+)", said)[-1:]
    if not title.startswith("distil"):
        return [host for host in cluster.hosts if host.name in names] * 2
    names += found(rf"{title}: node \d of \d is (\w+)", said)[-1:]
    hosts = [host for name in names for host in cluster.hosts if host.name == name]
    logs = [log for host in hosts[:1] for log in host.glob(f"home/workspace/{title.split()[1]}-*/metrics.jsonl")]
    return hosts if len(hosts) == 2 and any(log.read_text().count("\n") > SOME for log in logs) else []


def versions(cluster: Cluster, family: str) -> dict[str, int]:
    """How many versions the registry has of each size."""
    with cluster.place() as place:
        names = [entry.name for entry in place.client.search_model_versions(max_results=1000)]
        return {name: names.count(name) for name in dict.fromkeys(names) if name.startswith(f"{family}-")}


def by_point(curves: Mapping[str, list[tuple[int, float]]]) -> dict[str, float]:
    """Every point of the curves by its name and step."""
    return {f"{name} {step}": value for name, points in curves.items() for step, value in points}
