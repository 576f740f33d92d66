"""A small size thinks, a large one answers, over real HTTP with a stand-in for the engines."""

from typing import Any

import pytest
from endpoint import CHAT, ONE, Stage, events
from transformers import AutoTokenizer


def test_a_small_size_thinks_and_a_large_one_goes_on_after_its_thought(serve: Stage) -> None:
    tokenizer = AutoTokenizer.from_pretrained(serve.checkpoint)
    with serve(memory=ONE) as served:
        served.says("tiny-s", "two and", " two\n</th", "ink>", " never shown")
        served.says("tiny-l", "\n\n", "4", " </think> is an odd answer")
        answer = served.ask("tiny?think=s&answer=l", temperature=0.5, stop="END").json()
        (choice,) = answer["choices"]
        assert choice["message"] == {
            "role": "assistant",
            "reasoning_content": "two and two\n",
            "content": "\n\n4 </think> is an odd answer",
        }
        assert choice["finish_reason"] == "stop"
        assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 7, "total_tokens": 14}
        (thought,), (answered,) = served.asked("tiny-s"), served.asked("tiny-l")
        prompt = "<|user|>2 + 2?<|assistant|><think>\n"
        assert tokenizer.decode(thought["prompt"]) == prompt
        assert tokenizer.decode(answered["prompt"]) == f"{prompt}two and two\n</think>"
        assert (thought["stop"], answered["stop"]) == (["</think>"], "END")
        assert thought["temperature"] == answered["temperature"] == 0.5
        assert thought["max_tokens"] == 100 - len(thought["prompt"])
        assert answered["max_tokens"] == 100 - len(answered["prompt"])


def test_a_composed_answer_streams_piece_by_piece(serve: Stage) -> None:
    with serve("tiny-s", "tiny-l") as served, served.client() as client:
        served.says("tiny-s", "hm", "m</think>")
        served.says("tiny-l", "4", "!")
        (serve.directory / "gated").touch()
        body = {"model": "tiny?think=s&answer=l", "messages": CHAT, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            pieces = answer.iter_text()
            first = next(pieces)
            (serve.directory / "gated").unlink()
            *chunks, done = events(first + "".join(pieces))
        assert done == "[DONE]"
        assert [choice["delta"] for chunk in chunks for choice in chunk["choices"]] == [
            {"role": "assistant", "reasoning_content": "hm"},
            {"reasoning_content": "m"},
            {"content": "4"},
            {"content": "!"},
            {},
        ]
        assert [c["finish_reason"] for chunk in chunks for c in chunk["choices"]] == [None] * 4 + ["stop"]
        assert chunks[-1]["usage"]["completion_tokens"] == 4


def test_a_thought_is_cut_at_its_limit_and_an_answer_at_the_requests(serve: Stage) -> None:
    with serve("tiny-s", "tiny-l") as served:
        served.says("tiny-s", "on", " and", " on", " for", " ever")
        served.says("tiny-l", "4", "2", "!")
        answer = served.ask("tiny?think=s&answer=l&thought_tokens=2", max_tokens=4).json()
        assert answer["choices"][0]["message"]["reasoning_content"] == "on and"
        assert answer["choices"][0]["message"]["content"] == "42"
        assert (answer["choices"][0]["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", 4)
        alone = served.ask("tiny?think=s&answer=l", max_completion_tokens=3).json()["choices"][0]
        assert (alone["message"]["reasoning_content"], alone["message"]["content"]) == ("on and on", "")
        assert alone["finish_reason"] == "length"
        assert len(served.asked("tiny-l")) == 1


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        ("tiny?think=s", {}, "is not FAMILY"),
        ("tiny?think=s&answer=l&thought_tokens=none", {}, "is not FAMILY"),
        ("tiny?think=s&answer=x", {}, "has l, m, s here, not 'x'"),
        ("other?think=s&answer=l", {}, "has no budget here"),
        ("tiny?think=s&answer=l", {"tools": []}, "tools is not for a chat"),
        ("tiny?think=s&answer=l", {"n": 2}, "n must be 1"),
        ("tiny?think=s&answer=l", {"max_tokens": "many"}, "not a number of tokens"),
        ("tiny?think=s&answer=l", {"messages": "hello"}, "not a list of messages"),
        ("tiny?think=s&answer=l", {"messages": CHAT * 50}, "leave no room in a context of 100"),
    ],
)
def test_what_cannot_be_composed_is_refused_in_a_line(
    model: str, fields: dict[str, Any], said: str, serve: Stage
) -> None:
    with serve("tiny-s") as served:
        refused = served.ask(model, **fields)
        assert refused.status_code in (400, 404)
        assert said in refused.json()["error"]["message"]
        assert served.ask(model, "/v1/completions", prompt="x").status_code in (400, 404)


def test_an_engine_that_takes_texts_alone_is_given_texts(serve: Stage) -> None:
    with serve("tiny-s", "tiny-l", kind="transformers") as served:
        served.says("tiny-s", "hmm</think>")
        answer = served.ask("tiny?think=s&answer=l").json()
        assert answer["choices"][0]["message"]["content"] == "said by l in pieces"
        (thought,), (answered,) = served.asked("tiny-s"), served.asked("tiny-l")
        prompt = "<|user|>2 + 2?<|assistant|><think>\n"
        assert (thought["prompt"], answered["prompt"]) == (prompt, f"{prompt}hmm</think>")
        assert thought["model"] == str(serve.directory / "served" / "tiny-s")
        assert 0 < answered["max_tokens"] < thought["max_tokens"] < 100
        assert "skip_special_tokens" not in thought  # it refuses what it does not know
