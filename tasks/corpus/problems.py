"""Problems to be answered: chats whose last message is the answer, read and rendered by the rules of the sources."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_core.recipe import DataSource
from tasks.corpus.chats import CLOSE, OPEN, Chat, Row, Unusable, read_chat
from tasks.corpus.documents import iter_rows, parse_row
from tasks.corpus.encoding import Encoder
from tasks.corpus.rendering import render_prompt
from tasks.corpus.template import special_tokens
from tasks.corpus.turns import last_answer, opens_thought

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question in chat form, and the one answer that counts."""

    question: Chat
    answer: str
    task: str
    where: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model reads to answer a question. `thinking`: its last token leaves the model in a thought."""

    ids: list[int]
    thinking: bool

    def answer(self, completion: str) -> str | None:
        """What a completion answers: what follows its last thought; None where a thought does not end."""
        return last_answer(OPEN + completion if self.thinking else completion)


def read_problems(path: Path, limit: int) -> list[Problem]:
    """The first `limit` problems of a JSONL or Parquet file, or of a directory or glob of such files.

    Each row holds `messages`, the last of which is the answer; `task` names the kind of problem. ValueError names the
    row and the remedy.
    """
    source = problems_source(path)
    with tempfile.TemporaryDirectory() as work:
        return [_problem(row, source, where) for where, row in islice(iter_rows(source, Path(work)), limit)]


def problems_source(path: Path) -> DataSource:
    """The file, directory or glob as a source; ValueError where there is none."""
    if not path.exists() and not any(path.parent.glob(path.name)):
        raise ValueError(f"{path}: No such file; correct evaluation.problems")
    return DataSource(path=str(path))


def encode_questions(
    tokenizer: "PreTrainedTokenizerFast", problems: Sequence[Problem], arguments: Mapping[str, Any]
) -> list[Prompt]:
    """The prompt of each problem, under these template arguments and the row's own."""
    return encode_prompts(tokenizer, [(problem.question, problem.where) for problem in problems], arguments)


def encode_prompts(
    tokenizer: "PreTrainedTokenizerFast", questions: Sequence[tuple[Chat, str]], arguments: Mapping[str, Any]
) -> list[Prompt]:
    """The generation prompt of each chat; ValueError, with its place, where the chat template refuses or loses one."""
    encoder = Encoder(tokenizer, ())
    texts = [render_prompt(chat, encoder.template, where, arguments=arguments) for chat, where in questions]
    ids = encoder.encode([(text.text, text) for text in texts])
    return [Prompt(of_text, opens_thought(text.text)) for of_text, text in zip(ids, texts, strict=True)]


def spoken(ids: Sequence[int], tokenizer: "PreTrainedTokenizerFast") -> str:
    """The text of a completion as servers give it: of special tokens it has those alone that stand around a thought."""
    silent = {token for token, spelled in special_tokens(tokenizer).items() if spelled not in (OPEN, CLOSE)}
    return str(tokenizer.decode([token for token in ids if token not in silent]))


def beside_thoughts(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, ...]:
    """The special tokens of a tokenizer to which the marks around a thought are special too, but for these marks.

    A server leaves special tokens out of what it gives unless it is asked for them. Empty where the marks are plain.
    """
    special = set(special_tokens(tokenizer).values())
    return tuple(sorted(special - {OPEN, CLOSE})) if special & {OPEN, CLOSE} else ()


def _problem(row: Row | str, source: DataSource, where: str) -> Problem:
    fields, columns = parse_row(row, where)
    if fields.get(source.messages_field) is None:
        raise Unusable(f"{where} has no 'messages', the last of which is the answer; mend or remove it")
    chat = read_chat(fields, source, where, columns=columns)
    reply = chat.messages[-1].get("content") if chat.messages else None
    answer = last_answer(reply) if isinstance(reply, str) else None
    if not answer:
        raise Unusable(f"{where}: the last message holds no answer; mend or remove it")
    question = replace(chat, messages=chat.messages[:-1])
    return Problem(question=question, answer=answer, task=str(fields.get("task") or "all"), where=where)
