"""Laws of the encoder: what is read ahead is bounded, given in its order, and left when nobody takes more."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from templates import write_tokenizer

from elastic_core.recipe import DataSource
from tasks.corpus import encoding
from tasks.corpus.documents import Document, Tally
from tasks.corpus.encoding import Encoder
from tasks.corpus.tokenizer import load_tokenizer

BATCH, MOST = 100, 400  # characters


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Encoder:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", BATCH)
    monkeypatch.setattr(encoding, "MOST_CHARACTERS", MOST)
    write_tokenizer(tmp_path, "ours")
    return Encoder(load_tokenizer(tmp_path), ())


class Reader:
    """Documents of so many characters, and how many were read."""

    def __init__(self, characters: int) -> None:
        self.characters, self.read = characters, 0

    def __iter__(self) -> Iterator[Document]:
        for self.read in range(1, 31):
            yield Document(f"{self.read} ".ljust(self.characters, "x"), str(self.read))


@pytest.mark.parametrize(("characters", "ahead"), [(50, 5), (150, 2), (350, 1), (1000, 0)])
def test_documents_are_read_ahead_up_to_a_stated_size_and_given_in_order(
    encoder: Encoder, characters: int, ahead: int
) -> None:
    source, reader = DataSource(path="x"), Reader(characters)
    given, most = [], 0
    for document, _ in encoder.samples(reader, source, Tally(source)):
        given.append(document.where)
        most = max(most, reader.read - len(given))
    assert given == [str(number) for number in range(1, 31)] and most == ahead


def test_nothing_goes_on_where_no_more_is_taken(encoder: Encoder) -> None:
    source, before = DataSource(path="x"), threading.active_count()
    found = encoder.samples(Reader(50), source, Tally(source))
    next(found)
    found.close()
    assert threading.active_count() == before
