"""Held-out text as it is measured on: batches of rows from all over the corpus."""

from collections.abc import Sequence
from pathlib import Path

from elastic_core.files.checkpoint import CheckpointError
from elastic_core.recipe import Evaluation
from elastic_core.training.tokens import TokenBatch, TokenRows


def heldout_batches(path: Path, settings: Evaluation, vocab_size: int) -> list[TokenBatch]:
    """Held-out tokens in batches, from all over the file, up to the number asked for.

    ValueError when there is not one sequence, or a token that a model of `vocab_size` does not have.
    """
    try:
        rows = TokenRows(path, settings.sequence_length)
    except (OSError, CheckpointError) as error:
        if _is_text(path):
            raise ValueError(
                f"{path} holds text, not tokens; name heldout.safetensors of a prepared corpus, which `elastic run` "
                "leaves in workspace/corpus-*, below .elastic or ELASTIC_HOME"
            ) from error
        raise ValueError(f"{path} holds no tokens ({error}); name heldout.safetensors of a prepared corpus") from error
    if rows.num_rows == 0:
        raise ValueError(
            f"{path} holds no sequence of {settings.sequence_length} tokens; raise data.heldout_fraction or lower "
            "evaluation.sequence_length"
        )
    batches = batches_of(rows, spread(rows.num_rows, settings.heldout_tokens, settings), settings.batch_size)
    highest = max(int(tokens.max()) for batch in batches for tokens in (batch.inputs_BT, batch.targets_BT))
    if highest >= vocab_size:
        raise ValueError(
            f"{path} holds token {highest}, but the model's vocab_size is {vocab_size}; "
            "use tokens of the model's own tokenizer"
        )
    if predicted(batches) == 0:
        raise ValueError(
            f"{path}: none of the {sequences(batches)} sequences read holds a token to learn; hold out more documents"
        )
    return batches


def _is_text(path: Path) -> bool:
    """Whether a file begins with text. A safetensors file begins with a length in 8 bytes, the highest of them 0."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return False
    return len(head) > 0 and all(byte >= 32 or byte in b"\t\r\n" for byte in head)


def spread(rows: int, tokens: int, settings: Evaluation) -> list[int]:
    """As many of a file's rows as hold `tokens`, at even distances: its sources lie one after the other."""
    count = min(rows, max(1, tokens // settings.sequence_length))
    return [place * rows // count for place in range(count)]


def batches_of(rows: TokenRows, chosen: Sequence[int], size: int) -> list[TokenBatch]:
    """The chosen rows, `size` of them together."""
    return [rows.batch(chosen[start : start + size]) for start in range(0, len(chosen), size)]


def sequences(batches: list[TokenBatch]) -> int:
    """The rows of all batches."""
    return sum(len(batch.inputs_BT) for batch in batches)


def predicted(batches: list[TokenBatch]) -> int:
    """The tokens whose loss counts: those learned, and not the first of a sequence or of a document."""
    return sum(batch.learned for batch in batches)
