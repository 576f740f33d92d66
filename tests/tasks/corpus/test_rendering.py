"""What chats and texts become: a table of situations, each read as JSONL and as Parquet, with the exact tokens.

In what is expected a special token is written as its name in double brackets, and what is learned stands between
`\u2039` and `\u203a` where not everything is. Every other character stands for its bytes, one token each.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from templates import TEMPLATES, write_tokenizer
from transformers import PreTrainedTokenizerFast

from elastic_core.recipe import DataSource
from tasks.corpus.chats import Chat, read_chat
from tasks.corpus.documents import Document, Tally, iter_documents
from tasks.corpus.encoding import Encoder
from tasks.corpus.rendering import _Rendering
from tasks.corpus.template import Template
from tasks.corpus.token_file import Sample
from tasks.corpus.tokenizer import load_tokenizer

Row = dict[str, Any]


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def says(content: Any, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> Row:
    return {"role": "system", "content": content}


def returns(content: str) -> Row:
    return {"role": "tool", "content": content}


def calls(name: str, arguments: Any) -> list[Row]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


THOUGHT = "<think>\nadd\n</think>\n\n"
ASKED = user("2+2?")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
TOOL_JSON = json.dumps(WEATHER)
ROME = calls("weather", {"city": "Rome", "at": {"day": 1}})


@dataclass(frozen=True)
class Case:
    """A row, the template it goes through, and the samples that it becomes."""

    template: str
    row: Row
    expected: list[str]
    source: Mapping[str, Any] = field(default_factory=dict)


def chat(*messages: Row, **columns: Any) -> Row:
    return {"messages": list(messages), **columns}


ASSISTANT_ONLY = {"train_on": "assistant"}

CASES = {
    # texts
    "a text": Case("ours", {"text": "two\n\nlines"}, ["two\n\nlines⟦/s⟧"]),
    "a text that spells special tokens": Case(
        "ours", {"text": "was <s>9</s> now 7</s>"}, ["was <s>9</s> now 7</s>⟦/s⟧"]
    ),
    "a text whose special tokens count": Case("ours", {"text": "<s>9</s>"}, ["⟦s⟧9⟦/s⟧"], {"special_tokens": "tokens"}),
    "a text where assistants are learned": Case("ours", {"text": "all"}, ["all⟦/s⟧"], ASSISTANT_ONLY),
    # plain chats
    "our own template": Case(
        "ours", chat(ASKED, says("4"), user("3?"), says("3")), ["⟦user⟧2+2?⟦assistant⟧4⟦/s⟧⟦user⟧3?⟦assistant⟧3⟦/s⟧"]
    ),
    "our own template, assistant only": Case(
        "ours",
        chat(ASKED, says("4"), user("3?"), says("3")),
        ["⟦user⟧2+2?⟦assistant⟧‹4⟦/s⟧›⟦user⟧3?⟦assistant⟧‹3⟦/s⟧›"],
        ASSISTANT_ONLY,
    ),
    "a question without an answer": Case("ours", chat(ASKED), ["⟦user⟧2+2?⟦/s⟧"]),
    "a system message alone": Case("ours", chat(system("Be good.")), ["⟦system⟧Be good.⟦/s⟧"]),
    "a chat that ends in a question": Case(
        "ours", chat(ASKED, says("4"), user("3?")), ["⟦user⟧2+2?⟦assistant⟧‹4⟦/s⟧›⟦user⟧3?⟦/s⟧"], ASSISTANT_ONLY
    ),
    "no second eos after a newline": Case(
        "chatml",
        chat(ASKED, says("4")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n4⟦im_end⟧\n"],
    ),
    "the newline after the end is not learned": Case(
        "chatml",
        chat(ASKED, says("4"), user("3?"), says("3")),
        [
            "⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n‹4⟦im_end⟧›\n"
            "⟦im_start⟧user\n3?⟦im_end⟧\n⟦im_start⟧assistant\n‹3⟦im_end⟧›\n"
        ],
        ASSISTANT_ONLY,
    ),
    "an answer that begins with a newline is read after the prompt": Case(
        "chatml",
        chat(ASKED, says("\n4")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n‹\n4⟦im_end⟧›\n"],
        ASSISTANT_ONLY,
    ),
    "a beginning, and an end without white space": Case(
        "llama",
        chat(system("Be exact."), ASKED, says(" 4 ")),
        ["⟦s⟧⟦head⟧system⟦/head⟧\n\nBe exact.⟦eot⟧⟦head⟧user⟦/head⟧\n\n2+2?⟦eot⟧⟦head⟧assistant⟦/head⟧\n\n‹4⟦eot⟧›"],
        ASSISTANT_ONLY,
    ),
    "a template that does not ask": Case(
        "bare", chat(ASKED, says("4")), ["⟦turn⟧user\n2+2?⟦end⟧‹⟦turn⟧assistant\n4⟦end⟧›"], ASSISTANT_ONLY
    ),
    "a template without special tokens": Case(
        "words", chat(ASKED, says("4")), ["USER: 2+2?\nASSISTANT: ‹4\n⟦/s⟧›"], ASSISTANT_ONLY
    ),
    "special tokens spelled in messages": Case(
        "chatml",
        chat(user("What does <|im_end|>\n<|im_start|>assistant\nmean?"), says("<|im_end|> ends.")),
        [
            "⟦im_start⟧user\nWhat does <|im_end|>\n<|im_start|>assistant\nmean?⟦im_end⟧\n"
            "⟦im_start⟧assistant\n‹<|im_end|> ends.⟦im_end⟧›\n"
        ],
        ASSISTANT_ONLY,
    ),
    "special tokens in messages that count": Case(
        "bare",
        chat(user("a<end>"), says("b")),
        ["⟦turn⟧user\na⟦end⟧⟦end⟧⟦turn⟧assistant\nb⟦end⟧"],
        {"special_tokens": "tokens"},
    ),
    "content in parts": Case(
        "ours",
        chat(
            user([{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]),
            says([{"type": "text", "text": "4"}]),
        ),
        ["⟦user⟧2+2?⟦assistant⟧4⟦/s⟧"],
    ),
    "a thought in a part": Case(
        "qwen3",
        chat(
            user([{"type": "text", "text": "2+2?"}]),
            says([{"type": "thinking", "thinking": "add"}, {"type": "text", "text": "4"}]),
        ),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n<think>\nadd\n</think>\n\n4⟦im_end⟧\n"],
    ),
    "messages and template arguments as JSON text": Case(
        "qwen3",
        {"messages": json.dumps([ASKED, says("4")]), "chat_template_kwargs": json.dumps({"enable_thinking": False})},
        [
            "⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n<think>\n\n</think>\n\n‹4⟦im_end⟧›\n",
        ],
        ASSISTANT_ONLY,
    ),
    # tools
    "tools in a column, and a call without content": Case(
        "hermes",
        chat(user("Rome?"), says(None, tool_calls=ROME), returns("sun"), says("Sunny."), tools=[WEATHER]),
        [
            f"⟦im_start⟧system\n{TOOL_JSON}\n⟦im_end⟧\n⟦im_start⟧user\nRome?⟦im_end⟧\n⟦im_start⟧assistant\n"
            '‹⟦tool_call⟧{"name": "weather", "arguments": {"city": "Rome", "at": {"day": 1}}}⟦/tool_call⟧⟦im_end⟧›\n'
            "⟦im_start⟧tool\nsun⟦im_end⟧\n⟦im_start⟧assistant\n‹Sunny.⟦im_end⟧›\n"
        ],
        ASSISTANT_ONLY,
    ),
    "tools and arguments as JSON text": Case(
        "hermes",
        chat(
            user("Rome?"),
            says("", tool_calls=calls("weather", '{"city": "Rome", "unit": null}')),
            tools=json.dumps([WEATHER]),
        ),
        [
            f"⟦im_start⟧system\n{TOOL_JSON}\n⟦im_end⟧\n⟦im_start⟧user\nRome?⟦im_end⟧\n⟦im_start⟧assistant\n"
            '⟦tool_call⟧{"name": "weather", "arguments": {"city": "Rome", "unit": null}}⟦/tool_call⟧⟦im_end⟧\n'
        ],
    ),
    "a special token spelled in the arguments of a call": Case(
        "hermes",
        chat(user("say"), says("", tool_calls=calls("say", {"text": "<|im_end|>"}))),
        [
            "⟦im_start⟧user\nsay⟦im_end⟧\n⟦im_start⟧assistant\n"
            '⟦tool_call⟧{"name": "say", "arguments": {"text": "<|im_end|>"}}⟦/tool_call⟧⟦im_end⟧\n'
        ],
    ),
    "a template that wants arguments as text": Case(
        "r1",
        chat(user("Rome?"), says("<think>\nlook\n</think>", tool_calls=ROME)),
        [
            "⟦s⟧⟦User⟧Rome?⟦Assistant⟧<think>\n‹look\n</think>"
            '⟦call⟧weather\n{"city": "Rome", "at": {"day": 1}}⟦/call⟧⟦end⟧›'
        ],
        ASSISTANT_ONLY,
    ),
    # thoughts
    "Nano 2 opens the thought": Case(
        "nano2",
        chat(ASKED, says(f"{THOUGHT}4"), reasoning="on"),
        [
            "⟦SPECIAL_10⟧System\n\n⟦SPECIAL_11⟧User\n2+2?\n⟦SPECIAL_11⟧Assistant\n<think>\n"
            "‹add\n</think>\n\n4\n⟦SPECIAL_12⟧›\n"
        ],
        ASSISTANT_ONLY,
    ),
    "Nano 2, everything learned": Case(
        "nano2",
        chat(system("Be brief. /think"), ASKED, says("4", reasoning_content="add")),
        [
            "⟦SPECIAL_10⟧System\nBe brief.\n⟦SPECIAL_11⟧User\n2+2?\n⟦SPECIAL_11⟧Assistant\n<think>\n"
            "add\n</think>\n\n4\n⟦SPECIAL_12⟧\n"
        ],
    ),
    "Nano 2 with thinking off in the row": Case(
        "nano2",
        chat(ASKED, says("4"), reasoning="off"),
        ["⟦SPECIAL_10⟧System\n\n⟦SPECIAL_11⟧User\n2+2?\n⟦SPECIAL_11⟧Assistant\n<think></think>‹4\n⟦SPECIAL_12⟧›\n"],
        ASSISTANT_ONLY,
    ),
    "Nano 2 with thinking off in a message": Case(
        "nano2",
        chat(system("/no_think"), ASKED, says("4")),
        ["⟦SPECIAL_10⟧System\n\n⟦SPECIAL_11⟧User\n2+2?\n⟦SPECIAL_11⟧Assistant\n<think></think>‹4\n⟦SPECIAL_12⟧›\n"],
        ASSISTANT_ONLY,
    ),
    "Nano 2 drops the first thought: two samples": Case(
        "nano2",
        chat(ASKED, says(f"{THOUGHT}4"), user("3+3?"), says("<think>\nagain\n</think>\n\n6")),
        [
            "⟦SPECIAL_10⟧System\n\n⟦SPECIAL_11⟧User\n2+2?\n⟦SPECIAL_11⟧Assistant\n<think>\n"
            "add\n</think>\n\n4\n⟦SPECIAL_12⟧\n",
            "⟦SPECIAL_10⟧System\n\n⟦SPECIAL_11⟧User\n2+2?\n⟦SPECIAL_11⟧Assistant\n4\n⟦SPECIAL_12⟧‹\n"
            "⟦SPECIAL_11⟧User\n3+3?\n⟦SPECIAL_11⟧Assistant\n<think>\nagain\n</think>\n\n6\n⟦SPECIAL_12⟧\n›",
        ],
    ),
    "Nano 2 drops the first thought, assistant only": Case(
        "nano2",
        chat(ASKED, says(f"{THOUGHT}4"), user("3+3?"), says("<think>\nagain\n</think>\n\n6")),
        [
            "⟦SPECIAL_10⟧System\n\n⟦SPECIAL_11⟧User\n2+2?\n⟦SPECIAL_11⟧Assistant\n<think>\n"
            "‹add\n</think>\n\n4\n⟦SPECIAL_12⟧›\n",
            "⟦SPECIAL_10⟧System\n\n⟦SPECIAL_11⟧User\n2+2?\n⟦SPECIAL_11⟧Assistant\n4\n⟦SPECIAL_12⟧\n"
            "⟦SPECIAL_11⟧User\n3+3?\n⟦SPECIAL_11⟧Assistant\n<think>\n‹again\n</think>\n\n6\n⟦SPECIAL_12⟧›\n",
        ],
        ASSISTANT_ONLY,
    ),
    "Nano 2 loses the calls of a last turn": Case(
        "nano2",
        chat(user("Rome?"), says(None, tool_calls=ROME, reasoning_content="look"), tools=[WEATHER]),
        [
            f"⟦SPECIAL_10⟧System\n\n\n⟦AVAILABLE_TOOLS⟧[{json.dumps(WEATHER['function'])}]⟦/AVAILABLE_TOOLS⟧\n"
            "⟦SPECIAL_11⟧User\nRome?\n⟦SPECIAL_11⟧Assistant\n<think>\n‹look\n</think>\n\n⟦TOOLCALL⟧"
            '[{"name": "weather", "arguments": {"city": "Rome", "at": {"day": 1}}}]⟦/TOOLCALL⟧\n⟦SPECIAL_12⟧›\n'
        ],
        ASSISTANT_ONLY,
    ),
    "Nemotron 3 with the thought beside the answer": Case(
        "nemotron3",
        chat(ASKED, says("4", reasoning_content="add")),
        [
            "⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧\n‹add\n⟦/think⟧\n4⟦im_end⟧›\n",
        ],
        ASSISTANT_ONLY,
    ),
    "Nemotron 3 with the thought under another name": Case(
        "nemotron3",
        chat(ASKED, says("4", reasoning="add")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧\nadd\n⟦/think⟧\n4⟦im_end⟧\n"],
    ),
    "Nemotron 3 with the thought in the answer": Case(
        "nemotron3",
        chat(ASKED, says("<think>\nadd\n</think>\n4")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧\nadd\n⟦/think⟧\n4⟦im_end⟧\n"],
    ),
    "Nemotron 3 without a thought: asked not to think": Case(
        "nemotron3",
        chat(ASKED, says("4")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧⟦/think⟧‹4⟦im_end⟧›\n"],
        ASSISTANT_ONLY,
    ),
    "Nemotron 3 with thinking off in the source": Case(
        "nemotron3",
        chat(ASKED, says("4"), user("3?"), says("3")),
        [
            "⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧⟦/think⟧‹4⟦im_end⟧›\n"
            "⟦im_start⟧user\n3?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧⟦/think⟧‹3⟦im_end⟧›\n"
        ],
        {**ASSISTANT_ONLY, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "Nemotron 3 told to keep thoughts": Case(
        "nemotron3",
        chat(ASKED, says("4", reasoning_content="add"), user("3?"), says("3", reasoning_content="so")),
        [
            "⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧\n‹add\n⟦/think⟧\n4⟦im_end⟧›\n"
            "⟦im_start⟧user\n3?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧\n‹so\n⟦/think⟧\n3⟦im_end⟧›\n"
        ],
        {**ASSISTANT_ONLY, "chat_template_kwargs": {"truncate_history_thinking": False}},
    ),
    "Nemotron 3 thinks between calls of one question": Case(
        "nemotron3",
        chat(
            user("Rome?"),
            says("", tool_calls=calls("weather", {"city": "Rome"}), reasoning_content="look"),
            returns("sun"),
            says("Sunny.", reasoning_content="seen"),
            tools=[WEATHER],
        ),
        [
            "⟦im_start⟧system\n<tools>\n<function>weather</function>\n</tools>⟦im_end⟧\n"
            "⟦im_start⟧user\nRome?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧\n‹look\n⟦/think⟧\n<tool_call>\n"
            "<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>⟦im_end⟧›\n"
            "⟦im_start⟧user\n<tool_response>\nsun\n</tool_response>⟦im_end⟧\n"
            "⟦im_start⟧assistant\n⟦think⟧\n‹seen\n⟦/think⟧\nSunny.⟦im_end⟧›\n"
        ],
        ASSISTANT_ONLY,
    ),
    "a question that spells a thought": Case(
        "nemotron3",
        chat(user("What is <think>?"), says("A tag.", reasoning_content="recall")),
        ["⟦im_start⟧user\nWhat is <think>?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧\nrecall\n⟦/think⟧\nA tag.⟦im_end⟧\n"],
    ),
    "an answer that speaks of thoughts, where their marks are special": Case(
        "nemotron3",
        chat(ASKED, says("Use <think> and </think>.")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧⟦/think⟧Use <think> and </think>.⟦im_end⟧\n"],
    ),
    "an answer that speaks of thoughts, where their marks are characters": Case(
        "qwen3",
        chat(ASKED, says("Use <think> and </think>.")),
        [
            "⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n<think>\n\n</think>\n\n"
            "‹Use <think> and </think>.⟦im_end⟧›\n"
        ],
        ASSISTANT_ONLY,
    ),
    "a content that goes on from an opened thought": Case(
        "nemotron3",
        chat(ASKED, says("add\n</think>\n4")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n⟦think⟧\n‹add\n⟦/think⟧\n4⟦im_end⟧›\n"],
        ASSISTANT_ONLY,
    ),
    "Qwen 3 writes the thought itself": Case(
        "qwen3",
        chat(ASKED, says(f"{THOUGHT}4")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n‹<think>\nadd\n</think>\n\n4⟦im_end⟧›\n"],
        ASSISTANT_ONLY,
    ),
    "Qwen 3 without a thought: the empty one is asked for": Case(
        "qwen3",
        chat(ASKED, says("4"), reasoning=False),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n<think>\n\n</think>\n\n‹4⟦im_end⟧›\n"],
        ASSISTANT_ONLY,
    ),
    "R1 drops every thought": Case(
        "r1",
        chat(ASKED, says(f"{THOUGHT}4"), user("3?"), says("3", reasoning_content="so")),
        [
            "⟦s⟧⟦User⟧2+2?⟦Assistant⟧<think>\n‹add\n</think>\n\n4⟦end⟧›",
            "⟦s⟧⟦User⟧2+2?⟦Assistant⟧\n\n4⟦end⟧⟦User⟧3?⟦Assistant⟧<think>\n‹so\n</think>\n\n3⟦end⟧›",
        ],
        ASSISTANT_ONLY,
    ),
    "R1 with thinking off: the thought ends at once": Case(
        "r1",
        chat(ASKED, says("4"), reasoning="off"),
        ["⟦s⟧⟦User⟧2+2?⟦Assistant⟧<think>\n‹</think>\n\n4⟦end⟧›"],
        ASSISTANT_ONLY,
    ),
    "a thought in the answer, by a template without thoughts": Case(
        "chatml",
        chat(ASKED, says(f"{THOUGHT}4"), user("3?"), says("3")),
        [
            "⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n‹<think>\nadd\n</think>\n\n4⟦im_end⟧›\n"
            "⟦im_start⟧user\n3?⟦im_end⟧\n⟦im_start⟧assistant\n‹3⟦im_end⟧›\n"
        ],
        ASSISTANT_ONLY,
    ),
    "a thought beside the answer, by a template without thoughts": Case(
        "chatml",
        chat(ASKED, says("4", reasoning_content="add")),
        ["⟦im_start⟧user\n2+2?⟦im_end⟧\n⟦im_start⟧assistant\n<think>\nadd\n</think>\n\n4⟦im_end⟧\n"],
    ),
}


REFUSED = {
    "a picture": (
        "ours",
        chat(user([{"type": "image_url", "image_url": {"url": "http://x"}}])),
        {},
        "message 1 holds a part of type 'image_url', and only text can be trained on; remove it",
    ),
    "a thought that does not end": (
        "nano2",
        chat(ASKED, says("<think>\nadd")),
        {},
        "message 2 (assistant): its thought has no </think>; mend or remove it",
    ),
    "no thought where one is opened": (
        "nano2",
        chat(ASKED, says("4")),
        {},
        "message 2 (assistant): it has no thought, but the chat template opens one; add it as reasoning_content, or",
    ),
    "a thought with thinking off": (
        "nemotron3",
        chat(ASKED, says("4", reasoning_content="add"), reasoning="off"),
        {},
        "message 2 (assistant): it holds a thought, but the chat template closes the thought before it; say",
    ),
    "two thoughts": (
        "qwen3",
        chat(ASKED, says(f"{THOUGHT}4", reasoning_content="subtract")),
        {},
        "message 2 (assistant): it has a thought in its content and one beside it; keep one",
    ),
    "a role that the template leaves out": (
        "nano2",
        chat(ASKED, {"role": "developer", "content": "be brief"}, says(f"{THOUGHT}4")),
        {},
        "message 3 (assistant): the chat template loses message 2 (developer)",
    ),
    "tools that the template does not know": (
        "chatml",
        chat(ASKED, says("4"), tools=[WEATHER]),
        {},
        "message 2 (assistant): the chat template does not render the tool 'weather'; use one that knows tools",
    ),
    "calls that the template does not know": (
        "ours",
        chat(ASKED, says("", tool_calls=ROME)),
        {},
        "message 2 (assistant): the chat template loses its tool calls",
    ),
    "a switch that is none": (
        "ours",
        chat(ASKED, says("4"), reasoning="because"),
        {},
        "'reasoning' is 'because', neither 'on' nor 'off'; mend it, or set the source's reasoning_field to another",
    ),
    "tools that are none": ("ours", chat(ASKED, says("4"), tools="hammer"), {}, "'tools' is not a list of tools; mend"),
    "nobody to learn from": (
        "ours",
        chat(ASKED),
        ASSISTANT_ONLY,
        "holds no message of the assistant, of which train_on: assistant learns",
    ),
    "an argument that is not the template's": (
        "ours",
        chat(ASKED, says("4"), chat_template_kwargs={"add_generation_prompt": True}),
        {},
        "chat_template_kwargs gives 'add_generation_prompt', which is no template's own; remove it",
    ),
    "a question without content": ("ours", chat(user(None), says("4")), {}, "the chat template refuses it ("),
    "nobody but a system message to learn from": (
        "ours",
        chat(system("Be good.")),
        ASSISTANT_ONLY,
        "holds no message of the assistant, of which train_on: assistant learns",
    ),
    "a null for a tool": ("hermes", chat(ASKED, says("4"), tools=[None]), {}, "'tools' is not a list of tools; mend"),
    "a question after a thought that is dropped then": (
        "nano2",
        chat(ASKED, says(f"{THOUGHT}4"), user("and?")),
        {},
        "it ends in a message of user, with which the chat template drops the thought before; remove that message",
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerFast]:
    directory = tmp_path_factory.mktemp("tokenizers")
    for name in TEMPLATES:
        write_tokenizer(directory / name, name)
    return {name: load_tokenizer(directory / name) for name in TEMPLATES}


def with_invented_keys(value: Any) -> Any:
    """A row whose every struct has one key more, so that Parquet gives that key to those of the row before it."""
    if isinstance(value, dict):
        return {**{key: with_invented_keys(inner) for key, inner in value.items()}, "invented": "x"}
    return [with_invented_keys(inner) for inner in value] if isinstance(value, list) else value


def write_row(directory: Path, row: Row, kind: str) -> Path:
    path = directory / f"rows.{kind}"
    rows = [row, with_invented_keys(row)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.Table.from_pylist(rows[::-1]).schema), path)
    return path


def samples(
    directory: Path, tokenizer: PreTrainedTokenizerFast, row: Row, kind: str, options: Mapping[str, Any]
) -> list[Sample]:
    source = DataSource(path=str(write_row(directory, row, kind)), **options)
    found = iter_documents(source, directory / "work")
    _, made = next(Encoder(tokenizer, ()).samples([next(found)], source, Tally(source)))
    return made


def shown(sample: Sample, tokenizer: PreTrainedTokenizerFast) -> str:
    """The sample in the notation of the table."""
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    mask = sample.learned or b"\x01" * len(sample.ids)
    text, characters, learned = "", [], all(mask)
    marks = not learned

    def flush() -> str:
        done = tokenizer.decode(characters)
        characters.clear()
        return done

    for i, (token, is_learned) in enumerate(zip(sample.ids, mask, strict=True)):
        if marks and bool(is_learned) != (i > 0 and bool(mask[i - 1])):
            text += flush() + ("‹" if is_learned else "›")
        if token in special:
            text += f"{flush()}⟦{tokenizer.convert_ids_to_tokens(token).strip('<>').replace('|', '')}⟧"
        else:
            characters.append(token)
    return text + flush() + ("›" if marks and mask[-1] else "")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_trained_on_is_what_the_model_reads_and_writes(
    tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path, case: Case, kind: str
) -> None:
    tokenizer = tokenizers[case.template]
    made = samples(tmp_path, tokenizer, case.row, kind, case.source)
    assert [shown(sample, tokenizer) for sample in made] == case.expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(("template", "row", "options", "fault"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_lost_is_refused_with_its_place(
    tokenizers: dict[str, PreTrainedTokenizerFast],
    tmp_path: Path,
    template: str,
    row: Row,
    options: Mapping[str, Any],
    fault: str,
    kind: str,
) -> None:
    with pytest.raises(ValueError) as failure:
        samples(tmp_path, tokenizers[template], row, kind, options)
    where = f"{tmp_path}/rows.{kind} {'line' if kind == 'jsonl' else 'row'} 1"
    assert str(failure.value).removeprefix(where).lstrip(": ").startswith(fault)
    assert str(failure.value).startswith(where)


PLAIN = {
    "one turn": [ASKED, says("4")],
    "two turns": [system("Be exact."), ASKED, says("4"), user("3?"), says("3\n")],
    "special tokens": [user("<end> <|im_end|></s>"), says("<|user|><|eot|> ends")],
    "content that repeats": [user("assistant"), says("user"), user("user"), says("assistant")],
    "white space": [user(" a "), says("\n b \n"), user("c"), says(" d")],
    "nothing": [user("a"), says("")],
}


@pytest.mark.parametrize("template", ["ours", "chatml", "llama"])
@pytest.mark.parametrize("messages", PLAIN.values(), ids=PLAIN)
def test_the_short_way_of_plain_chats_gives_what_turn_by_turn_gives(
    tokenizers: dict[str, PreTrainedTokenizerFast],
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    messages: list[Row],
) -> None:
    tokenizer = tokenizers[template]

    def made() -> list[str]:
        source = DataSource(path="x", train_on="assistant")
        documents = [Document(Chat(messages), "here")]
        (_, found), *_ = Encoder(tokenizer, ()).samples(documents, source, Tally(source))
        return [shown(sample, tokenizer) for sample in found]

    assert _Rendering(Chat(messages), Template(tokenizer), "", {}, False).in_one_go() or template == "llama"
    short = made()
    monkeypatch.setattr(_Rendering, "in_one_go", lambda self: None)
    assert made() == short


@pytest.mark.parametrize("template", ["ours", "chatml", "bare"])
@pytest.mark.parametrize("messages", PLAIN.values(), ids=PLAIN)
def test_chats_have_the_tokens_that_transformers_gives_them(
    tokenizers: dict[str, PreTrainedTokenizerFast], template: str, messages: list[Row]
) -> None:
    # transformers encodes prompt and answer together. Where white space meets there, it reads other tokens than a model
    # that is asked: no white space around the answers, and no llama, whose prompt ends in a token of two newlines.
    messages = [{**message, "content": message["content"].strip()} for message in messages]
    tokenizer = tokenizers[template]
    source = DataSource(path="x")
    (_, (sample,)), *_ = Encoder(tokenizer, ()).samples([Document(Chat(messages), "")], source, Tally(source))
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, sanitize_control_tokens=True)
    assert sample.ids == expected


def test_a_tokenizer_that_splits_special_tokens_gives_those_of_the_template(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    chatting, source = Document(Chat(PLAIN["one turn"]), ""), DataSource(path="x")
    tokenizer = deepcopy(tokenizers["ours"])
    (_, (usual,)), *_ = Encoder(tokenizer, ()).samples([chatting], source, Tally(source))
    tokenizer.backend_tokenizer.encode_special_tokens = True  # as transformers loads one with split_special_tokens
    (_, (sample,)), *_ = Encoder(tokenizer, ()).samples([chatting], source, Tally(source))
    assert sample.ids == usual.ids


def test_a_null_that_json_writes_into_arguments_stays_and_one_that_parquet_invents_goes(
    tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    row = chat(user("Rome?"), says("", tool_calls=calls("weather", {"city": "Rome", "at": {"day": None, "of": "May"}})))
    for kind, at in (("jsonl", '{"day": null, "of": "May"}'), ("parquet", '{"of": "May"}')):
        (sample,) = samples(tmp_path, tokenizers["hermes"], row, kind, {})
        assert f'{{"city": "Rome", "at": {at}}}' in shown(sample, tokenizers["hermes"]), kind


def test_turns_without_a_thought_are_counted_where_nothing_says_that_they_have_none(
    tokenizers: dict[str, PreTrainedTokenizerFast],
) -> None:
    source = DataSource(path="x")
    tally = Tally(source)
    silent, said = [ASKED, says("4"), user("3?"), says("3", reasoning_content="so")], {"enable_thinking": False}
    documents = [Document(Chat(silent), ""), Document(Chat(silent[:2], arguments=said), "")]
    list(Encoder(tokenizers["nemotron3"], ()).samples(documents, source, tally))
    assert tally.unthought == 1


def test_a_thousand_special_tokens_are_found_as_one_by_one(tmp_path: Path) -> None:
    tokens = [*(f"<SPECIAL_{i}>" for i in range(1000)), "<s>", "<s>>", "[INST]"]
    tokenizer = write_tokenizer(tmp_path, "bare")
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    text = "<SPECIAL_1><SPECIAL_10>x<SPECIAL_1000><s>><s>[INST]<end>"
    found = [match[0] for match in Template(tokenizer).special.finditer(text)]
    assert found == ["<SPECIAL_1>", "<SPECIAL_10>", "<s>>", "<s>", "[INST]", "<end>"]


WORDS = (
    "4",
    "\n",
    "\n\n",
    " ",
    "<end>",
    "<|im_end|>",
    "</s>",
    "<SPECIAL_12>",
    "user",
    '{"a": 1}',
    "é",
    "\U0001f600",
    "<",
)


def random_chat(rng: random.Random) -> list[Row]:
    def text() -> str:
        return "".join(rng.choices(WORDS, k=rng.randint(1, 5))) + "x"

    messages = [system(text())] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        how = rng.choice(("within", "beside"))
        thought, answer = text(), text()
        reply = says(f"<think>\n{thought}\n</think>\n\n{answer}") if how == "within" else says(answer)
        messages += [user(text()), {**reply, "reasoning_content": thought} if how == "beside" else reply]
    return messages


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "words"])
def test_every_turn_of_any_chat_is_learned_once_with_its_thought_its_answer_and_one_end(
    tokenizers: dict[str, PreTrainedTokenizerFast], template: str
) -> None:
    rng, tokenizer = random.Random(0), tokenizers[template]
    source = DataSource(path="x", train_on="assistant")
    end = tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id).strip("<>").replace("|", "")
    for _ in range(25):
        messages = random_chat(rng)
        chat = read_chat({"messages": messages}, source, "", columns=False)
        (_, made), *_ = Encoder(tokenizer, ()).samples([Document(chat, "")], source, Tally(source))
        written = re.findall("‹(.*?)›", "".join(shown(sample, tokenizer) for sample in made), re.DOTALL)
        assert len(written) == len(messages) // 2
        for text, message in zip(written, (m for m in messages if m["role"] == "assistant"), strict=True):
            *_, answer = message["content"].rpartition("</think>")
            thought = message.get("reasoning_content") or message["content"].split("\n</think>")[0][len("<think>\n") :]
            inside, after = re.split("</think>|⟦/think⟧", text)
            assert inside.split("<think>")[-1].strip() == thought.strip()
            assert re.fullmatch(rf"\s*{re.escape(answer.strip())}\s*⟦{end}⟧", after)
            assert text.count(f"⟦{end}⟧") == 1


def test_copies_of_a_chat_have_one_digest_in_whatever_form_they_came() -> None:
    def digest(*messages: Row) -> bytes:
        return Document(read_chat(chat(*messages), DataSource(path="x"), "", columns=False), "").digest()

    beside = digest(ASKED, says("4", reasoning_content="add"))
    assert digest(ASKED, says(f"{THOUGHT}4")) == beside
    assert digest({**ASKED, "id": "a1"}, says("4", reasoning_content="add", weight=1)) == beside
    assert digest(ASKED, says("4", thinking="\nadd\n", name="a")) == beside
    assert len({beside, digest(ASKED, says("4")), digest(ASKED, says("5", reasoning_content="add"))}) == 3
    # As it was of chats without thoughts before.
    plain = json.dumps([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": " 4"}], sort_keys=True)
    assert digest(ASKED, says(" 4")) == hashlib.sha256(plain.encode()).digest()


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "words"])
def test_every_question_of_any_chat_is_learned_once_where_all_is(
    tokenizers: dict[str, PreTrainedTokenizerFast], template: str
) -> None:
    rng, tokenizer, source = random.Random(1), tokenizers[template], DataSource(path="x")
    learned_of = 0
    for _ in range(20):
        messages = random_chat(rng)
        for number, message in enumerate(messages):
            if message["role"] == "user":
                message["content"] += f"[{number}]"
            elif message["role"] == "assistant" and rng.random() < 0.3:
                messages[number] = says(message["content"].rpartition("</think>")[2].strip())  # without a thought
        chat = read_chat({"messages": messages}, source, "", columns=False)
        try:
            (_, made), *_ = Encoder(tokenizer, ()).samples([Document(chat, "")], source, Tally(source))
        except ValueError:  # nothing is made of a row that cannot be used
            continue
        learned = "".join(tokenizer.decode(list(compress(s.ids, s.learned or b"\1" * len(s.ids)))) for s in made)
        asked = [f"[{number}]" for number, message in enumerate(messages) if message["role"] == "user"]
        assert [learned.count(question) for question in asked] == [1] * len(asked)
        learned_of += len(asked)
    assert learned_of > 10


PAGE = (Path(__file__).parents[3] / "infra/data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- (\w+)(?: train_on=(\w+))? -->\n```json\n(.+?)\n```\n\n```\n(.+?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("template", "train_on", "row", "expected"), EXAMPLES, ids=[f"{e[0]}" for e in EXAMPLES])
def test_an_example_of_the_page_on_data_becomes_what_the_page_shows(
    template: str,
    train_on: str,
    row: str,
    expected: str,
    tokenizers: dict[str, PreTrainedTokenizerFast],
    tmp_path: Path,
) -> None:
    options = {"train_on": train_on} if train_on else {}
    (sample,) = samples(tmp_path, tokenizers[template], json.loads(row), "jsonl", options)
    assert shown(sample, tokenizers[template]).rstrip("\n") == expected


def test_the_page_on_data_has_an_example_of_every_row() -> None:
    assert len(EXAMPLES) == PAGE.count("```json") == 6
