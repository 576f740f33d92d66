"""Laws of a Ray cluster: three hosts that share nothing but servers make one family, and no host makes a step again."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from micro import LIMIT_SECONDS, write_micro
from progress import steps_in
from ray_hosts import Cluster, bring_recipe, found, ray_cluster, wait_until

from tasks.running.ray_steps import GONE_SECONDS

pytestmark = [pytest.mark.services, pytest.mark.slow]

# The gradient of a batch is a sum over its rows, in another order where they lie in three processes. Adam divides it by
# its own size, so that float32's rounding, 1e-7, grows over the steps, but by far less than this.
SUM_ORDER = 1e-5
STEPS = 12
SHARD_BYTES = 4000  # a few of them for each host
NODES = r"distil stage2: node \d of 3 is (\w+)"
ON_CPU = re.compile(r"train tokenizer|prepare data|reorder teacher|slice .|register|promote")
# Three micro-steps a step, which two hosts cannot divide; and a setting that makes another stage, of no effect here.
IN_ONE = ("stages.0.micro_batch_size=3", "stages.0.full_share=0.1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ray_cluster(tmp_path_factory.mktemp("servers"), (1, 1, 1)) as cluster:
        yield cluster


def write_small(directory: Path, cluster: Cluster) -> None:
    """The micro recipe with little to measure, and one stage, whose steps three processes and one can divide alike.

    It learns cross-entropy too, so that every budget has a gradient far from zero. Its data are in the bucket.
    """
    file = write_micro(directory)
    recipe = yaml.safe_load(file.read_text())
    with cluster.place() as place:
        for source in recipe["data"]["sources"]:
            body, key = (directory / source["path"]).read_bytes(), f"data/{source['path']}"
            place.store.client.put_object(Bucket=place.store.bucket, Key=key, Body=body)
            source["path"] = f"s3://{place.store.bucket}/{key}"
    recipe["data"]["shard_bytes"] = SHARD_BYTES
    divided = {"batch_size": 9, "micro_batch_size": 1, "budget_rows": 3, "shares": "fixed"}
    recipe["stages"] = [{**recipe["stages"][1], **divided, "steps": STEPS, "checkpoint_every": 5}]
    recipe["stages"][0]["optimizer"] = {"learning_rate": 3e-4, "warmup_steps": 2}
    recipe["distillation"] = {"ce_weight": 1.0}
    recipe["teacher"]["pretrain"]["steps"] = 4
    recipe["shapes"]["measurements"] = 4
    recipe["evaluation"] |= {"heldout_tokens": 128, "max_problems": 1, "max_new_tokens": 1}
    file.write_text(yaml.safe_dump(recipe))


def on_gpu(code: int | None, said: str) -> dict[str, bool]:
    """The steps for a GPU of a run that ended well, and whether each was cached."""
    assert code == 0, said
    return {title: cached for title, cached in steps_in(said) if not ON_CPU.fullmatch(title)}


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
    write_small(tmp_path, cluster)
    recipes = [bring_recipe(host, tmp_path) for host in cluster.hosts]
    endless = ["stages.0.steps=1000000", "stages.0.checkpoint_every=1000000", "data.seed=1"]

    before, after = tmp_path / "before.log", tmp_path / "after.log"
    killed = cluster.begin(0, before, "run", str(recipes[0]), *endless)
    wait_until(lambda: len(found(NODES, cluster.said())) == 2 and len(cluster.trainers()) == 3, killed, before)
    training = cluster.trainers()
    killed.kill()
    killed.wait()
    again = cluster.begin(1, after, "run", str(recipes[1]), *endless)
    wait_until(lambda: "distil stage2 is under way already" in after.read_text(), again, after)
    time.sleep(GONE_SECONDS)  # until then the killed one counts as waiting
    assert cluster.trainers() == training
    again.send_signal(signal.SIGINT)
    assert again.wait(LIMIT_SECONDS) != 0 and "Traceback" not in after.read_text(), after.read_text()
    assert not cluster.trainers()
    assert len(found(r"distil stage2 is done on (\w+)", cluster.said())) == 1
    for host in cluster.hosts:
        assert host.run(["rm", "--recursive", f"{host.state}/recipe"], {}).returncode == 0


def test_hosts_that_share_no_disk_train_together_and_any_of_them_has_what_a_lost_one_made(
    cluster: Cluster, tmp_path: Path
) -> None:
    write_small(tmp_path, cluster)
    asking = cluster.hosts[0]
    recipe, *_ = [bring_recipe(host, tmp_path) for host in cluster.hosts]
    before = len(cluster.said())
    run = cluster.elastic(asking, "run", str(recipe))
    steps = on_gpu(run.returncode, run.stderr)
    assert {"pretrain teacher", "rank importance", "distil stage2", "evaluate"} <= steps.keys()
    said = cluster.said(before)
    places = found(r".+ is done on (\w+)", said)
    assert len(places) == list(steps.values()).count(False), "each once"
    (first,), others = found(r"distil stage2 is done on (\w+)", said), found(NODES, said)
    assert sorted([first, *others]) == [host.name for host in cluster.hosts]

    (shards,) = found(r"\d+ shards were made: (.*)", said)
    assert len(re.findall(r"\d+ on (h\d)", shards)) > 1, shards

    lost, left = cluster.hosts[1:]
    lost.kill()
    alone = cluster.elastic(asking, "run", str(recipe), *IN_ONE)
    later = on_gpu(alone.returncode, alone.stderr)
    assert later["rank importance"] and not later["distil stage2"]
    assert found(NODES, cluster.said(before)) == others, "one host alone"
    together, in_one = losses(cluster)
    assert together == pytest.approx(in_one, abs=SUM_ORDER)

    again = cluster.elastic(left, "run", str(recipe), *IN_ONE)
    assert all(on_gpu(again.returncode, again.stderr).values())
