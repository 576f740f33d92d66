"""The first documents of a source, as they would be trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elastic_core.recipe import DataSource
from tasks.corpus.documents import Tally, documents_in, whole_pieces
from tasks.corpus.encoding import Encoder
from tasks.corpus.ends import end_tokens
from tasks.corpus.pieces import COMPRESSED, Piece, piece_rows
from tasks.corpus.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The first texts of a source, decoded from their tokens, and how many tokens these are and are learned.

    `held`: tokens of the whole source, about and at the most; None where only reading it tells.
    """

    texts: list[str]
    tokens: int
    learned: int
    held: int | None


def sample(source: DataSource, tokenizer_dir: Path, count: int, cache_dir: Path) -> Sample:
    """The texts of at most `count` documents, as they would be trained on.

    `cache_dir` takes the lock files of `datasets`. ValueError, one line with file, row and remedy, for a row that
    cannot be used.
    """
    first = replace(source, max_documents=min(count, source.max_documents or count))
    tokenizer, tally = load_tokenizer(tokenizer_dir), Tally(first)
    encoder = Encoder(tokenizer, end_tokens(tokenizer_dir))
    pieces = whole_pieces(first)
    documents = documents_in(piece_rows(pieces, first, str(cache_dir)), first)
    read = [found for _, found in encoder.samples(documents, first, tally)]
    samples = [each for found in read for each in found]
    texts, tokens = [str(tokenizer.decode(each.ids)) for each in samples], sum(len(each.ids) for each in samples)
    learned = sum(each.count_learned for each in samples)
    whole = len(read) < count or len(read) == source.max_documents
    held = tokens if whole else _held(source, pieces, texts, tokens)
    return Sample(texts=texts, tokens=tokens, learned=learned, held=held)


def _held(source: DataSource, pieces: Sequence[Piece], texts: Sequence[str], tokens: int) -> int | None:
    """The bytes of all files, at these texts' tokens for a byte; the JSON around a text counts as if it were text."""
    told = [piece for piece in pieces if piece.format != "parquet" and not piece.name.endswith(COMPRESSED)]
    sizes = [piece.size for piece in told if piece.size is not None]
    if len(sizes) < len(pieces) or not texts:
        return None
    held = sum(sizes) * tokens / max(1, sum(len(text.encode()) for text in texts))
    by_documents = held if source.max_documents is None else source.max_documents * tokens / len(texts)
    return round(min(held, by_documents, source.max_tokens or held))
