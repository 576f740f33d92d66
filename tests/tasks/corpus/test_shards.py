"""Laws of shards: the tokens are those of one process in one go, whoever makes the shards, and however often killed."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from elastic_core.files.token_stream import TokenStream, stream_files
from elastic_core.recipe import DataConfig, DataSource
from elastic_core.schema import to_dict
from tasks.corpus import workers
from tasks.corpus.build import build_corpus
from tasks.corpus.documents import source_pieces
from tasks.corpus.pieces import Piece
from tasks.corpus.record import HELDOUT_FILE, TRAIN_FILE, DataRecord
from tasks.corpus.shards import NOTHING, Shard, ShardRecord, Taken, plan_shards
from tasks.corpus.tokenizer import train_tokenizer
from tasks.corpus.workers import ShardMaker, Workers
from tasks.running.digests import artifact
from tasks.settings import ServiceError, is_transient

TEXTS = [f"document {i}: {'lorem ipsum ' * (i % 5)}x = {i * i}\n" for i in range(120)]
WHOLE = 10**9
Recipe = Callable[..., DataConfig]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, path, vocab_size=270)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Three sources: texts, chats of which only answers are learned, and texts with rows that cannot be used."""
    texts = [{"text": text} for text in TEXTS]
    chats = [
        {"messages": [{"role": "user", "content": f"{i} + 1 ="}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(60)
    ]
    bad = [*texts[:40], {"no": 1}, *texts[40:80], {"no": 2}, *texts[80:]]
    sources = []
    for name, rows in (("a", texts), ("b", chats), ("c", bad)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(DataSource(path=str(path)))

    def make(shard_bytes: int, **limits: int) -> DataConfig:
        return DataConfig(
            sources=(
                replace(sources[0], **limits),
                replace(sources[1], train_on="assistant"),
                replace(sources[2], max_skipped=2, **limits),
            ),
            heldout_fraction=0.1,
            shard_bytes=shard_bytes,
        )

    return make


def streams(directory: Path) -> dict[str, np.ndarray]:
    """Everything that a corpus says, whichever files it lies in."""
    found = {}
    for name in (TRAIN_FILE, HELDOUT_FILE):
        stream = TokenStream(directory / name)
        whole = (0, len(stream))
        found |= {f"{name} tokens": stream.tokens(*whole), f"{name} learned": stream.learned(*whole)}
        found[f"{name} starts"] = stream.document_starts(*whole)
    return found


def same(ours: Path, theirs: Path) -> bool:
    first, second = streams(ours), streams(theirs)
    return all(np.array_equal(first[name], second[name]) for name in first)


def counts(record: DataRecord) -> list[tuple[int, int, int, int]]:
    return [(one.documents, one.tokens, one.train_tokens, one.learned) for one in record.sources]


LIMITS: dict[str, dict[str, int]] = {
    "without limits": {},
    "max_tokens": {"max_tokens": 1000},
    "max_documents": {"max_documents": 47},
    "both": {"max_tokens": 1500, "max_documents": 47},
}


class Unruly:
    """Works on up to `count` shards at once, and ends the newest first."""

    def __init__(self, maker: ShardMaker, count: int, log: list[int]) -> None:
        self.count, self._maker, self._encoder, self._log = count, maker, maker.encoder(), log
        self._waiting: list[tuple[Future[ShardRecord], Shard, Taken]] = []

    def submit(self, shard: Shard, before: Taken) -> "Future[ShardRecord]":
        future: Future[ShardRecord] = Future()
        self._waiting.append((future, shard, before))
        return future

    def work(self) -> None:
        future, shard, before = self._waiting.pop()
        self._log.append(shard.number)
        try:
            future.set_result(self._maker.make(self._encoder, shard, before, lambda tokens: None))
        except ValueError as error:
            future.set_exception(error)

    def tokens(self) -> int:
        return 0


@pytest.fixture
def unruly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every corpus is made by three workers who work ahead, the last shard first; the numbers of the shards made."""
    log: list[int] = []

    @contextmanager
    def three(maker: ShardMaker, count: int, on_tokens: Callable[[int], None]) -> Iterator[Workers]:
        found = Unruly(maker, 3, log)

        def wait(running: object, timeout: float, until: str) -> tuple[set[Future[ShardRecord]], None]:
            waiting = {future for future, _, _ in found._waiting}
            found.work()
            return waiting - {future for future, _, _ in found._waiting}, None

        monkeypatch.setattr(workers, "wait", wait)
        yield found

    monkeypatch.setattr(workers, "workers", three)
    return log


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("shard_bytes", [300, 2000, 5000])
def test_the_tokens_depend_on_no_division_and_on_nobody_who_works(
    limits: str, shard_bytes: int, recipe: Recipe, tokenizer_dir: Path, tmp_path: Path, unruly: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "workers", real_workers)
        patch.setattr(workers, "wait", real_wait)
        whole = build_corpus(recipe(WHOLE, **LIMITS[limits]), tokenizer_dir, tmp_path / "whole")
        config = recipe(shard_bytes, **LIMITS[limits])
        in_order = build_corpus(config, tokenizer_dir, tmp_path / "in order")
    assert not unruly
    record = build_corpus(config, tokenizer_dir, tmp_path / "unruly")
    assert unruly != sorted(unruly)
    assert record == in_order and artifact(tmp_path / "unruly").digest == artifact(tmp_path / "in order").digest
    assert same(tmp_path / "unruly", tmp_path / "whole")
    assert [path.name for path in stream_files(tmp_path / "whole" / TRAIN_FILE)] == [TRAIN_FILE]
    assert len(stream_files(tmp_path / "unruly" / TRAIN_FILE)) > 1
    assert counts(record) == counts(whole)
    assert (record.train.tokens, record.train.learned, record.train.documents) == (
        whole.train.tokens,
        whole.train.learned,
        whole.train.documents,
    )
    assert record.heldout == whole.heldout


real_workers, real_wait = workers.workers, workers.wait


def test_where_every_source_lies_in_the_tokens_to_train_on_is_recorded(
    recipe: Recipe, tokenizer_dir: Path, tmp_path: Path
) -> None:
    record = build_corpus(recipe(700), tokenizer_dir, tmp_path / "out")
    assert sum(source.train_tokens for source in record.sources) == record.train.tokens
    first, chats, _ = (source.train_tokens for source in record.sources)
    learned = TokenStream(tmp_path / "out" / TRAIN_FILE).learned(0, record.train.tokens)
    assert learned[:first].all() and learned[first + chats :].all()
    assert learned[first - 1 : first + 1].tolist() == [1, 0]


def test_a_bad_row_beyond_what_is_wanted_is_no_fault_and_one_before_it_is(
    recipe: Recipe, tokenizer_dir: Path, tmp_path: Path, unruly: list[int]
) -> None:
    with Path(recipe(1).sources[0].path).open("a") as file:
        file.write('{"no": 3}\n')
    config = recipe(400, max_documents=100)
    build_corpus(config, tokenizer_dir, tmp_path / "out")
    with pytest.raises(ValueError, match=r"a.jsonl line \d+ after byte \d+ has neither"):
        build_corpus(recipe(400), tokenizer_dir, tmp_path / "more")


def test_rows_that_cannot_be_used_are_counted_over_all_shards(
    recipe: Recipe, tokenizer_dir: Path, tmp_path: Path, unruly: list[int]
) -> None:
    config = recipe(400)
    record = build_corpus(config, tokenizer_dir, tmp_path / "out")
    assert record.sources[2].skipped == 2 and len(record.sources[2].first_skipped) == 2
    stricter = replace(config, sources=(*config.sources[:2], replace(config.sources[2], max_skipped=1)))
    with pytest.raises(ValueError, match=r"it is one more than max_skipped=1, and the first was: .*has neither"):
        build_corpus(stricter, tokenizer_dir, tmp_path / "stricter")


def test_shards_beyond_a_limit_are_not_made(
    recipe: Recipe, tokenizer_dir: Path, tmp_path: Path, unruly: list[int]
) -> None:
    config = recipe(500, max_tokens=400)
    config = replace(config, sources=config.sources[:1], heldout_fraction=0.5)
    build_corpus(config, tokenizer_dir, tmp_path / "out")
    assert max(unruly) < 6 < Path(config.sources[0].path).stat().st_size // 500


@pytest.mark.parametrize(
    ("sizes", "limit", "wanted"),
    [
        ([400] * 8, None, [0, 1, 2, 3, 4, 5]),
        ([400] * 8, 250, [0, 1, 2]),  # 100 tokens each
        ([None] * 8, 250, [0]),
        ([None] * 8, None, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_as_many_work_as_there_is_to_do_at_once(sizes: list[int | None], limit: int | None, wanted: list[int]) -> None:
    source = DataSource(path="x", max_tokens=limit)
    pieces = [Piece(name="x", path=str(at), format="jsonl", size=size) for at, size in enumerate(sizes)]
    maker = ShardMaker(config=DataConfig(sources=(source,)), tokenizer=Path("none"), directory=Path("none"))
    state = workers._State(maker, plan_shards([pieces], 400))
    assert [shard.number for shard, _ in state.wanted(6)] == wanted


class Killed(Exception):
    pass


def test_what_was_whole_when_a_run_was_killed_is_not_made_again(
    recipe: Recipe, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make, limit = ShardMaker.make, 1000

    def counted(maker: ShardMaker, encoder: object, shard: Shard, *rest: object) -> ShardRecord:
        if len(made) == limit:
            raise Killed
        made.append(shard.number)
        return make(maker, encoder, shard, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardMaker, "make", counted)
    config, work = recipe(1000, max_tokens=1500), tmp_path / "work"
    build_corpus(config, tokenizer_dir, tmp_path / "undisturbed")
    whole, made[:], limit = list(made), [], 9
    with pytest.raises(Killed):
        build_corpus(config, tokenizer_dir, tmp_path / "out", work=work)
    assert made == whole[:9]
    (work / "00003" / "shard.json").unlink()  # not marked
    made[:], limit = [], 1000
    build_corpus(config, tokenizer_dir, tmp_path / "out", work=work)
    assert made == [3, *whole[9:]]
    assert artifact(tmp_path / "out").digest == artifact(tmp_path / "undisturbed").digest


def test_a_shard_of_other_pieces_is_made_again(recipe: Recipe, tokenizer_dir: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    build_corpus(recipe(3000), tokenizer_dir, tmp_path / "first", work=work)
    build_corpus(recipe(1000), tokenizer_dir, tmp_path / "second", work=work)
    build_corpus(recipe(1000), tokenizer_dir, tmp_path / "third")
    assert artifact(tmp_path / "second").digest == artifact(tmp_path / "third").digest


def test_a_shard_whose_held_out_tokens_were_damaged_is_told_of_and_made_again(
    recipe: Recipe, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config, work = recipe(1000), tmp_path / "work"
    build_corpus(config, tokenizer_dir, tmp_path / "undisturbed", work=work)
    damaged = next(work.glob(f"*/{HELDOUT_FILE}"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ServiceError, match=rf"{damaged} is not what was written to it") as error:
        build_corpus(config, tokenizer_dir, tmp_path / "out", work=work)
    assert is_transient(error.value) and not (tmp_path / "out").exists()
    build_corpus(config, tokenizer_dir, tmp_path / "out", work=work)
    assert artifact(tmp_path / "out").digest == artifact(tmp_path / "undisturbed").digest


def test_pieces_fill_shards_in_order() -> None:
    def piece(name: str, size: int | None) -> Piece:
        return Piece(name=name, path=name, format="jsonl", size=size)

    sources = [
        [piece("a", 40), piece("b", 50), piece("c", 20)],
        [piece("d", 10), piece("e", None), piece("f", None)],
        [piece("g", 900), piece("h", 5)],
    ]
    found = plan_shards(sources, 100)
    assert [[[p.name for p in part.pieces] for part in shard.parts] for shard in found] == [
        [["a", "b"]],
        [["c"], ["d"]],
        [["e"]],
        [["f"]],
        [["g"]],
        [["h"]],
    ]
    assert [shard.number for shard in found] == list(range(6))
    assert [[part.source for part in shard.parts] for shard in found] == [[0], [0, 1], [1], [1], [2], [2]]
    assert len({shard.digest for shard in found}) == 6


# --- real processes ---

PROGRAM = """
import json, sys
from pathlib import Path
from elastic_core.recipe import DataConfig
from elastic_core.schema import build
from tasks.corpus.build import build_corpus

if __name__ == "__main__":
    config, tokenizer, output, work, processes = sys.argv[1:]
    build_corpus(
        build(DataConfig, json.loads(config)), Path(tokenizer), Path(output), work=Path(work), processes=int(processes),
    )
"""


class Preparation:
    """build_corpus in a process of its own, with so many more."""

    def __init__(self, config: DataConfig, tokenizer_dir: Path, output: Path, processes: int) -> None:
        self.output, self.work = output, output.with_name(f"{output.name} work")
        program = output.with_name("program.py")
        program.write_text(PROGRAM)
        given = json.dumps(to_dict(config)), tokenizer_dir, output, self.work, processes
        self.process = subprocess.Popen([sys.executable, str(program), *map(str, given)])

    def marked(self) -> dict[str, int]:
        """When each shard that is whole was marked."""
        return {file.parent.name: file.stat().st_mtime_ns for file in self.work.glob("[0-9]*/shard.json")}

    def kill_at(self, shards: int) -> dict[str, int]:
        """kill -9 once so many shards are whole."""
        while len(self.marked()) < shards:
            assert self.process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        time.sleep(1.0)  # the others end when they see it
        return self.marked()

    def digest(self) -> str:
        assert self.process.wait() == 0
        return artifact(self.output).digest


@pytest.mark.services
def test_a_tokenizer_that_no_process_can_load_is_told_as_that(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"^{tmp_path}/empty: no tokenizer can be loaded"):
        build_corpus(recipe(1000), tmp_path / "empty", tmp_path / "out", processes=2)


@pytest.mark.services
def test_a_pool_of_which_a_process_was_killed_is_told_of_whoever_notices_it(
    recipe: Recipe, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = recipe(1000)
    maker = ShardMaker(config=config, tokenizer=tokenizer_dir, directory=tmp_path)
    pieces = [source_pieces(s, tmp_path, 1000) for s in config.sources]
    shards = plan_shards(pieces, 1000)
    before = set(psutil.Process().children())
    with workers.workers(maker, 2, lambda tokens: None) as pool:
        state = workers._State(maker, shards)
        running = pool.submit(shards[0], NOTHING)
        state.running[running] = 0, NOTHING
        for process in set(psutil.Process().children()) - before:
            process.kill()
        wait([running])
        for notices in (lambda: state.take(running), lambda: pool.submit(shards[1], NOTHING)):
            with pytest.raises(ServiceError, match="a process that tokenises ended") as error:
                notices()
            assert is_transient(error.value)


@pytest.mark.services
@pytest.mark.slow
def test_the_corpus_is_the_same_for_one_two_and_three_processes_and_after_kills(
    recipe: Recipe, tokenizer_dir: Path, tmp_path: Path
) -> None:
    config = recipe(100, max_tokens=3000)
    build_corpus(config, tokenizer_dir, tmp_path / "here", work=tmp_path / "here work")
    expected, count = artifact(tmp_path / "here").digest, len([*(tmp_path / "here work").glob("[0-9]*/shard.json")])
    for processes in (2, 3):
        output = tmp_path / f"{processes} processes"
        assert Preparation(config, tokenizer_dir, output, processes).digest() == expected
    for processes, shares in ((1, (0.9,)), (2, (0.5, 0.9))):
        output = tmp_path / f"{processes} processes and kills"
        for share in shares:
            kept = Preparation(config, tokenizer_dir, output, processes).kill_at(round(share * count))
        again = Preparation(config, tokenizer_dir, output, processes)
        assert again.digest() == expected
        assert len(again.marked()) - len(kept) <= 0.15 * count
        assert {name: again.marked()[name] for name in kept} == kept
