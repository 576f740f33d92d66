"""What a row of tokens carries: its targets, what is learned of them, and which document each token is of."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from elastic_core.files.shards import CheckpointError
from elastic_core.training.tokens import IGNORED, Portion, TokenRows

LENGTH = 8
STREAM = torch.arange(100, 141, dtype=torch.int32)  # five rows of 8 and a last target
STARTS = [0, 5, 8, 9, 24, 39, 40]
UNLEARNED = [1, 2, 8, 17, 40]


def write(path: Path, **tensors: Tensor) -> Path:
    save_file({"tokens": STREAM, **tensors}, path)
    return path


def learned() -> Tensor:
    mask = torch.ones(len(STREAM), dtype=torch.uint8)
    mask[UNLEARNED] = 0
    return mask


FILES: dict[str, Mapping[str, Tensor]] = {
    "tokens alone": {},
    "documents": {"document_starts": torch.tensor(STARTS)},
    "a mask": {"learned": learned()},
    "documents and a mask": {"document_starts": torch.tensor(STARTS), "learned": learned()},
}


@pytest.mark.parametrize("kind", FILES)
def test_rows_carry_next_tokens_where_they_are_learned_and_the_documents_apart(kind: str, tmp_path: Path) -> None:
    """Against the contract of the file, token by token."""
    rows = TokenRows(write(tmp_path / "tokens.safetensors", **FILES[kind]), LENGTH)
    assert rows.num_rows == 5
    batch = rows.batch([3, 0, 4, 1])
    kept_apart = "document_starts" in FILES[kind]
    numbers = [[] for _ in range(4)]
    count = 0
    for at, row in enumerate([3, 0, 4, 1]):
        for t in range(LENGTH):
            token, target = row * LENGTH + t, row * LENGTH + t + 1
            is_learned = ("learned" not in FILES[kind] or target not in UNLEARNED) and not (
                kept_apart and target in STARTS
            )
            count += is_learned
            assert batch.inputs_BT[at, t] == STREAM[token]
            assert batch.targets_BT[at, t] == (STREAM[target] if is_learned else IGNORED)
            numbers[at].append(sum(row * LENGTH < start <= token for start in STARTS))
    assert batch.learned == rows.learned([3, 0, 4, 1]) == count
    if kept_apart:
        assert batch.packing is not None
        assert batch.packing.seq_idx_BT.tolist() == numbers
    else:
        assert batch.packing is None


def test_rows_without_a_border_carry_no_packing(tmp_path: Path) -> None:
    rows = TokenRows(write(tmp_path / "tokens.safetensors", document_starts=torch.tensor([0, 16])), LENGTH)
    assert rows.batch([0, 1, 3]).packing is None
    assert rows.batch([1]).targets_BT[0, -1] == IGNORED  # the first token of the next document, in the next row


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"tokens": STREAM.long()}, r"tokens is torch.int64 \[41\]; expected one row of torch.int32"),
        ({"tokens": STREAM[None]}, r"tokens is torch.int32 \[1, 41\]; expected one row"),
        ({"document_starts": torch.tensor([1, 5])}, "document_starts do not rise from 0 to below 41"),
        ({"document_starts": torch.tensor([0, 41])}, "document_starts do not rise from 0 to below 41"),
        ({"document_starts": torch.tensor([], dtype=torch.int64)}, "document_starts do not rise from 0"),
        ({"document_starts": torch.tensor([0, 5, 5, 9])}, "document_starts do not rise between"),
        ({"learned": torch.ones(40, dtype=torch.uint8)}, "learned has 40 entries for 41 tokens"),
        ({"learned": torch.ones(41)}, "learned is torch.float32"),
    ],
)
def test_a_file_against_the_contract_is_refused_in_one_line(
    tensors: Mapping[str, Tensor], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "tokens.safetensors", **tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        TokenRows(path, LENGTH).batch([0, 1])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tokens is missing"):
        TokenRows(tmp_path / "model.safetensors", LENGTH)


def test_rows_of_portions_are_those_that_each_would_have_by_itself(tmp_path: Path) -> None:
    """Of 41 tokens, 20 are two rows, 4 none, and 17 two."""
    path = write(tmp_path / "tokens.safetensors", document_starts=torch.tensor([0, 5, 20, 24, 30]), learned=learned())
    portions = [Portion(tokens=20, weight=0.5), Portion(tokens=4, weight=0.0), Portion(tokens=17, weight=2.0)]
    rows = TokenRows(path, LENGTH, portions)
    assert rows.num_rows == 4 and rows.drawn == ((2, 0.5), (0, 0.0), (2, 2.0))
    batch = rows.batch([3, 0, 1, 2])
    assert batch.inputs_BT[:, 0].tolist() == [132, 100, 108, 124]
    whole = TokenRows(path, LENGTH)
    assert torch.equal(batch.targets_BT, whole.batch([4, 0, 1, 3]).targets_BT)
    assert rows.learned([3, 1]) == whole.learned([4, 1])


def test_portions_of_other_data_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "tokens.safetensors")
    with pytest.raises(CheckpointError, match="holds 41 tokens, and its sources 40; prepare the data again"):
        TokenRows(path, LENGTH, [Portion(tokens=20, weight=1), Portion(tokens=20, weight=1)])
