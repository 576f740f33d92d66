"""Laws of a stream of tokens on disk: the same however it is divided, and larger than any memory."""

import json
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from elastic_core.files.shards import CheckpointError
from elastic_core.files.token_stream import MOST_MAPPED, TokenStream, part_name, stream_files
from elastic_core.recipe import Optimizer, Stage
from elastic_core.training.curriculum import DataOrder
from elastic_core.training.tokens import IGNORED, TokenRows

LENGTH = 8
DOCUMENTS = [3, 9, 1, 20, 7, 4, 5]
HEADER_BYTES = 256
GIB = 2**30


def whole(kind: str) -> dict[str, Tensor]:
    """49 tokens in seven documents; those whose number divides by three are not learned."""
    tokens = torch.arange(100, 100 + sum(DOCUMENTS), dtype=torch.int32)
    tensors = {"tokens": tokens}
    if "documents" in kind:
        tensors["document_starts"] = torch.tensor([0, *np.cumsum(DOCUMENTS)[:-1]])
    if "mask" in kind:
        tensors["learned"] = (torch.arange(len(tokens)) % 3 > 0).to(torch.uint8)
    return tensors


def divide(directory: Path, tensors: Mapping[str, Tensor], counts: list[int]) -> Path:
    """The stream in parts of so many documents each."""
    first_document = first = 0
    for number, documents in enumerate(counts, 1):
        tokens = sum(DOCUMENTS[first_document : first_document + documents])
        part = {name: values[first : first + tokens].clone() for name, values in tensors.items()}
        if "document_starts" in tensors:
            starts = tensors["document_starts"][first_document : first_document + documents]
            part["document_starts"] = starts - first
        save_file(part, directory / part_name("train.safetensors", number, len(counts)))
        first_document, first = first_document + documents, first + tokens
    return directory / "train.safetensors"


@pytest.mark.parametrize("kind", ["tokens", "documents", "mask", "documents and mask"])
@pytest.mark.parametrize("counts", [[7], [1, 6], [3, 4], [2, 1, 1, 3], [1] * 7])
def test_rows_are_the_same_however_the_stream_is_divided(kind: str, counts: list[int], tmp_path: Path) -> None:
    save_file(whole(kind), tmp_path / "whole.safetensors")
    expected = TokenRows(tmp_path / "whole.safetensors", LENGTH)
    found = TokenRows(divide(tmp_path, whole(kind), counts), LENGTH)
    assert found.num_rows == expected.num_rows == (sum(DOCUMENTS) - 1) // LENGTH
    rows = [3, 0, 5, 1, 4, 2]
    ours, theirs = found.batch(rows), expected.batch(rows)
    assert torch.equal(ours.inputs_BT, theirs.inputs_BT) and torch.equal(ours.targets_BT, theirs.targets_BT)
    assert ours.learned == theirs.learned == found.learned(rows) == expected.learned(rows)
    assert (ours.packing is None) == (theirs.packing is None)
    if ours.packing is not None and theirs.packing is not None:
        assert torch.equal(ours.packing.seq_idx_BT, theirs.packing.seq_idx_BT)


def test_a_mask_may_be_in_some_parts_alone(tmp_path: Path) -> None:
    save_file({"tokens": torch.arange(5, dtype=torch.int32)}, tmp_path / "a-00001-of-00002.safetensors")
    mask = torch.tensor([0, 1, 1], dtype=torch.uint8)
    part = {"tokens": torch.arange(5, 8, dtype=torch.int32), "learned": mask}
    save_file(part, tmp_path / "a-00002-of-00002.safetensors")
    stream = TokenStream(tmp_path / "a.safetensors")
    assert stream.learned(3, 8).tolist() == [1, 1, 0, 1, 1]
    assert TokenRows(tmp_path / "a.safetensors", 7).batch([0]).targets_BT.tolist() == [[1, 2, 3, 4, IGNORED, 6, 7]]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["00001-of-00003", "00003-of-00003"], "a-00002-of-00003.safetensors: is missing; a.safetensors needs all"),
        (["00001-of-00002"], "a-00002-of-00002.safetensors: is missing"),
        (["00001-of-00001x", "00002-of-00002"], "a-00001-of-00002.safetensors: is missing"),
        (["00001-of-00002", "00002-of-00002", "00001-of-00001"], "a-00001-of-00001.safetensors: is of another div"),
    ],
)
def test_a_stream_without_all_its_parts_is_refused(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        save_file({"tokens": torch.arange(5, dtype=torch.int32)}, tmp_path / f"a-{name}.safetensors")
    with pytest.raises(CheckpointError, match=message):
        stream_files(tmp_path / "a.safetensors")


def test_parts_that_keep_documents_apart_go_with_no_others(tmp_path: Path) -> None:
    tokens = torch.arange(5, dtype=torch.int32)
    save_file({"tokens": tokens}, tmp_path / "a-00001-of-00002.safetensors")
    save_file({"tokens": tokens, "document_starts": torch.tensor([0])}, tmp_path / "a-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"a-00002-of-00002\.safetensors: only some files of this stream have"):
        TokenStream(tmp_path / "a.safetensors")


def sparse(path: Path, tokens: int, known: Mapping[int, list[int]]) -> None:
    """A file of so many tokens, zeros but for the `known` ones, which takes hardly any disk."""
    header = json.dumps({"tokens": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, 4 * tokens]}}).encode()
    with path.open("wb") as file:
        file.write((HEADER_BYTES - 8).to_bytes(8, "little") + header.ljust(HEADER_BYTES - 8))
        file.truncate(HEADER_BYTES + 4 * tokens)
        for first, values in known.items():
            file.seek(HEADER_BYTES + 4 * first)
            file.write(np.asarray(values, dtype="<i4").tobytes())


def test_a_file_larger_than_memory_is_read_right_at_both_ends_and_beyond_two_to_the_32(tmp_path: Path) -> None:
    count = 60 * GIB // 4
    assert count > 2**32
    far = 2**32 // LENGTH + 1
    sparse(
        tmp_path / "train.safetensors",
        count,
        {0: [*range(1, 10)], far * LENGTH: [*range(11, 20)], count - LENGTH - 1: [*range(21, 30)]},
    )
    rows = TokenRows(tmp_path / "train.safetensors", LENGTH)
    assert rows.num_rows == (count - 1) // LENGTH
    last = TokenStream(tmp_path / "train.safetensors").tokens(count - LENGTH - 1, count)
    assert last.tolist() == [*range(21, 30)]
    batch = rows.batch([far, 0, rows.num_rows - 1])
    assert batch.inputs_BT[:2].tolist() == [[*range(11, 19)], [*range(1, 9)]]
    assert batch.targets_BT[:2].tolist() == [[*range(12, 20)], [*range(2, 10)]]
    end = rows.num_rows * LENGTH + 1 - (count - LENGTH - 1)
    assert batch.targets_BT[2, -end + 1 :].tolist() == [*range(22, 21 + end)]


def test_sixty_five_billion_tokens_in_parts_are_addressed_and_ordered_right(tmp_path: Path) -> None:
    """Stage 1 of the paper's run, its tokens in 20 files of uneven size that no row border meets."""
    length, steps, batch = 8192, 5166, 1536
    sizes = [3_250_000_000 + 1_000_003 * number for number in range(20)]
    firsts = np.cumsum([0, *sizes])
    assert firsts[-1] > length * steps * batch
    for number, size in enumerate(sizes, 1):
        sparse(
            tmp_path / part_name("train.safetensors", number, len(sizes)), size, {0: [2 * number], size - 1: [-number]}
        )
    rows = TokenRows(tmp_path / "train.safetensors", length)
    assert rows.num_rows == (firsts[-1] - 1) // length
    for number in range(1, len(sizes)):
        row, place = divmod(int(firsts[number]) - 1, length)
        targets = rows.batch([row]).targets_BT[0]
        assert targets[place - 1] == -number and targets[place] == 2 * number + 2
        assert int(targets.count_nonzero()) == 2
    stage = Stage(
        name="stage1",
        sequence_length=length,
        batch_size=batch,
        steps=steps,
        budgets={"full": 1},
        optimizer=Optimizer(learning_rate=1e-3),
    )
    order = DataOrder(rows.num_rows, stage, seed=0)
    drawn = order.rows(0) + order.rows(steps - 1)
    assert len(set(drawn)) == 2 * batch and max(drawn) > 2**32 // length
    assert min(drawn) >= 0 and max(drawn) < rows.num_rows


def one_token_a_file(directory: Path, count: int) -> Path:
    for number in range(1, count + 1):
        tensors = {"tokens": torch.tensor([number], dtype=torch.int32), "document_starts": torch.tensor([0])}
        save_file(tensors, directory / part_name("train.safetensors", number, count))
    return directory / "train.safetensors"


def test_a_stream_of_many_files_keeps_few_open(tmp_path: Path) -> None:
    count = 3 * MOST_MAPPED
    path = one_token_a_file(tmp_path, count)
    before = psutil.Process().num_fds()
    stream = TokenStream(path)
    backwards = [int(stream.tokens(place, place + 1)[0]) for place in reversed(range(count))]
    assert backwards == list(range(count, 0, -1))
    assert stream.document_starts(0, count).tolist() == list(range(count))
    assert 0 < psutil.Process().num_fds() - before <= MOST_MAPPED


@contextmanager
def no_more_files() -> Iterator[None]:
    """As where the process has all files open that it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_may_open_no_more_files_says_what_to_raise(tmp_path: Path) -> None:
    path = one_token_a_file(tmp_path, 1)
    with no_more_files(), pytest.raises(CheckpointError, match=r"train.safetensors: .*\(ulimit -n\)$"):
        TokenStream(path)
