"""Turn documents into one flat stream of tokens to train on, and one that is held out.

A split is one token file (token_file.py): its documents joined, each ended by eos. A stage of sequence length L cuts
row i from it as `tokens[i * L : i * L + L + 1]`, so that one file serves every length.
"""

import hashlib
import heapq
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from elastic_core.files.shards import staged_directory, write_json
from elastic_core.recipe import DataConfig, DataSource
from elastic_core.schema import to_dict
from tasks.corpus.documents import Document, Fetch, Tally, digest_files, iter_documents
from tasks.corpus.encoding import Encoder
from tasks.corpus.ends import end_tokens
from tasks.corpus.record import HELDOUT_FILE, RECORD_FILE, TRAIN_FILE, DataRecord, SourceRecord
from tasks.corpus.token_file import Sample, TokenFile
from tasks.corpus.tokenizer import load_tokenizer, tokenizer_files

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def build_corpus(
    config: DataConfig, tokenizer_dir: Path, output_dir: Path, *, fetch: Fetch, progress: Progress | None = None
) -> DataRecord:
    """Tokenise every source of `config` into `output_dir`, split by document, and return the record.

    The directory appears whole or not at all. Memory is bounded by a batch of documents; `progress(documents, tokens)`
    is told the totals so far. ValueError, one line with file, row and remedy, for input that cannot be used.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    encoder = Encoder(tokenizer, end_tokens(tokenizer_dir))
    with (
        staged_directory(output_dir) as staging,
        tempfile.TemporaryDirectory(dir=staging) as work,
        TokenFile(staging / TRAIN_FILE, Path(work), separate=config.separate_documents) as train,
        TokenFile(staging / HELDOUT_FILE, Path(work), separate=config.separate_documents) as heldout,
    ):

        def write(digest: bytes, sample: Sample) -> None:
            (heldout if is_heldout(digest, config.heldout_fraction, config.seed) else train).append(sample)
            if progress is not None:
                progress(train.documents + heldout.documents, train.tokens + heldout.tokens)

        sources = []
        for i, source in enumerate(config.sources):
            tally = Tally(source)
            found = iter_documents(source, fetch=fetch, directory=Path(work, str(i)), tally=tally)
            sources.append(_write_source(source, encoder.samples(found, source, tally), tally, write))
        if not train.documents or not heldout.documents:
            raise ValueError(
                f"{train.documents + heldout.documents} documents leave {train.documents} to train on and "
                f"{heldout.documents} held out at heldout_fraction={config.heldout_fraction}; "
                "add documents (a text file is one) or change the fraction"
            )
        record = DataRecord(
            sources=tuple(sources),
            tokenizer_sha256=digest_files(tokenizer_files(tokenizer_dir)),
            train=train.finish(),
            heldout=heldout.finish(),
        )
        write_json(staging / RECORD_FILE, to_dict(record))
    return record


def iter_texts(config: DataConfig, *, fetch: Fetch) -> Iterator[str]:
    """The texts of all sources, an equal amount from each until it ends: what a tokenizer is best trained on."""
    with tempfile.TemporaryDirectory() as work:
        streams = [
            (0, i, islice(iter_documents(source, fetch=fetch, directory=Path(work, str(i))), source.max_documents))
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


def is_heldout(digest: bytes, fraction: float, seed: int) -> bool:
    """The side of a document, by its content and `seed` alone: its copies share it, whatever is added later."""
    draw = hashlib.sha256(f"{seed} ".encode() + digest).digest()[:8]
    return int.from_bytes(draw, "little") < fraction * 2**64


def _write_source(
    source: DataSource,
    encoded: Iterable[tuple[Document, list[Sample]]],
    tally: Tally,
    write: Callable[[bytes, Sample], None],
) -> SourceRecord:
    """Write documents until the source ends or a limit is reached; the last one is cut at `max_tokens`."""
    content = hashlib.sha256()
    taken = tokens = learned = 0
    for document, samples in encoded:
        digest = document.digest()
        for whole in samples:
            sample = whole if source.max_tokens is None else whole.first(source.max_tokens - tokens)
            if not sample.ids:
                break
            write(digest, sample)
            tokens += len(sample.ids)
            learned += sample.count_learned
        content.update(digest)
        taken += 1
        if tokens == source.max_tokens:
            break
    if not taken:
        raise ValueError(f"{source.path}: the dataset is empty; add documents or take it out of data.sources")
    if tally.skipped:
        logger.warning(
            "%s: %d rows cannot be used and were skipped; the first: %s",
            source.path,
            tally.skipped,
            tally.first[0],
        )
    if tally.unthought:
        logger.warning(
            "%s: %d turns have no thought and are rendered with thinking turned off; say `reasoning: off` in the rows, "
            "or chat_template_kwargs: {enable_thinking: ...} in the source, if that is known",
            source.path,
            tally.unthought,
        )
    return SourceRecord(
        documents=taken,
        tokens=tokens,
        learned=learned,
        empty=tally.empty,
        skipped=tally.skipped,
        first_skipped=tuple(tally.first),
        unthought=tally.unthought,
        sha256=content.hexdigest(),
    )
