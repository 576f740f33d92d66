"""A small size thinks and a large one answers: one chat completion, made of a completion by each.

The model of such a request is FAMILY?think=BUDGET&answer=BUDGET. The chat is rendered here, as both sizes read it. The
first one goes on from there until its thought ends, and the second from the end of that thought.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from transformers import PreTrainedTokenizerFast

from elastic_core.files.checkpoint import read_config
from elastic_core.sources import DataSource
from flows.endpoint.protocol import Refused, events, refusal
from flows.endpoint.residents import Residents, Size
from tasks.corpus.chats import CLOSE, OPEN, REASONING, read_chat
from tasks.corpus.problems import encode_prompts
from tasks.corpus.tokenizer import load_tokenizer
from tasks.corpus.turns import closes_thought
from tasks.running.engines import Engine

FORM = "FAMILY?think=BUDGET&answer=BUDGET, with &thought_tokens=N where a thought is to end after N"
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty"),
)
OTHERS = (
    *("model", "messages", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options"),
    *("chat_template_kwargs", "user", "n"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """The names of the size that thinks and of the one that answers; the thought is cut after `thought_tokens`."""

    thinks: str
    answers: str
    thought_tokens: int | None = None


def read_pair(model: str, sizes: Mapping[str, Size]) -> Pair:
    """What FAMILY?think=BUDGET&answer=BUDGET means; Refused where it means nothing."""
    family, _, query = model.partition("?")
    asked = dict(parse_qsl(query, keep_blank_values=True))
    limit = asked.pop("thought_tokens", None)
    if asked.keys() != {"think", "answer"} or not (limit is None or (limit.isdecimal() and int(limit))):
        raise Refused(400, f"model {model!r} is not {FORM}", "invalid_model")
    by_budget = {size.budget: name for name, size in sizes.items() if size.family == family}
    if unknown := sorted(set(asked.values()) - by_budget.keys()):
        known = ", ".join(by_budget) or "no budget"
        raise Refused(404, f"family {family!r} has {known} here, not {unknown[0]!r}", "model_not_found")
    thinks, answers = by_budget[asked["think"]], by_budget[asked["answer"]]
    if sizes[thinks].tokenizer != sizes[answers].tokenizer:  # one would read other tokens than the other wrote
        fault = f"{thinks} and {answers} have different tokenizers; serve versions of them that were made together"
        raise Refused(400, fault, "invalid_model")
    return Pair(thinks=thinks, answers=answers, thought_tokens=None if limit is None else int(limit))


class Composition:
    """A completion by two sizes; once its deltas have come, `finish`, `prompt_tokens` and `tokens` say how it ended."""

    def __init__(self, residents: Residents, pair: Pair, body: Mapping[str, Any]) -> None:
        given = {name: value for name, value in body.items() if value is not None}
        if unknown := sorted(given.keys() - {*SAMPLING, *OTHERS}):
            raise Refused(400, f"{unknown[0]} is not for a chat of which one size thinks; remove it", "unsupported")
        if given.get("n", 1) != 1:
            raise Refused(400, "n must be 1 where one size thinks", "unsupported")
        self.finish, self.prompt_tokens, self.tokens = "length", 0, 0
        self._residents, self._pair, self._body = residents, pair, given
        self._sampling = {name: given[name] for name in SAMPLING if name in given}
        self._limit = given.get("max_completion_tokens", given.get("max_tokens"))
        if self._limit is not None and not (type(self._limit) is int and self._limit > 0):
            raise Refused(400, f"max_tokens is {self._limit!r}, not a number of tokens", "invalid_max_tokens")

    async def deltas(self) -> AsyncGenerator[dict[str, str], None]:
        """The thought, and then the answer, as pieces of a message."""
        async with self._residents.using(self._pair.thinks) as engine:
            prompt = await asyncio.to_thread(_opened, engine.directory, self._body)
            room = await self._room(engine, prompt)
            room = room if self._limit is None else min(room, self._limit)
            most = min(room, self._pair.thought_tokens or room)
            thought = ""
            fields: dict[str, Any] = {"stop": [CLOSE]}
            if engine.program.takes_tokens:
                fields["skip_special_tokens"] = False  # the end of a thought may be one
            async with aclosing(_before(CLOSE, self._completed(engine, prompt, most, fields))) as texts:
                async for text in texts:
                    thought += text
                    yield {REASONING: text}
        self.prompt_tokens = self._usage["prompt_tokens"]
        self.tokens = self._usage["completion_tokens"]
        if self._cut and most == room:
            return
        closed = f"\n{CLOSE}\n\n" if self._cut else CLOSE
        async with self._residents.using(self._pair.answers) as engine:
            prompt += tokenizer_of(engine.directory).encode(thought + closed, add_special_tokens=False)
            room = await self._room(engine, prompt)
            most = room if self._limit is None else min(room, self._limit - self.tokens)
            if most < 1:
                return
            fields = {"stop": self._body["stop"]} if "stop" in self._body else {}
            async with aclosing(self._completed(engine, prompt, most, fields)) as texts:
                async for text in texts:
                    yield {"content": text}
        self.tokens += self._usage["completion_tokens"]
        self.finish = "length" if self._cut else "stop"

    async def _completed(
        self, engine: Engine, prompt: list[int], most: int, fields: Mapping[str, Any]
    ) -> AsyncGenerator[str, None]:
        """The text that an engine goes on with; then `_usage` and whether it was `_cut` are known."""
        body = {
            **self._sampling,
            **fields,
            "model": engine.model,
            "prompt": prompt if engine.program.takes_tokens else tokenizer_of(engine.directory).decode(prompt),
            "max_tokens": most,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        self._usage: dict[str, int] = {}
        finish = None
        async with self._residents.client.stream("POST", f"{engine.url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise await refusal(answer)
            async with aclosing(events(answer)) as said:
                async for each in said:
                    self._usage = each.get("usage") or self._usage
                    for choice in each["choices"]:
                        finish = choice.get("finish_reason") or finish
                        if choice["text"]:
                            yield choice["text"]
        if finish not in ("stop", "length") or not self._usage:
            raise Refused(502, f"the engine ended a completion with {finish!r}, neither stop nor length")
        self._cut = finish == "length"

    async def _room(self, engine: Engine, prompt: list[int]) -> int:
        """How many tokens an engine can write after a prompt; Refused where there is room for none."""
        if engine.program.kind == "vllm":  # which may have been told to take less than the model can
            listed = (await self._residents.client.get(f"{engine.url}/v1/models")).json()["data"]
            context = next(int(model["max_model_len"]) for model in listed if model["id"] == engine.model)
        else:
            context = read_config(engine.directory).max_position_embeddings
        if len(prompt) >= context:
            fault = f"{len(prompt)} tokens leave no room in a context of {context}"
            raise Refused(400, fault, "context_length_exceeded")
        return context - len(prompt)


@cache
def tokenizer_of(directory: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(directory)


def _opened(directory: Path, body: Mapping[str, Any]) -> list[int]:
    """The chat as the sizes read it, with a thought begun."""
    tokenizer = tokenizer_of(directory)
    try:
        if "messages" not in body:
            raise ValueError("messages is missing")
        chat = read_chat(dict(body), DataSource(path="the request"), "the request", columns=False)
        (prompt,) = encode_prompts(tokenizer, [(chat, "the request")], {})
    except ValueError as error:
        raise Refused(400, str(error), "invalid_messages") from error
    if prompt.thinking:
        return prompt.ids
    if closes_thought(str(tokenizer.decode(prompt.ids))):
        raise Refused(400, "the messages switch thoughts off, and a size is to think", "invalid_messages")
    return [*prompt.ids, *tokenizer.encode(f"{OPEN}\n", add_special_tokens=False)]


async def _before(mark: str, texts: AsyncIterator[str]) -> AsyncGenerator[str, None]:
    """What stands before a mark, in pieces; what may be the beginning of the mark waits for the next piece."""
    held, found = "", False
    async for text in texts:
        if found:
            continue
        before, mark_found, _ = (held + text).partition(mark)
        found = bool(mark_found)
        kept = 0 if found else next(n for n in range(len(mark) - 1, -1, -1) if before.endswith(mark[:n]))
        if ready := before[: len(before) - kept]:
            yield ready
        held = before[len(before) - kept :]
    if held:
        yield held
