"""The documents that a family is trained and measured on, as a recipe spells them."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from elastic_core.schema import Strict, checked_name, not_negative, positive

TemplateArgument = str | bool | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource(Strict):
    """Documents to train on, and how their rows are read.

    A row with a chat goes through the tokenizer's chat template; any other row is its text. Where nothing says whether
    to think, a turn without a thought is rendered with thinking turned off, if the template can.
    """

    path: str
    """Where the documents are: a file, a directory or a glob, here or as `s3://bucket/...`; `hf://org/name`; or `stdlib://`
    for Python's own texts. Example: `hf://org/name/config`."""
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"
    """How the files are read; `auto` goes by how their names end. Example: `jsonl`."""
    field: str = "text"
    """The column that holds a row's text. Example: `content`."""
    messages_field: str = "messages"
    """The column that holds a chat, a list of messages. Example: `conversation`."""
    tools_field: str = "tools"
    """The column that holds the tools which the chat template is given. Example: `functions`."""
    reasoning_field: str = "reasoning"
    """The column that says `on` or `off`, which the chat template is given as `enable_thinking`.
    Example: `reasoning`."""
    chat_template_kwargs: dict[str, TemplateArgument] = dataclasses.field(default_factory=dict)
    """Arguments for the chat template by name; a row's own column of this name goes before them.
    Example: `{enable_thinking: false}`."""
    special_tokens: Literal["text", "tokens"] = "text"
    """What a special token that a document spells becomes: `text`, its characters, or `tokens`, the token.
    Example: `tokens`."""
    train_on: Literal["all", "assistant"] = "all"
    """What is learned of a chat: `all` of it, or what the `assistant` writes; a text is learned whole.
    Example: `assistant`."""
    split: str = "train"
    """The split to take of a data set on the Hub. Example: `math`."""
    max_documents: int | None = None
    """Documents to take at most; unset, all. Example: `10000`."""
    max_tokens: int | None = None
    """Tokens to take at most; unset, all. Example: `300000000`."""
    max_skipped: int = 0
    """Rows that may be unusable and are left out; one more is an error. Example: `100`."""
    name: str | None = None
    """What a stage's `sources` call this source. Example: `books`."""
    weight: float | None = None
    """The share of the sequences that are drawn from this source, of all its sources' weights; given for every source
    or for none. 0: only where a stage asks for it. Unset, sources count by their tokens. Example: `0.3`."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a file, a glob, a directory, s3://, hf:// or stdlib://")
        if self.name is not None:
            checked_name("source", self.name)
        if self.weight is not None:
            not_negative(self, "weight")
        positive(self, *(name for name in ("max_documents", "max_tokens") if getattr(self, name) is not None))
        not_negative(self, "max_skipped")

    def unweighted(self) -> "DataSource":
        """The same documents, which do not depend on how often they are drawn, nor on a name."""
        return replace(self, name=None, weight=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Strict):
    """What the family is trained and measured on."""

    sources: tuple[DataSource, ...]
    """The sources, in any number; one named twice is seen twice as often. Example: `[{path: texts/*.jsonl}]`."""
    heldout_fraction: float = 0.02
    """The share of the documents that is measured on and never trained on, between 0 and 1. Example: `0.001`."""
    separate_documents: bool = True
    """Whether documents that are packed into one sequence are kept apart: state, convolution and attention begin anew
    with each, in training and in measuring. Example: `false`."""
    shard_bytes: int = 128 * 2**20
    """Bytes of input that one process tokenises at a time, into a file of their own; a run that was killed begins again
    at the first that is not whole. The tokens and their order are the same for any number. Example: `67108864`."""
    seed: int = 0
    """The seed of the choice of what is held out. Example: `1`."""

    def __post_init__(self) -> None:
        positive(self, "shard_bytes")
        if not self.sources:
            raise ValueError("sources is empty; name at least one")
        if not 0 < self.heldout_fraction < 1:
            raise ValueError(f"heldout_fraction={self.heldout_fraction} must lie between 0 and 1")
        names = [source.name for source in self.sources if source.name is not None]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"source {name!r} is named twice; give each source a name of its own")
        weights = [source.weight for source in self.sources]
        if None in weights and any(weight is not None for weight in weights):
            lacking = self.sources[weights.index(None)]
            raise ValueError(f"source {lacking.path} has no weight, and others have one; give all sources one, or none")
        if None not in weights and not any(weights):
            raise ValueError("no source has a weight above 0; raise one, or give none")

    def weights(self, stage: Mapping[str, float] | None = None) -> tuple[float, ...] | None:
        """The weight of each source, by its place, or those that a stage gives; None where they count by tokens."""
        if stage is not None:
            return tuple(0.0 if source.name is None else stage.get(source.name, 0.0) for source in self.sources)
        return tuple(weight for source in self.sources if (weight := source.weight) is not None) or None

    def unweighted(self) -> "DataConfig":
        """The same data as it is tokenised, which does not depend on what is drawn from it, nor on names."""
        return replace(self, sources=tuple(source.unweighted() for source in self.sources))
