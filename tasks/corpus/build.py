"""Turn documents into one flat stream of tokens to train on, and one that is held out.

A split is one token file (token_file.py): its documents joined, each ended by eos. A stage of sequence length L cuts
row i from it as `tokens[i * L : i * L + L + 1]`, so that one file serves every length.
"""

import hashlib
import heapq
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from elastic_core.files.shards import staged_directory, write_json
from elastic_core.recipe import DataConfig, DataSource
from elastic_core.schema import to_dict
from tasks.corpus.documents import Document, Fetch, digest_files, first_line, iter_documents
from tasks.corpus.record import HELDOUT_FILE, RECORD_FILE, TRAIN_FILE, DataRecord, SourceRecord
from tasks.corpus.token_file import Sample, TokenFile
from tasks.corpus.tokenizer import load_tokenizer, tokenizer_files

BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 4_000_000

Progress = Callable[[int, int], None]


def build_corpus(
    config: DataConfig, tokenizer_dir: Path, output_dir: Path, *, fetch: Fetch, progress: Progress | None = None
) -> DataRecord:
    """Tokenise every source of `config` into `output_dir`, split by document, and return the record.

    The directory appears whole or not at all. Memory is bounded by a batch of documents; `progress(documents, tokens)`
    is told the totals so far. ValueError, one line with file, row and remedy, for input that cannot be used.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    with (
        staged_directory(output_dir) as staging,
        tempfile.TemporaryDirectory(dir=staging) as work,
        TokenFile(staging / TRAIN_FILE, Path(work)) as train,
        TokenFile(staging / HELDOUT_FILE, Path(work)) as heldout,
    ):

        def write(digest: bytes, sample: Sample) -> None:
            (heldout if is_heldout(digest, config.heldout_fraction, config.seed) else train).append(sample)
            if progress is not None:
                progress(train.documents + heldout.documents, train.tokens + heldout.tokens)

        sources = []
        for i, source in enumerate(config.sources):
            found = iter_documents(source, fetch=fetch, directory=Path(work, str(i)))
            sources.append(_write_source(source, _encoded(found, tokenizer), write))
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
            (0, i, iter_documents(source, fetch=fetch, directory=Path(work, str(i))))
            for i, source in enumerate(config.sources)
        ]
        while streams:
            characters, i, found = heapq.heappop(streams)
            document = next(found, None)
            if document is None:
                continue
            content = document.content
            text = content if isinstance(content, str) else "\n".join(str(turn.get("content", "")) for turn in content)
            yield text
            heapq.heappush(streams, (characters + len(text), i, found))


def is_heldout(digest: bytes, fraction: float, seed: int) -> bool:
    """The side of a document, by its content and `seed` alone: its copies share it, whatever is added later."""
    draw = hashlib.sha256(f"{seed} ".encode() + digest).digest()[:8]
    return int.from_bytes(draw, "little") < fraction * 2**64


def _write_source(
    source: DataSource, encoded: Iterable[tuple[Document, Sample]], write: Callable[[bytes, Sample], None]
) -> SourceRecord:
    """Write documents until the source ends or `max_tokens` is reached, where the last document is cut."""
    content = hashlib.sha256()
    taken = tokens = 0
    for document, whole in encoded:
        digest = document.digest()
        sample = whole if source.max_tokens is None else whole.first(source.max_tokens - tokens)
        write(digest, sample)
        content.update(digest)
        taken += 1
        tokens += len(sample.ids)
        if source.max_tokens is not None and tokens >= source.max_tokens:
            break
    if not taken:
        raise ValueError(f"{source.path}: the dataset is empty; add documents or take it out of data.sources")
    return SourceRecord(documents=taken, tokens=tokens, sha256=content.hexdigest())


def _encoded(found: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Document, Sample]]:
    """Each document with its token ids, which end in one eos."""
    eos = tokenizer.eos_token_id
    for batch in _batches((document, _render(document, tokenizer)) for document in found):
        texts = [text for _, text in batch]
        # A chat template writes its own special tokens, and a document inside a stream needs no bos.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for (document, _), ids in zip(batch, encoded["input_ids"], strict=True):
            yield document, Sample(ids if ids and ids[-1] == eos else [*ids, eos])


def _batches(rendered: Iterable[tuple[Document, str]]) -> Iterator[list[tuple[Document, str]]]:
    batch: list[tuple[Document, str]] = []
    characters = 0
    for document, text in rendered:
        batch.append((document, text))
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _render(document: Document, tokenizer: PreTrainedTokenizerFast) -> str:
    if isinstance(document.content, str):
        return document.content
    if tokenizer.chat_template is None:
        raise ValueError(f"{document.where} holds messages but the tokenizer has no chat template; add one to it")
    try:
        return str(tokenizer.apply_chat_template(document.content, tokenize=False))
    except Exception as error:
        raise ValueError(f"{document.where}: the chat template refuses it ({first_line(error)}); mend it") from error
