"""Laws of shards that a Ray cluster makes: the corpus is the one that this machine makes, whoever made its shards."""

import json
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_core.recipe import DataConfig, DataSource
from tasks.artifacts import Store
from tasks.corpus.build import build_corpus
from tasks.corpus.shards import NOTHING, Shard
from tasks.corpus.sources import fetch_data
from tasks.corpus.tokenizer import train_tokenizer
from tasks.running import ray_shards
from tasks.running.digests import artifact
from tasks.running.ray_cluster import RayCluster
from tasks.running.ray_shards import are_everywhere, on_hosts, places_of
from tasks.settings import PREFECT_API, TRACKING_URI, WORKSPACE, ServiceError

TEXTS = [f"{i} is {'even' if i % 2 == 0 else 'odd'}, and its square is {i * i}" for i in range(120)]
CLUSTER = RayCluster("10.0.0.1:6379")


class Ray:
    """A stand-in for the module: its tasks run in the thread that asks; the hosts of the first `lost` ones die."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})

    def __init__(self) -> None:
        self.done = self.lost = 0

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": alive, "Resources": {"CPU": 2.0, "memory": 1.5e9 * (1 + alive)}} for alive in (True, True, False)
        ]

    def remote(self, function: Any) -> Any:
        options = SimpleNamespace(remote=lambda *arguments: partial(function, *arguments))
        return SimpleNamespace(options=lambda **given: options)

    def get(self, task: partial[Any]) -> Any:
        if self.lost:
            self.lost -= 1
            raise self.exceptions.RayError("The node died. Look at its dashboard.")
        try:
            made = task()
        except (ValueError, ServiceError) as error:
            raised = self.exceptions.RayTaskError("traceback")
            raised.cause = error  # type: ignore[attr-defined]
            raise raised from None
        self.done += 1
        return made

    def cancel(self, task: partial[Any]) -> None:
        pass


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, store: Store) -> Ray:
    found = Ray()
    monkeypatch.setattr(ray_shards, "connected", lambda address: found)
    shared = {
        WORKSPACE: f"s3://{store.bucket}/workspace",
        TRACKING_URI: "http://mlflow:5000",
        PREFECT_API: "http://prefect:4200/api",
        "RAYON_NUM_THREADS": "1",  # a task sets it
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in shared.items():
        monkeypatch.setenv(name, value)
    return found


@pytest.fixture
def config(store: Store) -> DataConfig:
    """Lines in two objects, one of them with a row that cannot be used."""
    rows = [{"text": text} for text in TEXTS]
    for name, some in (("a", rows), ("b", [*rows[:50], {"no": 1}, *rows[50:]])):
        body = "".join(json.dumps(row) + "\n" for row in some)
        store.client.put_object(Bucket=store.bucket, Key=f"data/{name}.jsonl", Body=body.encode())
    source = DataSource(path=f"s3://{store.bucket}/data", max_skipped=1, max_tokens=9000)
    return DataConfig(sources=(source,), heldout_fraction=0.2, shard_bytes=1000)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, path, vocab_size=270)
    return path


def build(config: DataConfig, tokenizer: Path, directory: Path) -> Any:
    others = partial(on_hosts, CLUSTER, artifact(tokenizer))
    work = directory / "work"
    return build_corpus(config, tokenizer, directory / "out", fetch=fetch_data, work=work, processes=4, others=others)


def test_a_cluster_makes_the_corpus_that_this_machine_makes(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path
) -> None:
    here = build_corpus(config, tokenizer, tmp_path / "here", fetch=fetch_data)
    assert build(config, tokenizer, tmp_path / "there") == here
    assert artifact(tmp_path / "there" / "out").digest == artifact(tmp_path / "here").digest
    assert ray.done > 8, "no shard was made there"
    before = ray.done
    again = partial(build_corpus, config, tokenizer, tmp_path / "again", fetch=fetch_data)
    assert again(work=tmp_path / "there" / "work", others=partial(on_hosts, CLUSTER, artifact(tokenizer))) == here
    assert ray.done == before, "what is whole is not made again"


def test_a_row_that_cannot_be_used_is_told_as_it_is_here(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path
) -> None:
    (source,) = config.sources
    strict = DataConfig(sources=(DataSource(path=source.path),), heldout_fraction=0.2, shard_bytes=10**9)
    with pytest.raises(ValueError) as here:
        build_corpus(strict, tokenizer, tmp_path / "here", fetch=fetch_data)
    with pytest.raises(ValueError, match=r"b\.jsonl line 51 has neither") as there:
        build(strict, tokenizer, tmp_path / "there")
    assert str(there.value) == str(here.value)


def test_a_lost_shard_is_a_fault_that_passes_and_the_next_attempt_makes_the_rest(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path
) -> None:
    ray.lost = 1
    with pytest.raises(ServiceError, match=r"^shard 0 was not made: The node died\.$") as lost:
        build(config, tokenizer, tmp_path)
    assert lost.value.transient
    whole = len(list((tmp_path / "work").glob("*/shard.json")))
    before = ray.done
    build(config, tokenizer, tmp_path)
    assert ray.done - before == len(list((tmp_path / "work").glob("*/shard.json"))) - whole


def test_a_host_with_other_code_or_another_workspace_makes_nothing(
    config: DataConfig, tokenizer: Path, ray: Ray
) -> None:
    runs = ray_shards.code.runs(ray_shards._make_there)
    shard, own = Shard(number=0, parts=()), os.environ[WORKSPACE]
    make = partial(ray_shards._make_there, config=config, tokenizer=artifact(tokenizer), shard=shard, before=NOTHING)
    with pytest.raises(
        ServiceError, match=r"cannot make a shard: .*python was 2\.7 and is .*; install the same in both$"
    ):
        make({**runs, "python": "2.7"}, workspace=own)
    with pytest.raises(ServiceError, match=rf"cannot make a shard: its {WORKSPACE} is {own}, .*; set the same$"):
        make(runs, workspace="s3://another/workspace")


def test_only_sources_that_every_host_reads_are_made_by_others_as_many_at_a_time_as_have_memory(
    ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(*paths: str) -> DataConfig:
        return DataConfig(sources=tuple(DataSource(path=path) for path in paths))

    assert are_everywhere(config("s3://b/data", "hf://org/name"))
    assert not are_everywhere(config("s3://b/data", "/data/a.jsonl"))
    assert not are_everywhere(config("stdlib://"))
    assert places_of(CLUSTER) == 4
    monkeypatch.setattr(ray_shards, "PROCESS_BYTES", 2 << 30)
    assert places_of(CLUSTER) == 2
