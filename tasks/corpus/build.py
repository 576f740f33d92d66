"""Turn documents into one flat stream of tokens to train on, and one that is held out.

The stream to train on is the documents of one source after the other, each ended by eos, in one token file or in
several (token_stream.py); what is held out is in one. A stage of sequence length L cuts row i from it as
`tokens[i * L : i * L + L + 1]`, so that one corpus serves every length. The sources are read in shards (shards.py).
"""

import hashlib
import heapq
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import write_json
from elastic_core.files.token_stream import part_name
from elastic_core.recipe import DataConfig, DataSource
from elastic_core.schema import to_dict
from tasks.corpus.documents import SHOWN, digest_files, iter_documents, source_pieces
from tasks.corpus.record import HELDOUT_FILE, RECORD_FILE, TRAIN_FILE, DataRecord, SourceRecord, SplitRecord
from tasks.corpus.shards import SHARD_FILE, Shard, ShardRecord, plan_shards
from tasks.corpus.token_file import TokenFile
from tasks.corpus.tokenizer import tokenizer_files
from tasks.corpus.workers import Others, Progress, ShardMaker, make_shards
from tasks.running.digests import file_digest
from tasks.settings import ServiceError

# A split of one shard, and the shard's directory.
Split = tuple[Path, SplitRecord]

logger = logging.getLogger(__name__)


def build_corpus(
    config: DataConfig,
    tokenizer_dir: Path,
    output_dir: Path,
    *,
    work: Path | None = None,
    processes: int = 1,
    others: Others | None = None,
    progress: Progress | None = None,
) -> DataRecord:
    """Tokenise every source of `config` into `output_dir`, split by document, and return the record.

    The directory appears whole or not at all, and is the same for any number of `processes`, here or of `others`. With
    `work`, a directory that only this corpus has, what a killed run has made there is not made again. Memory is bounded
    by a few batches of documents in each process. ValueError, one line with file, row and remedy, for input that cannot
    be used.
    """
    with _workplace(work, output_dir) as place:
        pieces = [source_pieces(source, place / "cache", config.shard_bytes) for source in config.sources]
        shards = plan_shards(pieces, config.shard_bytes)
        maker = ShardMaker(config=config, tokenizer=tokenizer_dir, directory=place)
        made = make_shards(maker, shards, processes, progress or (lambda tokens, expected: None), others)
        sources = tuple(_source_record(i, source, shards, made) for i, source in enumerate(config.sources))
        train = [(maker.place(shard), one.train) for shard, one in zip(shards, made, strict=True) if one.train]
        heldout = [(maker.place(shard), one.heldout) for shard, one in zip(shards, made, strict=True) if one.heldout]
        _check_sides(train, heldout, config.heldout_fraction)
        with staged_directory(output_dir) as staging:
            record = DataRecord(
                sources=sources,
                tokenizer_sha256=digest_files(tokenizer_files(tokenizer_dir)),
                train=_divided(staging, train),
                heldout=_joined(staging, heldout, config),
            )
            write_json(staging / RECORD_FILE, to_dict(record))
    return record


def iter_texts(config: DataConfig) -> Iterator[str]:
    """The texts of all sources, an equal amount from each until it ends: what a tokenizer is best trained on."""
    with tempfile.TemporaryDirectory() as work:
        streams = [
            (0, i, islice(iter_documents(source, Path(work)), source.max_documents))
            for i, source in enumerate(config.sources)
        ]
        while streams:
            characters, i, found = heapq.heappop(streams)
            document = next(found, None)
            if document is None:
                continue
            content = document.content
            text = content if isinstance(content, str) else "\n".join(content.texts())
            yield text
            heapq.heappush(streams, (characters + len(text), i, found))


@contextmanager
def _workplace(work: Path | None, output_dir: Path) -> Iterator[Path]:
    """Where shards are made: `work`, which outlives a run that fails, or a directory beside the output."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as own:
        yield Path(own)


def _source_record(
    number: int, source: DataSource, shards: Sequence[Shard], made: Sequence[ShardRecord]
) -> SourceRecord:
    """What all shards took of a source. ValueError for a source without documents; a line for what was left out."""
    taken = [
        of_part
        for shard, record in zip(shards, made, strict=True)
        for part, of_part in zip(shard.parts, record.parts, strict=True)
        if part.source == number
    ]
    counts = ("documents", "tokens", "train_tokens", "learned", "empty", "skipped", "unthought")
    content = hashlib.sha256("".join(part.sha256 for part in taken if part.documents).encode())
    found = SourceRecord(
        **{name: sum(getattr(part, name) for part in taken) for name in counts},
        first_skipped=tuple(fault for part in taken for fault in part.first_skipped)[:SHOWN],
        sha256=content.hexdigest(),
    )
    if not found.documents:
        raise ValueError(f"{source.path}: the dataset is empty; add documents or take it out of data.sources")
    if found.skipped:
        logger.warning(
            "%s: %d rows cannot be used and were skipped; the first: %s",
            source.path,
            found.skipped,
            found.first_skipped[0],
        )
    if found.unthought:
        logger.warning(
            "%s: %d turns have no thought and are rendered with thinking turned off; say `reasoning: off` in the rows, "
            "or chat_template_kwargs: {enable_thinking: ...} in the source, if that is known",
            source.path,
            found.unthought,
        )
    return found


def _check_sides(train: Sequence[Split], heldout: Sequence[Split], fraction: float) -> None:
    if train and heldout:
        return
    learned, measured = (sum(split.documents for _, split in side) for side in (train, heldout))
    raise ValueError(
        f"{learned + measured} documents leave {learned} to train on and {measured} held out at "
        f"heldout_fraction={fraction}; add documents (a text file is one) or change the fraction"
    )


def _divided(directory: Path, files: Sequence[Split]) -> SplitRecord:
    """The token files of the shards as the parts of one stream."""
    digests = {}
    for number, (place, split) in enumerate(files, 1):
        name = part_name(TRAIN_FILE, number, len(files))
        digests[name] = split.sha256
        _link(place / split.file, directory / name)
    alone = len(files) == 1
    return SplitRecord(
        file=TRAIN_FILE,
        documents=sum(split.documents for _, split in files),
        tokens=sum(split.tokens for _, split in files),
        learned=sum(split.learned for _, split in files),
        sha256=digests[TRAIN_FILE] if alone else hashlib.sha256("".join(digests.values()).encode()).hexdigest(),
        parts={} if alone else digests,
    )


def _joined(directory: Path, files: Sequence[Split], config: DataConfig) -> SplitRecord:
    """The token files of the shards as one, each compared with its record: they may be of a run of days ago."""
    with (
        tempfile.TemporaryDirectory(dir=directory) as spool,
        TokenFile(directory / HELDOUT_FILE, Path(spool), separate=config.separate_documents) as joined,
    ):
        for place, split in files:
            if file_digest(place / split.file) != split.sha256:
                (place / SHARD_FILE).unlink()  # the next attempt makes this shard anew
                raise ServiceError(f"{place / split.file} is not what was written to it; run again", transient=True)
            joined.append_file(place, split)
        return joined.finish()


def _link(file: Path, place: Path) -> None:
    """The same file in another place; a copy where the file system has no links."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)
