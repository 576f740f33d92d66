"""A tokenizer's chat template, and what has to be known of it before a chat is rendered."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from tasks.corpus.chats import ASSISTANT, Row
from tasks.corpus.turns import opens_thought

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_THINK = "/no_think"
# Characters for private use, of which some that a chat does not hold mark places in it.
PRIVATE = range(0xE000, 0xF8FF)
LONGEST = 256  # characters of a special token


@cache
def taken() -> frozenset[str]:
    """The arguments of apply_chat_template, and of the template, that are not for a row or a recipe to give."""
    from transformers import PreTrainedTokenizerBase  # a second, for those alone who render chats

    return frozenset(
        {"messages", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {"documents", "kwargs"}
    )


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[int, str]:
    """How the special tokens of a tokenizer are spelled, by their ids."""
    return {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}


class Template:
    """A tokenizer's chat template, and what has to be known of it."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template
        self.exists = template is not None
        self.source = "\n".join(template.values()) if isinstance(template, dict) else template or ""
        # Whether the template has anything to do with thoughts.
        self.thinks = re.search("think|reason", self.source, re.IGNORECASE) is not None
        special = set(special_tokens(tokenizer).values()) - {""}
        self.special = re.compile(_any_of(special) if special else "(?!)")
        self._last_characters = tuple({token[-1] for token in special})
        self.frame = cache(self._frame)
        self.takes_no_switch = cache(self._takes_no_switch)

    def render(self, messages: Sequence[Row], tools: Sequence[Row], arguments: Mapping[str, Any], prompt: bool) -> str:
        """The messages as text, with the generation prompt of the next turn where `prompt`."""
        return str(
            self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt, **arguments
            )
        )

    def written_end(self, written: str) -> int:
        """Where the model stops: after the special token that ends the turn, if one does; white space may follow it."""
        return len(written.rstrip()) if self.last_special(written) else len(written)

    def last_special(self, text: str) -> str | None:
        """The special token that a text ends in, if it does; white space may follow it."""
        return self.special_end(text.rstrip())

    def special_end(self, text: str) -> str | None:
        """The special token that a text ends in, if it does."""
        if not text.endswith(self._last_characters):
            return None
        return next(
            (m[0] for m in self.special.finditer(text, max(0, len(text) - LONGEST)) if m.end() == len(text)), None
        )

    def _frame(self, arguments: str) -> tuple[str, str] | None:
        """What stands before and after every answer of a template without thoughts; None where it cannot be told."""
        question, answer = (
            {"role": "user", "content": chr(PRIVATE[0])},
            {"role": ASSISTANT, "content": chr(PRIVATE[1])},
        )
        try:
            asked = self.render([question], [], json.loads(arguments), False)
            prompt = self.render([question], [], json.loads(arguments), True)
            whole = self.render([question, answer], [], json.loads(arguments), False)
        except Exception:  # noqa: BLE001 - whatever a template raises; its rows meet it again, and are named
            return None
        begun = prompt + answer["content"]
        if self.thinks or prompt == asked or not prompt.startswith(asked) or not whole.startswith(begun):
            return None
        return prompt[len(asked) :], whole[len(begun) :]

    def _takes_no_switch(self, arguments: str) -> bool:
        """Whether a thought is turned off by a word in the messages, not by an argument."""
        prompt = self.render([{"role": "user", "content": "?"}], [], json.loads(arguments), True)
        return NO_THINK in self.source and opens_thought(prompt)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for the longest of some texts; what several begin with is in it once, as there may be a thousand."""
    after: dict[str, set[str]] = {}
    for text in filter(None, texts := set(texts)):
        after.setdefault(text[0], set()).add(text[1:])
    branches = "|".join(re.escape(first) + _any_of(rest) for first, rest in sorted(after.items()))
    return f"(?:{branches}){'?' * ('' in texts)}" if branches else ""
