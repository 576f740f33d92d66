"""A corpus in shards: what each is read from, and how one is made.

A shard is a function of the recipe, its number, and what the shards before it took of the source that it begins with
(`Taken`), which counts where a source has limits. So any process may make it, at any time, in any order. It is a
directory, which appears whole or not at all: a token file a split, and the record of what it holds.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import write_json
from elastic_core.recipe import DataConfig, DataSource
from elastic_core.schema import build, to_dict
from tasks.corpus.documents import Tally, documents_in
from tasks.corpus.encoding import Encoder
from tasks.corpus.pieces import Piece, piece_rows
from tasks.corpus.record import HELDOUT_FILE, TRAIN_FILE, SourceRecord, SplitRecord
from tasks.corpus.token_file import TokenFile

SHARD_FILE = "shard.json"
TOKENS_PER_REPORT = 1 << 16

# Told so many tokens more; what it raises ends the shard.
Report = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a shard reads of one source, which it names by its place in the recipe."""

    source: int
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int | None:
        """Bytes to read; None where nobody knows."""
        sizes = [piece.size for piece in self.pieces]
        return None if None in sizes else sum(size for size in sizes if size is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What shards took of one source: documents, tokens, and rows that could not be used, the first with reasons."""

    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    first_skipped: tuple[str, ...] = ()

    def and_then(self, record: SourceRecord) -> "Taken":
        return Taken(
            documents=self.documents + record.documents,
            tokens=self.tokens + record.tokens,
            skipped=self.skipped + record.skipped,
            first_skipped=self.first_skipped or record.first_skipped,
        )

    def rest(self, source: DataSource) -> DataSource | None:
        """The source with the limits that are left; None where one is reached."""
        documents = None if source.max_documents is None else source.max_documents - self.documents
        tokens = None if source.max_tokens is None else source.max_tokens - self.tokens
        if any(left is not None and left <= 0 for left in (documents, tokens)):
            return None
        return replace(source, max_documents=documents, max_tokens=tokens)


NOTHING = Taken()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One shard: its number, from 0, and what it reads, in order."""

    number: int
    parts: tuple[Part, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(to_dict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What was made after `before` of the shard of a digest: what was taken of each part, and the token files."""

    shard: str
    before: Taken
    parts: tuple[SourceRecord, ...]
    train: SplitRecord | None = None
    heldout: SplitRecord | None = None

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    def stands(self, before: Taken, source: DataSource) -> bool:
        """Whether the same would be made after `before`, which is what was taken of its first source.

        It may have been made when less was known to be taken. Then it stands if no limit is reached.
        """
        after = before.and_then(self.parts[0])
        return self.before == before or (after.rest(source) is not None and after.skipped <= source.max_skipped)


def plan_shards(pieces: Sequence[Sequence[Piece]], shard_bytes: int) -> tuple[Shard, ...]:
    """The pieces of each source in shards of up to `shard_bytes`, one after the other.

    A piece whose size nobody knows has a shard of its own.
    """
    shards: list[list[tuple[int, Piece]]] = [[]]
    filled: int | None = 0
    for source, piece in ((source, piece) for source, of_source in enumerate(pieces) for piece in of_source):
        if shards[-1] and (filled is None or piece.size is None or filled + piece.size > shard_bytes):
            shards.append([])
            filled = 0
        shards[-1].append((source, piece))
        filled = None if filled is None or piece.size is None else filled + piece.size
    return tuple(
        Shard(
            number=number,
            parts=tuple(
                Part(source=source, pieces=tuple(piece for of, piece in found if of == source))
                for source in dict.fromkeys(of for of, _ in found)
            ),
        )
        for number, found in enumerate(shards)
    )


def is_heldout(digest: bytes, fraction: float, seed: int) -> bool:
    """The side of a document, by its content and `seed` alone: its copies share it, whatever is added later."""
    draw = hashlib.sha256(f"{seed} ".encode() + digest).digest()[:8]
    return int.from_bytes(draw, "little") < fraction * 2**64


def write_shard(
    encoder: Encoder, config: DataConfig, shard: Shard, before: Taken, directory: Path, report: Report
) -> ShardRecord:
    """Tokenise a shard into `directory`, which is there when it is whole.

    ValueError, one line with file, row and remedy, for input that cannot be used.
    """
    with (
        staged_directory(directory) as staging,
        tempfile.TemporaryDirectory(dir=staging) as work,
        TokenFile(staging / TRAIN_FILE, Path(work), separate=config.separate_documents) as train,
        TokenFile(staging / HELDOUT_FILE, Path(work), separate=config.separate_documents) as heldout,
    ):
        writer = _Writer(encoder, config, train, heldout, Path(work, "cache"), report)
        parts = [writer.write(part, NOTHING if i else before) for i, part in enumerate(shard.parts)]
        record = ShardRecord(
            shard=shard.digest,
            before=before,
            parts=tuple(parts),
            train=train.finish() if train.documents else None,
            heldout=heldout.finish() if heldout.documents else None,
        )
        write_json(staging / SHARD_FILE, to_dict(record))
    return record


def read_shard(directory: Path, shard: Shard) -> ShardRecord | None:
    """The record of a shard that is whole; None where it is not, or was made of something else."""
    try:
        text = (directory / SHARD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    record = build(ShardRecord, json.loads(text), SHARD_FILE)
    return record if record.shard == shard.digest else None


class _Writer:
    """Writes the parts of one shard into the files of its two splits."""

    def __init__(
        self, encoder: Encoder, config: DataConfig, train: TokenFile, heldout: TokenFile, cache: Path, report: Report
    ) -> None:
        self._encoder, self._config, self._cache = encoder, config, str(cache)
        self._train, self._heldout = train, heldout
        self._report, self._unreported = report, 0

    def write(self, part: Part, before: Taken) -> SourceRecord:
        """Write documents until the part ends or a limit is reached; the last one is cut at `max_tokens`."""
        config, whole = self._config, self._config.sources[part.source]
        tally = Tally(whole, before.skipped, before.first_skipped)
        source = before.rest(whole)
        content = hashlib.sha256()
        taken = tokens = learned = 0
        train_before = self._train.tokens
        if source is not None:
            found = documents_in(piece_rows(part.pieces, source, self._cache), source)
            for document, samples in self._encoder.samples(found, source, tally):
                digest = document.digest()
                file = self._heldout if is_heldout(digest, config.heldout_fraction, config.seed) else self._train
                for sample in samples:
                    if source.max_tokens is not None:
                        sample = sample.first(source.max_tokens - tokens)
                    if not sample.ids:
                        break
                    file.append(sample)
                    tokens += len(sample.ids)
                    learned += sample.count_learned
                    self._tell(len(sample.ids))
                content.update(digest)
                taken += 1
                if tokens == source.max_tokens:
                    break
        self._tell(0, now=True)
        return SourceRecord(
            documents=taken,
            tokens=tokens,
            train_tokens=self._train.tokens - train_before,
            learned=learned,
            empty=tally.empty,
            skipped=tally.skipped,
            first_skipped=tuple(tally.first),
            unthought=tally.unthought,
            sha256=content.hexdigest(),
        )

    def _tell(self, tokens: int, now: bool = False) -> None:
        self._unreported += tokens
        if now or self._unreported >= TOKENS_PER_REPORT:
            self._report(self._unreported)
            self._unreported = 0
