"""Laws of the token file: what is appended is what safetensors reads, whatever is learned."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.corpus import token_file
from tasks.corpus.token_file import Sample, SplitRecord, TokenFile


def written(directory: Path, documents: list[Sample]) -> tuple[SplitRecord, dict[str, torch.Tensor]]:
    with TokenFile(directory / "train.safetensors", directory) as file:
        for document in documents:
            file.append(document)
        record = file.finish()
    return record, load_file(directory / "train.safetensors")


def test_a_file_all_of_whose_tokens_are_learned_holds_no_mask(tmp_path: Path) -> None:
    record, tensors = written(tmp_path, [Sample([5, 6, 2]), Sample([7, 2]), Sample([9])])
    assert set(tensors) == {"tokens", "document_starts"}
    assert tensors["tokens"].dtype == torch.int32 and tensors["tokens"].tolist() == [5, 6, 2, 7, 2, 9]
    assert tensors["document_starts"].dtype == torch.int64 and tensors["document_starts"].tolist() == [0, 3, 5]
    assert (record.documents, record.tokens, record.learned) == (3, 6, 6)
    assert record.sha256 == hashlib.sha256((tmp_path / "train.safetensors").read_bytes()).hexdigest()


def test_documents_that_are_not_separate_are_one_text(tmp_path: Path) -> None:
    with TokenFile(tmp_path / "train.safetensors", tmp_path, separate=False) as file:
        for document in (Sample([5, 6, 2]), Sample([7, 2], b"\x00\x01")):
            file.append(document)
        record = file.finish()
    tensors = load_file(tmp_path / "train.safetensors")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "tokens": [5, 6, 2, 7, 2],
        "learned": [1, 1, 1, 0, 1],
    }
    assert (record.documents, record.tokens, record.learned) == (2, 5, 4)


@pytest.mark.parametrize("at", range(3))
def test_the_mask_covers_every_token_wherever_the_first_unlearned_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(token_file, "TOKENS_AT_ONCE", 2)
    documents = [Sample([5, 6, 2]), Sample([7, 2]), Sample([9, 9, 9, 2])]
    documents[at] = Sample(documents[at].ids, bytes([0] + [1] * (len(documents[at].ids) - 1)))
    record, tensors = written(tmp_path, documents)
    expected = [1] * 9
    expected[[0, 3, 5][at]] = 0
    assert tensors["learned"].dtype == torch.uint8 and tensors["learned"].tolist() == expected
    assert record.learned == 8


def test_a_mask_of_ones_alone_is_no_mask(tmp_path: Path) -> None:
    record, tensors = written(tmp_path, [Sample([5, 2], b"\x01\x01"), Sample([6, 2])])
    assert "learned" not in tensors and record.learned == 4


def test_the_longest_header_has_room(tmp_path: Path) -> None:
    with TokenFile(tmp_path / "train.safetensors", tmp_path) as file:
        file.tokens, file.documents = 10**15, 10**14
        file._copy = lambda spooled: None  # type: ignore[method-assign]
        file.finish()
    assert (tmp_path / "train.safetensors").stat().st_size == token_file.HEADER_BYTES


def test_a_cut_document_keeps_its_mask_in_step() -> None:
    assert Sample([1, 2, 3], b"\x00\x01\x01").first(2) == Sample([1, 2], b"\x00\x01")
    assert Sample([1, 2, 3]).first(2) == Sample([1, 2])


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("masked", [(), (0,), (1,), (2,), (0, 2)])
def test_files_joined_are_the_file_of_all_their_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separate: bool, masked: tuple[int, ...]
) -> None:
    monkeypatch.setattr(token_file, "TOKENS_AT_ONCE", 2)
    documents = [[Sample([5, 6, 2]), Sample([7, 2])], [Sample([9, 9, 9, 2])], [Sample([1, 2]), Sample([3])]]
    for at in masked:
        documents[at][0] = Sample(documents[at][0].ids, bytes([0] + [1] * (len(documents[at][0].ids) - 1)))
    records = []
    for at, of_file in enumerate(documents):
        with TokenFile(tmp_path / f"{at}.safetensors", tmp_path, separate=separate) as file:
            for document in of_file:
                file.append(document)
            records.append(file.finish())
    with (
        TokenFile(tmp_path / "joined.safetensors", tmp_path, separate=separate) as joined,
        TokenFile(tmp_path / "whole.safetensors", tmp_path, separate=separate) as whole,
    ):
        for record in records:
            joined.append_file(tmp_path, record)
        for of_file in documents:
            for document in of_file:
                whole.append(document)
        found, expected = joined.finish(), whole.finish()
    assert (tmp_path / "joined.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert (found.documents, found.tokens, found.learned) == (expected.documents, expected.tokens, expected.learned)
