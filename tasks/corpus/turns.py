"""One turn of the assistant: its thought, its answer, its calls, and whether a rendering holds each of them once."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.corpus.chats import ASSISTANT, CLOSE, OPEN, REASONING, Row, functions, strings

LONG = 16  # characters from which an answer that appears twice is no coincidence
_OPENED = re.compile(rf"{OPEN}\s*$")
_CLOSED = re.compile(rf"{OPEN}\s*{CLOSE}\s*$")
# What some templates take out of a message, because it is addressed to them.
_SWITCHES = re.compile(r"/no_think|/think")


@dataclass(frozen=True, slots=True)
class Turn:
    """What an assistant's message says. `inline` is the content as it was given, where the thought was in it."""

    message: Row
    thought: str
    answer: str
    inline: str

    @property
    def calls(self) -> list[Row]:
        return functions(self.message.get("tool_calls", []))

    def said_after(self, opened: bool) -> str:
        """Thought and answer as the model writes them, in a thought that the prompt has `opened` or before any."""
        said = self.inline.strip() or _thinking(self.thought, self.answer.strip())
        if not opened:
            return said
        return said.removeprefix(OPEN).lstrip() if self.thought else f"{CLOSE}\n\n{said}"

    def forms(self) -> list[Row]:
        """The message in the forms that templates know, first as it was given."""
        given = [{**self.message, "content": self.answer}]
        if self.thought:
            bare = {key: value for key, value in self.message.items() if key != REASONING}
            apart = {**bare, "content": self.answer.strip(), REASONING: self.thought.strip()}
            within = {**bare, "content": self.inline or _thinking(self.thought, self.answer)}
            given = [within, apart] if self.inline else [apart, within]
        return given + [_with_text_arguments(form) for form in given if self.calls]


def last_answer(text: str) -> str | None:
    """What follows the last thought in a text; None where a thought does not end."""
    _, closed, after = text.rpartition(CLOSE)
    return None if OPEN in after else after.strip() if closed else text.strip()


def opens_thought(prompt: str) -> bool:
    """Whether a prompt leaves the model in the middle of a thought."""
    return _OPENED.search(prompt) is not None


def closes_thought(prompt: str) -> bool:
    """Whether a prompt has the model go on after a thought, maybe an empty one."""
    return _CLOSED.search(prompt) is not None


def without_thought(header: str) -> str:
    """A header without the thought that it opens, or opens and closes."""
    return _OPENED.sub("", _CLOSED.sub("", header)).rstrip()


def fault_of(prompt: str, whole: str, turn: Turn, form: Row) -> str | None:
    """Why a rendering is not the prompt followed by one thought, the answer and the calls; None where it is."""
    if not whole.startswith(prompt):
        return "it does not go on from the prompt"
    written = whole[len(prompt) :]
    opened, closed = opens_thought(prompt), closes_thought(prompt)
    thought = turn.thought.strip()
    inside, thinks, after = written.partition(CLOSE)
    if not thinks:
        return "the thought is missing" if thought or opened else _fault_of_answer(written, turn, form)
    if not opened:
        _, begins, inside = inside.partition(OPEN)
        if not begins:
            return "a thought ends that did not begin"
    if closed or inside.strip() != thought:
        return "the thought is not the one"
    return _fault_of_answer(after, turn, form)


def _fault_of_answer(after: str, turn: Turn, form: Row) -> str | None:
    answer = turn.answer.strip()
    before, found, ending = after.partition(answer) if answer else ("", answer, after)
    if found != answer:
        return "the answer is missing"
    if OPEN in before + ending or CLOSE in before + ending:
        return "there is a second thought"
    if len(answer) >= LONG and answer in ending:
        return "the answer is there twice"
    calls = functions(form.get("tool_calls", []))
    if any(call["arguments"] and repr(call["arguments"]) in after for call in calls if call.get("arguments")):
        return "the arguments of a call are spelled as Python does"
    return None if calls_survive(turn.calls, after) else "a call is missing"


def calls_survive(calls: list[Row], text: str) -> bool:
    """Whether a text holds the name of every call and the texts in its arguments, as they are or as JSON."""
    return all(call["name"] in text for call in calls) and all(
        value.strip() in text or json.dumps(value, ensure_ascii=False)[1:-1] in text
        for call in calls
        for value in strings(call.get("arguments"))
        if not isinstance(call.get("arguments"), str)
    )


def after_last_turn(messages: list[Row]) -> int:
    """The place after the last message of the assistant's."""
    return next((i + 1 for i in reversed(range(len(messages))) if messages[i]["role"] == ASSISTANT), 0)


def stands(content: str, text: str) -> bool:
    """Whether a content stands in a text, as it is or as JSON, less what the template takes for itself."""
    content = content.strip()
    if content in text:
        return True
    return _SWITCHES.sub("", content).strip() in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _thinking(thought: str, answer: str) -> str:
    return f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{answer}" if thought else answer


def _with_text_arguments(message: Row) -> Row:
    """The message with the arguments of its calls as JSON text, as servers send them and some templates expect."""

    def spelled(entry: Any) -> Any:
        arguments = entry.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        return {**entry, "arguments": text}

    calls = [
        {**call, "function": spelled(call["function"])} if isinstance(call.get("function"), Mapping) else spelled(call)
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
