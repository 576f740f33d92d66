"""Laws of shards that a Ray cluster makes: the corpus is the one that this machine makes, whoever made its shards."""

import errno
import json
import os
import shutil
import socket
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_core.recipe import DataConfig, DataSource
from tasks.artifacts import Store
from tasks.corpus import documents
from tasks.corpus.build import build_corpus
from tasks.corpus.record import DataRecord
from tasks.corpus.shards import Shard
from tasks.corpus.tokenizer import train_tokenizer
from tasks.running import ray_shards
from tasks.running.digests import artifact
from tasks.running.ray_cluster import RayCluster
from tasks.running.ray_shards import are_everywhere, on_hosts, places_of
from tasks.settings import PREFECT_API, TRACKING_URI, WORKSPACE, ServiceError

TEXTS = [f"{i} is {'even' if i % 2 == 0 else 'odd'}, and its square is {i * i}" for i in range(120)]
CLUSTER = RayCluster("10.0.0.1:6379")


class Ray:
    """A stand-in for the module: a task runs in the thread that asks, for one of two hosts of two places each.

    A host in `lost` dies in its first shard, one in `unable` has no package of ours; a task of a shard in `starved`
    takes all memory.
    """

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})
        OutOfMemoryError = type("OutOfMemoryError", (RayError,), {})

    class util:
        class scheduling_strategies:
            @staticmethod
            def NodeAffinitySchedulingStrategy(node: str, *, soft: bool) -> str:
                assert not soft
                return node

    def __init__(self) -> None:
        self.done = Counter[str]()
        self.lost, self.unable, self.starved = set[str](), set[str](), set[int]()

    def nodes(self) -> list[dict[str, Any]]:
        has = {"CPU": 2.0, "memory": 3e9}
        hosts = {"one": True, "two": True, "gone": False}
        return [
            {"NodeID": f"id of {name}", "NodeManagerHostname": name, "Alive": alive, "Resources": has}
            for name, alive in hosts.items()
        ]

    def remote(self, function: Any) -> Any:
        def options(*, scheduling_strategy: str, max_retries: int, **given: Any) -> Any:
            assert max_retries == 0, "Ray would try again what took all memory, for ever"
            host = scheduling_strategy.removeprefix("id of ")
            return SimpleNamespace(remote=lambda *arguments: Task(host, partial(function, *arguments)))

        return SimpleNamespace(options=options)

    def get(self, task: "Task", timeout: float | None = None) -> Any:
        shard = next((given for given in task.run.args if isinstance(given, Shard)), None)
        if shard is not None and task.host in self.lost:
            raise self.exceptions.RayError("The node died. Look at its dashboard.")
        if shard is not None and shard.number in self.starved:
            raise self.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory. Advice.")
        try:
            if task.host in self.unable:
                raise ModuleNotFoundError("No module named 'tasks'")
            made = task.run()
        except (ValueError, ServiceError, ModuleNotFoundError) as error:
            raised = self.exceptions.RayTaskError("traceback")
            raised.cause = error  # type: ignore[attr-defined]
            raise raised from None
        if shard is not None:
            self.done[task.host] += 1
        return made

    def cancel(self, task: "Task") -> None:
        pass


class Task:
    """Something to do on a host; hashed by itself, as references are."""

    def __init__(self, host: str, run: partial[Any]) -> None:
        self.host, self.run = host, run


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


def build(config: DataConfig, tokenizer: Path, directory: Path) -> DataRecord:
    hosts = partial(on_hosts, CLUSTER, artifact(tokenizer))
    return build_corpus(config, tokenizer, directory / "out", work=directory / "work", processes=4, others=hosts)


def test_a_cluster_makes_the_corpus_that_this_machine_makes(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path
) -> None:
    here = build_corpus(config, tokenizer, tmp_path / "here")
    assert build(config, tokenizer, tmp_path / "there") == here
    assert artifact(tmp_path / "there" / "out").digest == artifact(tmp_path / "here").digest
    assert ray.done.total() > 8 and set(ray.done) == {"one", "two"}
    before = ray.done.total()
    shutil.rmtree(tmp_path / "there" / "out")
    assert build(config, tokenizer, tmp_path / "there") == here
    assert ray.done.total() == before, "what is whole is not made again"


def test_a_lost_host_is_not_asked_again_and_one_that_cannot_is_told_and_left_out(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ray.lost = {"one"}
    build(config, tokenizer, tmp_path / "lost")
    assert set(ray.done) == {"two"} and "one was lost (attempt 1 of 5): The node died." in caplog.text
    ray.lost, ray.unable = set(), {"two"}
    before = ray.done["two"]
    build(config, tokenizer, tmp_path / "unable")
    assert ray.done["two"] == before and "two makes no shards: No module named 'tasks'" in caplog.text


def test_with_no_host_left_the_step_fails_as_what_passes_and_goes_on_later(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path
) -> None:
    ray.lost = {"one", "two"}
    with pytest.raises(ServiceError, match=r"no host of the Ray cluster at .* is left that makes shards$") as none:
        build(config, tokenizer, tmp_path)
    assert none.value.transient
    ray.unable = {"one", "two"}
    with pytest.raises(ServiceError, match=r"^one makes no shards: No module named 'tasks'$") as unable:
        build(config, tokenizer, tmp_path)
    assert not unable.value.transient
    ray.lost, ray.unable = set(), set()
    build(config, tokenizer, tmp_path)


def test_a_shard_that_takes_all_memory_is_not_tried_again(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path
) -> None:
    ray.starved = {0}
    with pytest.raises(ServiceError, match=r"^shard 0 took all the memory of .*; divide its files") as starved:
        build(config, tokenizer, tmp_path)
    assert not starved.value.transient


def test_a_row_that_cannot_be_used_is_told_as_it_is_here(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path
) -> None:
    (source,) = config.sources
    strict = DataConfig(sources=(DataSource(path=source.path),), heldout_fraction=0.2, shard_bytes=10**9)
    with pytest.raises(ValueError) as here:
        build_corpus(strict, tokenizer, tmp_path / "here")
    with pytest.raises(ValueError, match=r"b\.jsonl line 51 has neither") as there:
        build(strict, tokenizer, tmp_path / "there")
    assert str(there.value) == str(here.value)


def test_a_fault_of_a_host_keeps_its_nature_and_names_the_host(
    config: DataConfig, tokenizer: Path, ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ray_shards, "write_shard", full)
    with pytest.raises(ServiceError, match=rf"^shard \d+ failed on {socket.gethostname()}: .*No space left") as failed:
        build(config, tokenizer, tmp_path)
    assert failed.value.transient


def test_an_object_that_was_replaced_since_it_was_listed_makes_no_shard(
    config: DataConfig, tokenizer: Path, ray: Ray, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replaced(shown: Any) -> Any:
        store.client.put_object(Bucket=store.bucket, Key="data/b.jsonl", Body=b'{"text": "another"}\n' * 99)
        return shown

    listed = documents.listed
    monkeypatch.setattr(documents, "listed", lambda uri: replaced(listed(uri)))
    with pytest.raises(ServiceError, match=r"data/b\.jsonl was replaced while it was read; run again$"):
        build(config, tokenizer, tmp_path)


def test_a_host_with_other_code_or_another_workspace_cannot_make_shards(ray: Ray) -> None:
    runs, own = ray_shards.code.runs(ray_shards._make_there), os.environ[WORKSPACE]
    assert ray_shards._fault_there(runs, own) == ""
    changed = ray_shards._fault_there({**runs, "python": "2.7"}, own)
    assert changed.startswith("what it runs is not as in the run that asks: python was 2.7 and is")
    assert ray_shards._fault_there(runs, "s3://another/workspace").startswith(f"its {WORKSPACE} is {own}, and that of")


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
