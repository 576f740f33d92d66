"""A row's chat in one form, whatever form its file gave it: texts, thoughts, tool calls, tools, template arguments."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic_core.recipe import DataSource

Row = dict[str, Any]

ASSISTANT = "assistant"
OPEN, CLOSE = "<think>", "</think>"
REASONING = "reasoning_content"
# The names under which servers and data sets keep a thought beside the answer.
REASONING_NAMES = (REASONING, "reasoning", "thinking")
TOLD = ("role", "content", REASONING, "tool_calls", "tool_call_id")
TEXT_PARTS = {"text", "input_text", "output_text"}
THOUGHT_PARTS = {"thinking", "reasoning"}
SWITCH = {"on": True, "off": False, "true": True, "false": False}
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
THINKING = "enable_thinking"


class Unusable(ValueError):
    """A row that cannot be used. The message names its place, the fault and the remedy; a source may skip some."""


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages in the form that chat templates expect.

    `content` is text; a thought given apart from it is `reasoning_content`; the arguments of a tool call are a mapping
    wherever they are JSON. `arguments` are the template arguments that the row itself gives.
    """

    messages: list[Row]
    tools: list[Row] = field(default_factory=list)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def hashed(self) -> Any:
        """The plain data that tells this chat from another, in whatever form its files gave it."""
        messages = [_told(message) for message in self.messages]
        if self.tools or self.arguments:
            return {"messages": messages, "tools": self.tools, "arguments": dict(self.arguments)}
        return messages

    def last_of(self, role: str) -> str:
        """What this role says last; nothing where it says nothing."""
        said = (str(message.get("content", "")) for message in reversed(self.messages) if message["role"] == role)
        return next(said, "")

    def texts(self) -> Iterator[str]:
        """Thoughts and contents in order."""
        for message in self.messages:
            yield from (str(message[key]) for key in (REASONING, "content") if key in message)


def read_chat(row: Row, source: DataSource, where: str, *, columns: bool) -> Chat:
    """The chat of a row. Unusable, with its place, for what is not a chat of texts.

    Readers of columns give every struct the keys of all others, with None for those that it did not have. In a row
    from `columns` such keys are dropped at any depth; in a row of JSON only in the messages themselves, since a null in
    a tool's arguments was written there.
    """
    messages = _parsed(row[source.messages_field])
    if not _is_chat(messages):
        raise Unusable(f"{where}: {source.messages_field!r} is not a list of messages with roles; mend or remove it")
    clean = without_none if columns else _without_none_here
    if columns:
        _check_plain([row.get(name) for name in (source.messages_field, source.tools_field, TEMPLATE_ARGUMENTS)], where)
    return Chat(
        messages=[_message(clean(m), f"{where}: message {i}") for i, m in enumerate(messages, 1)],
        tools=_tools(row.get(source.tools_field), source, where, columns),
        arguments=_arguments(row, source, where, columns),
    )


def _told(message: Row) -> Row:
    """What a message says, without ids, weights and names; a thought beside the answer, wherever it was."""
    told = {key: message[key] for key in TOLD if key in message}
    content = told.get("content")
    if message["role"] != ASSISTANT or not isinstance(content, str):
        return told
    inside, closed, answer = content.partition(CLOSE)
    if REASONING not in told and closed and inside.lstrip().startswith(OPEN):
        told |= {REASONING: inside.lstrip().removeprefix(OPEN), "content": answer}
    if REASONING in told:
        told |= {REASONING: told[REASONING].strip(), "content": told["content"].strip()}
    return told


def without_none(value: Any) -> Any:
    """The value without the keys that hold None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_none(inner) for inner in value]
    return value


def strings(value: Any) -> list[str]:
    """The texts in a value, at any depth, keys not among them."""
    if isinstance(value, str):
        return [value]
    found: list[str] = []
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, str):
            found.append(inner)
        elif isinstance(inner, dict | list):
            found += strings(inner)
    return found


def _check_plain(value: Any, where: str) -> None:
    """Unusable for what no JSON holds, at any depth: readers of columns take a text that spells a date for a date."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            _check_plain(inner, where)
    elif value is not None and not isinstance(value, str | int | float):
        raise Unusable(f"{where} holds a value of type {type(value).__name__}, which no JSON does; make it text")


def functions(entries: Iterable[Row]) -> list[Row]:
    """The functions that tools or tool calls name, in OpenAI's form or without its wrapping."""
    return [entry["function"] if isinstance(entry.get("function"), Mapping) else entry for entry in entries]


def _without_none_here(message: Row) -> Row:
    return {key: value for key, value in message.items() if value is not None}


def _is_chat(messages: Any) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    )


def _message(message: Row, where: str) -> Row:
    content, thoughts = _content(message.get("content"), where)
    if message["role"] != ASSISTANT:
        if thoughts:
            raise Unusable(
                f"{where} ({message['role']}) holds a thought, which only an assistant has; mend or remove it"
            )
        return message if content is None else {**message, "content": content}
    if message.get("weight", 1) == 0 or message.get("train") is False:
        raise Unusable(f"{where} ({ASSISTANT}) is marked as not to be learned; remove the mark or the row")
    thoughts += [message[name] for name in REASONING_NAMES if isinstance(message.get(name), str)]
    thoughts = list(dict.fromkeys(thought for thought in thoughts if thought.strip()))
    if len(thoughts) > 1:
        raise Unusable(f"{where} ({ASSISTANT}) holds several thoughts beside its content; keep one of them")
    kept = {
        key: value for key, value in message.items() if key not in (*REASONING_NAMES, "tool_calls", "function_call")
    }
    calls = message.get("tool_calls") or [
        {"type": "function", "function": call} for call in (message.get("function_call"),) if call
    ]
    if thoughts:
        kept[REASONING] = thoughts[0]
    if calls:
        kept["tool_calls"] = _calls(calls, where)
    if content is not None or thoughts or calls:
        kept["content"] = content or ""
    return kept


def _content(content: Any, where: str) -> tuple[str | None, list[str]]:
    """The text of a message's content and the thoughts in it, where it is given as parts."""
    if content is None or isinstance(content, str):
        return content, []
    if not isinstance(content, list):
        raise Unusable(f"{where} has a content of type {type(content).__name__}, not text; mend or remove it")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind, text = _part(part)
        if kind not in TEXT_PARTS | THOUGHT_PARTS or not isinstance(text, str):
            raise Unusable(f"{where} holds a part of type {kind!r}, and only text can be trained on; remove it")
        (thoughts if kind in THOUGHT_PARTS else texts).append(text)
    return "".join(texts), thoughts


def _part(part: Any) -> tuple[str, Any]:
    """The type of a part of a content, and its text: under `text`, or of a thought under the name of its type."""
    if not isinstance(part, dict):
        return ("text", part) if isinstance(part, str) else (type(part).__name__, None)
    kind = str(part.get("type", "text"))
    return kind, part.get(kind if kind in THOUGHT_PARTS and kind in part else "text")


def _calls(calls: Any, where: str) -> list[Row]:
    """Tool calls whose arguments are a mapping wherever they are JSON."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Unusable(f"{where} has tool calls that are not a list of objects; mend or remove it")
    called = []
    for call, function in zip(calls, functions(calls), strict=True):
        if not isinstance(function.get("name"), str):
            raise Unusable(f"{where} has a tool call without the name of a function; mend or remove it")
        given = _parsed(function.get("arguments") or {})
        function = {**function, "arguments": given if isinstance(given, dict) else function["arguments"]}
        called.append({**call, "function": function} if isinstance(call.get("function"), Mapping) else function)
    return called


def _tools(given: Any, source: DataSource, where: str, columns: bool) -> list[Row]:
    tools = _parsed(given) or []
    if isinstance(tools, list):
        tools = [_parsed(tool) for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(f"{where}: {source.tools_field!r} is not a list of tools; mend it, or set tools_field")
    tools = [without_none(tool) for tool in tools] if columns else tools
    if not all(isinstance(function.get("name"), str) for function in functions(tools)):
        raise Unusable(f"{where}: {source.tools_field!r} holds a tool without a name; mend it, or set tools_field")
    return tools


def _arguments(row: Row, source: DataSource, where: str, columns: bool) -> Row:
    arguments = _parsed(row.get(TEMPLATE_ARGUMENTS)) or {}
    if not isinstance(arguments, dict):
        raise Unusable(f"{where}: {TEMPLATE_ARGUMENTS!r} is not a mapping; mend or remove it")
    arguments = without_none(arguments) if columns else arguments
    switch = row.get(source.reasoning_field)
    if switch is None or switch == "":
        return arguments
    if str(switch).lower() not in SWITCH:
        raise Unusable(
            f"{where}: {source.reasoning_field!r} is {str(switch)[:40]!r}, neither 'on' nor 'off'; "
            "mend it, or set the source's reasoning_field to another name"
        )
    return {THINKING: SWITCH[str(switch).lower()], **arguments}


def _parsed(value: Any) -> Any:
    """What a text spells as JSON; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value
