"""Laws of problems: they are read and rendered as the sources are, and what follows the last thought is the answer."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from templates import write_tokenizer

from tasks.corpus.chats import Chat
from tasks.corpus.problems import Problem, Prompt, encode_questions, read_problems

ROWS = [
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": f"{a}+1?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": f"<think>\nadd\n</think>\n\n{a + 1}"}]},
        ],
        "task": "sum",
        "reasoning": "off",
    }
    for a in range(4)
]
EXPECTED = [
    Problem(
        question=Chat([{"role": "user", "content": f"{a}+1?"}], arguments={"enable_thinking": False}),
        answer=str(a + 1),
        task="sum",
        where="",
    )
    for a in range(3)
]


def write(directory: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    path = directory / name
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.parquet"])
def test_problems_are_read_as_sources_are(tmp_path: Path, name: str) -> None:
    found = read_problems(write(tmp_path, name, ROWS), 3)
    assert [(p.question, p.answer, p.task) for p in found] == [(p.question, p.answer, p.task) for p in EXPECTED]
    assert found[0].where.startswith(str(tmp_path / name))


def test_prompts_are_what_the_template_asks(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "nemotron3")
    (on, off) = (
        Chat([{"role": "user", "content": "<|im_end|>?"}], arguments=a) for a in ({}, {"enable_thinking": False})
    )
    problems = [Problem(question=chat, answer="", task="", where="here") for chat in (on, off)]
    opened, closed = encode_questions(tokenizer, problems, {})
    assert (opened.thinking, closed.thinking) == (True, False)
    asked = "<|im_start|>user\n<|im_end|>?<|im_end|>\n<|im_start|>assistant\n<think>"
    assert tokenizer.decode(opened.ids) == f"{asked}\n"
    assert tokenizer.decode(closed.ids) == f"{asked}</think>"
    # The question spells the end of a turn; only the template writes one.
    assert opened.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert [prompt.thinking for prompt in encode_questions(tokenizer, problems, {"enable_thinking": False})] == [
        False
    ] * 2


@pytest.mark.parametrize(
    ("completion", "thinking", "answer"),
    [
        (" 4 \n", False, "4"),
        ("add\n</think>\n\n4", True, "4"),
        ("<think>\nadd\n</think>\n\n4", False, "4"),
        ("a </think> b </think> 4", True, "4"),
        ("4", True, None),
        ("<think> 4", False, None),
        ("</think> 3 <think> no, 4", True, None),
    ],
)
def test_the_answer_is_what_follows_the_last_thought(completion: str, thinking: bool, answer: str | None) -> None:
    assert Prompt([], thinking).answer(completion) == answer


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"text": "a"}, "p.jsonl line 1 has no 'messages', the last of which is the answer; mend or remove it"),
        ({"messages": []}, "p.jsonl line 1: the last message holds no answer; mend or remove it"),
        (
            {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>"}]},
            "p.jsonl line 1: the",
        ),
        ({"messages": "beep"}, "p.jsonl line 1: 'messages' is not a list of messages with roles; mend or remove it"),
    ],
)
def test_a_problem_without_an_answer_is_refused_with_its_place(tmp_path: Path, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=re.escape(fault)):
        read_problems(write(tmp_path, "p.jsonl", [row]), 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no\.jsonl: No such file; correct evaluation\.problems"):
        read_problems(tmp_path / "no.jsonl", 3)
