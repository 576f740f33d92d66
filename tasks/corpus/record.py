"""What a corpus is on disk: its files, and the record of what they hold.

Apart from how it is built, so that the steps that read a corpus do not depend on that code.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from elastic_core.schema import build

TRAIN_FILE, HELDOUT_FILE, RECORD_FILE = "train.safetensors", "heldout.safetensors", "data.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRecord:
    """One split: the name of its file, the file's SHA-256, and what it holds.

    A split that lies divided (token_stream.py) has the SHA-256 of each of its `parts`, by name and in order, and one
    over them. A chat whose earlier thoughts are dropped by its template is several documents of a split.
    """

    file: str
    documents: int
    tokens: int
    learned: int
    sha256: str
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, str]:
        """The SHA-256 of each file of the split, by name."""
        return self.parts or {self.file: self.sha256}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord:
    """What was taken from one source, wherever it lay; `train_tokens` of the tokens are not held out.

    `sha256` is over the digests of its parts, one a shard, each of which is over the digests of its documents. Rows
    without content are `empty`; those that cannot be used are `skipped`, the first of them with their reasons.
    `unthought` turns of chats have no thought, were not said to have none, and were rendered with thinking turned off.
    """

    documents: int = 0
    tokens: int = 0
    train_tokens: int = 0
    learned: int = 0
    empty: int = 0
    skipped: int = 0
    first_skipped: tuple[str, ...] = ()
    unthought: int = 0
    sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecord:
    """What `build_corpus` made, and of what; kept beside the tokens as `data.json`."""

    sources: tuple[SourceRecord, ...]
    tokenizer_sha256: str
    train: SplitRecord
    heldout: SplitRecord


def read_record(output_dir: Path) -> DataRecord:
    """The record that `build_corpus` left in `output_dir`."""
    return build(DataRecord, json.loads((output_dir / RECORD_FILE).read_text(encoding="utf-8")), RECORD_FILE)


def check_length(name: str, tokens: int, sequence_length: int) -> None:
    """ValueError unless there are tokens for at least one sequence and the token that follows it."""
    if tokens <= sequence_length:
        raise ValueError(
            f"{name} holds {tokens} tokens, too few for a sequence of {sequence_length} and its next; "
            "add data or shorten sequence_length"
        )
