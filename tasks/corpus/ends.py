"""The tokens at which a model ends a text, by the several files of its checkpoint that name them."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from tasks.corpus.chats import ASSISTANT, Chat, Unusable
from tasks.corpus.rendering import render_chat
from tasks.corpus.template import Template
from tasks.corpus.tokenizer import load_tokenizer

MODEL_CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def end_tokens(directory: Path) -> frozenset[int]:
    """The ids that end generation: those of generation_config.json, or without it of config.json; maybe none."""
    return _ends_in(directory / GENERATION_CONFIG) or _ends_in(directory / MODEL_CONFIG)


def end_warnings(directory: Path) -> list[str]:
    """What is said about the end of a text that does not go together, a line each."""
    tokenizer = load_tokenizer(directory)
    token, eos = str(tokenizer.eos_token), int(tokenizer.eos_token_id)
    warnings = []
    file = directory / "tokenizer.json"
    if file.is_file() and Tokenizer.from_file(str(file)).token_to_id(token) is None:
        warnings.append(
            f"{file} does not hold the eos token {token!r}, which therefore has the new id {eos}; "
            "correct eos_token in tokenizer_config.json"
        )
    said = {"the tokenizer's": frozenset([eos])}
    said |= {f"{name}'s": ends for name in (MODEL_CONFIG, GENERATION_CONFIG) if (ends := _ends_in(directory / name))}
    if len(set(said.values())) > 1:
        values = ", ".join(f"{whose} {_listed(ends)}" for whose, ends in said.items())
        warnings.append(
            f"{directory}: the eos differs ({values}); generation ends at {_listed(end_tokens(directory) or {eos})}, "
            f"and a document at {eos} unless its chat template ends it in one of these"
        )
    last = _chat_end(Template(tokenizer))
    end = None if last is None else tokenizer.convert_tokens_to_ids(last)
    if end is not None and end not in (end_tokens(directory) or {eos}):
        warnings.append(
            f"{directory}: the chat template ends a turn in {last!r} ({end}), at which generation does not end; "
            "add it to eos_token_id in generation_config.json"
        )
    return warnings


def _ends_in(path: Path) -> frozenset[int]:
    if not path.is_file():
        return frozenset()
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])


def _chat_end(template: Template) -> str | None:
    """The special token that the chat template writes after an answer, if it writes one."""
    if not template.exists:
        return None
    chat = Chat([{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": "!", "reasoning_content": "."}])
    try:
        text = render_chat(chat, template, "", arguments={})[-1]
    except Unusable:
        return None
    start, end = text.written[-1]
    return template.last_special(text.text[start:end])


def _listed(ends: frozenset[int] | set[int]) -> str:
    return " and ".join(str(end) for end in sorted(ends))
