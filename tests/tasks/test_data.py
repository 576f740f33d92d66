"""Laws of the step that prepares data: begun anew it takes what is whole, and what the disk spoiled is not taken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_core.recipe import DataConfig, DataSource
from tasks import data
from tasks.corpus import build
from tasks.corpus.sources import source_identity
from tasks.corpus.tokenizer import train_tokenizer
from tasks.records import Artifact
from tasks.running.digests import artifact
from tasks.settings import ServiceError

TEXTS = [f"document {i}: {'lorem ipsum ' * (i % 5)}\n" for i in range(80)]


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[[], Artifact]:
    train_tokenizer(TEXTS, tmp_path / "tokenizer", vocab_size=265)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = DataSource(path=str(path))
    config = DataConfig(sources=(source,), heldout_fraction=0.2, shard_bytes=2000)
    tokenizer, identity = artifact(tmp_path / "tokenizer"), (source_identity(source),)
    return lambda: data.prepare_data.fn(config, identity, tokenizer, str(tmp_path / "workspace"))


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "cores", lambda: 1)


@pytest.mark.parametrize(("cores", "gibibytes", "processes"), [(8, 3.5, 3), (2, 100, 2), (8, 0.5, 1)])
def test_there_are_as_many_processes_as_there_is_memory_for(
    cores: int, gibibytes: float, processes: int, prepare: Callable[[], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def asked(*_: object, processes: int, **__: object) -> None:
        raise Asked(processes)

    monkeypatch.setattr(data, "cores", lambda: cores)
    monkeypatch.setattr(data, "memory", lambda: int(gibibytes * 2**30))
    monkeypatch.setattr(build, "build_corpus", asked)
    with pytest.raises(Asked) as told:
        prepare()
    assert told.value.args == (processes,)


def test_a_corpus_is_recorded_file_by_file_and_nothing_else_stays(
    prepare: Callable[[], Artifact], tmp_path: Path
) -> None:
    made = prepare()
    names = [f"train-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(made.files) == ["data.json", "heldout.safetensors", *names]
    assert [path.name for path in (tmp_path / "workspace").iterdir()] == [Path(made.path).name]


def test_what_changed_since_the_run_began_is_not_taken_for_what_it_was(
    prepare: Callable[[], Artifact], tmp_path: Path
) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ServiceError, match=r"a\.jsonl changed while this run was going; run again$") as told:
        prepare()
    assert not told.value.transient and not [*(tmp_path / "workspace").glob("*/data.json")]


def test_a_file_that_changes_while_it_is_read_makes_no_corpus(
    prepare: Callable[[], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_corpus = build.build_corpus

    def meanwhile(*inputs: Any, **named: Any) -> None:
        build_corpus(*inputs, **named)
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write('{"text": "more"}\n')

    monkeypatch.setattr(build, "build_corpus", meanwhile)
    with pytest.raises(ServiceError, match=r"a\.jsonl changed while this run was going; run again$"):
        prepare()
    assert not [*(tmp_path / "workspace").iterdir()]


def test_a_corpus_that_was_whole_when_the_run_was_killed_is_taken(
    prepare: Callable[[], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(directory: Path) -> Artifact:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "artifact", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    monkeypatch.delattr(build, "build_corpus")
    assert len(prepare().files) == 5


def test_what_the_disk_gives_back_differently_is_set_aside_and_made_again(
    prepare: Callable[[], Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoiled(directory: Path) -> Artifact:
        file = directory / "train-00002-of-00003.safetensors"
        content = bytearray(file.read_bytes())
        content[600] ^= 1
        file.write_bytes(content)
        return artifact(directory)

    with monkeypatch.context() as patch:
        patch.setattr(data, "artifact", spoiled)
        with pytest.raises(
            ServiceError, match=r"train-00002-of-00003\.safetensors is not what was written to it"
        ) as told:
            prepare()
    assert told.value.transient
    made = prepare()
    assert made.digest == artifact(Path(made.path)).digest
    assert (
        sorted(path.name.partition(".damaged-")[0] for path in (tmp_path / "workspace").iterdir())
        == [Path(made.path).name] * 2
    )
