"""A split of the corpus as one safetensors file, written in bounded memory.

It holds `tokens` int32 (N,), the documents joined; `document_starts` int64 (D,), the index of each document's first
token, rising, the first 0; and `learned` uint8 (N,), 1 where a token is a target to learn. A file whose tokens are all
learned has no `learned`; one whose documents are read as one text has no `document_starts`.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from elastic_core.files.token_stream import TokenStream
from tasks.corpus.record import SplitRecord

# Room for the longest header of the three tensors, its 8 bytes of length included.
HEADER_BYTES = 512
TOKENS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """The token ids of one document, and a byte for each that is 1 where the token is learned; None: all are."""

    ids: list[int]
    learned: bytes | None = None

    def first(self, tokens: int) -> "Sample":
        """The document cut after so many tokens."""
        return Sample(self.ids[:tokens], None if self.learned is None else self.learned[:tokens])

    @property
    def count_learned(self) -> int:
        return len(self.ids) if self.learned is None else self.learned.count(1)


class TokenFile:
    """Appends documents to a safetensors file.

    Where documents start and what is learned is kept in files in `spool` until `finish` knows the sizes. Documents that
    are not `separate` are read as one text: the file does not say where they start.
    """

    def __init__(self, path: Path, spool: Path, *, separate: bool = True) -> None:
        self.path, self.separate = path, separate
        self.documents = self.tokens = self.learned = 0
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._starts = (spool / f"{path.stem}.starts").open("w+b")
        self._mask = (spool / f"{path.stem}.learned").open("w+b")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._file, self._starts, self._mask):
            file.close()

    def append(self, document: Sample) -> None:
        """Append one document, which holds at least one token."""
        self._starts.write(self.tokens.to_bytes(8, "little"))
        self._file.write(np.asarray(document.ids, dtype="<i4").tobytes())
        if document.learned is not None and self.learned == self.tokens:
            self._all_learned_so_far()
        if document.learned is not None or self.learned < self.tokens:
            self._mask.write(document.learned or b"\x01" * len(document.ids))
        self.documents += 1
        self.tokens += len(document.ids)
        self.learned += document.count_learned

    def append_file(self, directory: Path, split: SplitRecord) -> None:
        """Append the documents of a finished token file, which was written with the same `separate`."""
        stream = TokenStream(directory / split.file)
        starts = stream.document_starts(0, len(stream)) + self.tokens
        self._starts.write(starts.astype("<i8").tobytes())
        if not stream.all_learned and self.learned == self.tokens:
            self._all_learned_so_far()
        masked = not stream.all_learned or self.learned < self.tokens
        for first in range(0, len(stream), TOKENS_AT_ONCE):
            end = min(first + TOKENS_AT_ONCE, len(stream))
            self._file.write(stream.tokens(first, end).astype("<i4").tobytes())
            learned = stream.learned(first, end)
            if masked:
                self._mask.write(learned.tobytes())
            self.learned += int(np.count_nonzero(learned))
        self.documents += split.documents
        self.tokens += len(stream)

    def finish(self) -> SplitRecord:
        """Append the other tensors, and write the header into the room left for it; spaces may fill it up."""
        header, end = {"tokens": _entry("I32", self.tokens, 0, 4 * self.tokens)}, 4 * self.tokens
        if self.separate:
            header["document_starts"] = _entry("I64", self.documents, end, 8 * self.documents)
            end += 8 * self.documents
            self._copy(self._starts)
        if self.learned < self.tokens:
            header["learned"] = _entry("U8", self.tokens, end, self.tokens)
            self._copy(self._mask)
        text = json.dumps(header, separators=(",", ":")).encode().ljust(HEADER_BYTES - 8)
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.close()
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return SplitRecord(
            file=self.path.name,
            documents=self.documents,
            tokens=self.tokens,
            learned=self.learned,
            sha256=sha256,
        )

    def _all_learned_so_far(self) -> None:
        """Begin the mask anew with the tokens before it, all of which are learned."""
        self._mask.seek(0)
        for start in range(0, self.tokens, TOKENS_AT_ONCE):
            self._mask.write(b"\x01" * min(TOKENS_AT_ONCE, self.tokens - start))

    def _copy(self, spooled: BinaryIO) -> None:
        spooled.seek(0)
        shutil.copyfileobj(spooled, self._file)


def _entry(dtype: str, length: int, start: int, size: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": [length], "data_offsets": [start, start + size]}
