"""Turn documents into one flat stream of tokens to train on, and one that is held out.

A split is one safetensors file with one tensor, `tokens` (int32): its documents joined, each ended by eos. A stage of
sequence length L cuts row i from it as `tokens[i * L : i * L + L + 1]`, so that one file serves every length.
"""

import hashlib
import heapq
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from transformers import PreTrainedTokenizerFast

from elastic_core.files.shards import staged_directory, write_json
from elastic_core.recipe import DataConfig, DataSource
from elastic_core.schema import build, to_dict
from tasks.corpus.documents import Document, Fetch, digest_files, first_line, iter_documents
from tasks.corpus.tokenizer import load_tokenizer, tokenizer_files

TRAIN_FILE, HELDOUT_FILE, RECORD_FILE = "train.safetensors", "heldout.safetensors", "data.json"
BATCH_DOCUMENTS, BATCH_CHARACTERS = 512, 4_000_000
# Room for the longest header of one tensor, its 8 bytes of length included.
HEADER_BYTES = 128

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """What was taken from one source, wherever it lay. `sha256` is over the digests of its documents, in order."""

    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """One split: the name of its file and the file's SHA-256."""

    file: str
    documents: int
    tokens: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecord:
    """What `prepare_data` made, and of what; kept beside the tokens as `data.json`."""

    sources: tuple[SourceRecord, ...]
    tokenizer_sha256: str
    train: SplitRecord
    heldout: SplitRecord


def prepare_data(
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
        TokenFile(staging / TRAIN_FILE) as train,
        TokenFile(staging / HELDOUT_FILE) as heldout,
    ):

        def write(digest: bytes, ids: list[int]) -> None:
            (heldout if is_heldout(digest, config.heldout_fraction, config.seed) else train).append(ids)
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


def read_record(output_dir: Path) -> DataRecord:
    """The record that `prepare_data` left in `output_dir`."""
    return build(DataRecord, json.loads((output_dir / RECORD_FILE).read_text(encoding="utf-8")), RECORD_FILE)


def check_length(split: SplitRecord, sequence_length: int) -> None:
    """ValueError unless the split holds at least one sequence and the token that follows it."""
    if split.tokens <= sequence_length:
        raise ValueError(
            f"{split.file} holds {split.tokens} tokens, too few for a sequence of {sequence_length} and its next; "
            "add data or shorten sequence_length"
        )


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
    source: DataSource, encoded: Iterable[tuple[Document, list[int]]], write: Callable[[bytes, list[int]], None]
) -> SourceRecord:
    """Write documents until the source ends or `max_tokens` is reached; the last document stays whole."""
    content = hashlib.sha256()
    taken = tokens = 0
    for document, ids in encoded:
        digest = document.digest()
        write(digest, ids)
        content.update(digest)
        taken += 1
        tokens += len(ids)
        if source.max_tokens is not None and tokens >= source.max_tokens:
            break
    if not taken:
        raise ValueError(f"{source.path}: the dataset is empty; add documents or take it out of data.sources")
    return SourceRecord(documents=taken, tokens=tokens, sha256=content.hexdigest())


def _encoded(found: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its token ids, which end in one eos."""
    eos = tokenizer.eos_token_id
    for batch in _batches((document, _render(document, tokenizer)) for document in found):
        texts = [text for _, text in batch]
        # A chat template writes its own special tokens, and a document inside a stream needs no bos.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for (document, _), ids in zip(batch, encoded["input_ids"], strict=True):
            yield document, ids if ids and ids[-1] == eos else [*ids, eos]


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


class TokenFile:
    """Token ids appended to a safetensors file in bounded memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = self.tokens = 0
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, ids: list[int]) -> None:
        """Append one document."""
        self._file.write(np.asarray(ids, dtype="<i4").tobytes())
        self.documents += 1
        self.tokens += len(ids)

    def finish(self) -> SplitRecord:
        """Write the header, which only now is known, into the room left for it; spaces may fill it up."""
        tensor = {"dtype": "I32", "shape": [self.tokens], "data_offsets": [0, 4 * self.tokens]}
        header = json.dumps({"tokens": tensor}, separators=(",", ":")).encode().ljust(HEADER_BYTES - 8)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.close()
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return SplitRecord(file=self.path.name, documents=self.documents, tokens=self.tokens, sha256=sha256)
