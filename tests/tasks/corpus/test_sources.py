"""What is on S3 is called as it is there, read there, and found out where it changes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from elastic_core.recipe import DataConfig, DataSource
from tasks.artifacts import Store
from tasks.corpus import documents
from tasks.corpus.build import build_corpus, iter_texts
from tasks.corpus.documents import iter_documents, whole_pieces
from tasks.corpus.sample import sample
from tasks.corpus.sources import check_unchanged, source_identity
from tasks.corpus.tokenizer import train_tokenizer
from tasks.running.digests import artifact
from tasks.settings import ServiceError

TEXTS = [f"{i} is {'even' if i % 2 == 0 else 'odd'}, and its square is {i * i}" for i in range(120)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def put(store: Store, **bodies: bytes) -> str:
    for key, body in bodies.items():
        store.client.put_object(Bucket=store.bucket, Key=key, Body=body)
    return f"s3://{store.bucket}"


def test_an_object_and_a_prefix_are_called_as_in_s3(store: Store) -> None:
    names = ("data/one.jsonl", "data/sub/two.jsonl", "data/.hidden.jsonl", "twice/x.jsonl", "twice/x.jsonl/x.jsonl")
    bucket = put(store, **dict.fromkeys(names, lines(["it"])))
    for uri, found in {
        f"{bucket}/data/one.jsonl": [f"{bucket}/data/one.jsonl"],
        f"{bucket}/data/": [f"{bucket}/data/one.jsonl", f"{bucket}/data/sub/two.jsonl"],
        f"{bucket}/twice/x.jsonl": [f"{bucket}/twice/x.jsonl/x.jsonl"],
    }.items():
        assert [piece.name for piece in whole_pieces(DataSource(path=uri))] == found


NAMES = (
    "a-1.jsonl",
    "a-2.jsonl",
    "b.jsonl",
    "notes.md",
    ".hid/a-3.jsonl",
    ".a-4.jsonl",
    "sub/a-5.jsonl",
    "sub/d/a-6.jsonl",
)


@pytest.mark.parametrize(
    "pattern", ["a-*.jsonl", "*.jsonl", "[ab]*.jsonl", "a-?.jsonl", "*/a-*", "**/a-*.jsonl", "*/*/*"]
)
def test_a_glob_takes_of_objects_what_it_takes_of_files(store: Store, tmp_path: Path, pattern: str) -> None:
    for name in NAMES:
        (file := tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(lines(["it"]))
    bucket = put(store, **{f"data/{name}": lines(["it"]) for name in NAMES})
    names = {
        place: [piece.name for piece in whole_pieces(DataSource(path=f"{place}/data/{pattern}"))]
        for place in (tmp_path, bucket)
    }
    assert [name.removeprefix(bucket) for name in names[bucket]] == [
        name.removeprefix(str(tmp_path)) for name in names[tmp_path]
    ]
    assert names[bucket]


def test_a_glob_that_no_object_matches_is_told(store: Store) -> None:
    source = DataSource(path=put(store, **{"data/a.jsonl": lines(["it"])}) + "/data/*.parquet")
    with pytest.raises(
        ValueError, match=r"^s3://.*/data/\*\.parquet: no object matches; correct the path in data\.sources$"
    ):
        source_identity(source)


def test_what_a_glob_does_not_take_changes_no_identity(store: Store) -> None:
    source = DataSource(path=put(store, **{"data/a.jsonl": lines(["it"])}) + "/data/*.jsonl")
    identity = source_identity(source)
    put(store, **{"data/notes.md": b"later"})
    assert source_identity(source) == identity
    put(store, **{"data/b.jsonl": lines(["it"])})
    assert source_identity(source) != identity


def test_a_corpus_of_objects_is_that_of_the_same_files(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, some in (("a", TEXTS), ("b", TEXTS[::-1])):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines(some))
        put(store, **{f"data/{name}.jsonl": lines(some)})
    train_tokenizer(TEXTS, tmp_path / "tokenizer", vocab_size=270)
    made = []
    for number, path in enumerate((tmp_path / "data", f"s3://{store.bucket}/data")):
        config = DataConfig(sources=(DataSource(path=str(path)),), heldout_fraction=0.2, shard_bytes=1000)
        build_corpus(config, tmp_path / "tokenizer", tmp_path / str(number))
        made.append(artifact(tmp_path / str(number)))
    assert made[0].digest == made[1].digest


def test_the_first_texts_are_read_without_the_rest(store: Store, tmp_path: Path) -> None:
    """Neither a tokenizer nor a look at the source reads the second object, which would be refused."""
    source = DataSource(path=put(store, **{"data/a.jsonl": lines(TEXTS), "data/b.jsonl": b"no json\n"}) + "/data")
    train_tokenizer(TEXTS, tmp_path / "tokenizer", vocab_size=270)
    texts = iter_texts(DataConfig(sources=(source,)))
    assert [next(texts) for _ in range(3)] == TEXTS[:3]
    found = sample(source, tmp_path / "tokenizer", 3, tmp_path)
    every = sum(piece.size or 0 for piece in whole_pieces(source))
    assert len(found.texts) == 3 and found.held == round(every * found.tokens / sum(map(len, found.texts)))


def test_a_pointer_of_git_lfs_is_not_text(store: Store, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    source = DataSource(path=put(store, **{"data/a.txt": pointer}) + "/data")
    with pytest.raises(ValueError, match=r"data/a\.txt: is a Git LFS pointer, not the file itself"):
        list(iter_documents(source, tmp_path))


def test_an_object_that_is_replaced_after_it_was_listed_is_not_read(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DataSource(path=put(store, **{"data/a.jsonl": lines(TEXTS)}) + "/data")

    def listed(uri: str) -> Any:
        found = actual(uri)
        put(store, **{"data/a.jsonl": lines(TEXTS[1:])})
        return found

    actual = documents.listed
    monkeypatch.setattr(documents, "listed", listed)
    with pytest.raises(ServiceError, match=r"data/a\.jsonl was replaced while it was read; run again$"):
        list(iter_documents(source, tmp_path))


def test_a_source_that_changed_since_it_was_identified_is_told(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines(TEXTS))
    sources = [DataSource(path=put(store, **{"data/a.jsonl": lines(TEXTS)}) + "/data"), DataSource(path=str(file))]
    identities = [source_identity(source) for source in sources]
    check_unchanged(sources, identities)
    os.utime(file, ns=(0, 0))
    with pytest.raises(ServiceError, match=rf"^{file} changed while this run was going; run again$"):
        check_unchanged(sources, identities)
    put(store, **{"data/a.jsonl": lines(TEXTS[1:])})
    with pytest.raises(ServiceError, match=r"/data changed while this run was going; run again$"):
        check_unchanged(sources, identities)
