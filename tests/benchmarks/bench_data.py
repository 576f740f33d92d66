"""How fast data is prepared beside the tokenizer alone, on the same text, cores and vocabulary; two processes by one.

pytest -m benchmark -s tests/benchmarks/bench_data.py

The text is Python's own and that of the packages here. The tokenizer alone is `encode_batch` of `tokenizers` on texts
that lie in memory; preparing reads and renders rows, digests documents, and writes, marks and joins the shards.
"""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from bench import interleaved, record

from elastic_core.recipe import DataConfig, DataSource
from elastic_core.schema import to_dict
from tasks.corpus.build import build_corpus
from tasks.corpus.chats import Chat
from tasks.corpus.documents import iter_documents
from tasks.corpus.tokenizer import load_tokenizer, train_tokenizer
from tasks.running.limits import cores

VOCABULARY = 65_536
TRAINED_BYTES, TEXT_BYTES = 40_000_000, 80_000_000
SHARDS = 16
PROBLEMS = Path(__file__).parents[2] / "flows/recipes/tiny/problems-train-1.jsonl"

PREPARE = """
import json, os, sys, time
from pathlib import Path
from elastic_core.recipe import DataConfig
from elastic_core.schema import build
from tasks.corpus.build import build_corpus

if __name__ == "__main__":
    config, tokenizer, output, processes = sys.argv[1:]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(processes)])
    began = []
    build_corpus(
        build(DataConfig, json.loads(config)), Path(tokenizer), Path(output),
        processes=int(processes), progress=lambda tokens, _: began or not tokens or began.append(time.monotonic()),
    )
    print(time.monotonic() - began[0])
"""


def texts() -> Iterator[str]:
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    for file in sorted({file for root in roots for file in Path(root).rglob("*.py")}):
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, written = tmp_path_factory.mktemp("text") / "long.jsonl", 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts():
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if written >= TEXT_BYTES:
                break
    return path


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(), path, vocab_size=VOCABULARY, max_bytes=TRAINED_BYTES)
    return path


def config_of(path: Path, **options: int) -> DataConfig:
    return DataConfig(sources=(DataSource(path=str(path)),), heldout_fraction=0.02, **options)


def preparing(config: DataConfig, tokenizer_dir: Path) -> Callable[[], object]:
    directory, numbers = Path(tempfile.mkdtemp()), count()
    return lambda: build_corpus(config, tokenizer_dir, directory / str(next(numbers)))


@pytest.mark.benchmark
@pytest.mark.parametrize("rows", ["long texts", "short chats"])
def test_data_is_prepared_beside_the_tokenizer_alone(rows: str, long_rows: Path, tokenizer_dir: Path) -> None:
    path = long_rows if rows == "long texts" else PROBLEMS
    tokenizer = load_tokenizer(tokenizer_dir)
    found = list(iter_documents(DataSource(path=str(path)), Path(tempfile.mkdtemp())))
    plain = [
        str(tokenizer.apply_chat_template(document.content.messages, tokenize=False))
        if isinstance(document.content, Chat)
        else document.content
        for document in found
    ]
    seconds = interleaved(
        {
            "ours": preparing(config_of(path), tokenizer_dir),
            "theirs": lambda: tokenizer.backend_tokenizer.encode_batch(plain, add_special_tokens=False),
        }
    )
    record(
        benchmark="data preparation",
        shape=f"{rows}, {sum(map(len, plain)) / 1e6:.1f} MB, vocabulary {VOCABULARY}, {cores()} cores",
        unit="s",
        ours=seconds["ours"],
        theirs=seconds["theirs"],
        alternative="tokenizers.encode_batch alone",
        target="at most 1.11" if rows == "long texts" else "as low as it goes: each row is rendered",
    )


@pytest.mark.benchmark
def test_two_processes_prepare_data_beside_one(long_rows: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Each on one core, from the first tokens on: the start of Python takes seconds whatever there is to do."""
    config = json.dumps(to_dict(config_of(long_rows, shard_bytes=long_rows.stat().st_size // SHARDS + 1)))
    program, numbers = tmp_path / "prepare.py", count()
    program.write_text(PREPARE)

    def prepare(processes: int) -> float:
        given = [sys.executable, program, config, tokenizer_dir, tmp_path / str(next(numbers)), processes]
        alone = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run([*map(str, given)], env=alone, capture_output=True, text=True, check=True)
        return float(done.stdout)

    times = [(prepare(2), prepare(1)) for _ in range(5)]
    two, one = (statistics.median(column) for column in zip(*times, strict=True))
    record(
        benchmark="data preparation, two processes",
        shape=f"{long_rows.stat().st_size / 1e6:.1f} MB in {SHARDS} shards, vocabulary {VOCABULARY}",
        unit="s",
        ours=two,
        theirs=one,
        alternative="one process on one core",
        target="at most 0.556",
    )
