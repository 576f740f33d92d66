"""Laws of the client of a server of models, against a real HTTP server whose answers each test writes."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from templates import write_tokenizer

from elastic_core.judging import Benchmark, Endpoint, Sampling
from tasks.corpus.problems import beside_thoughts, spoken
from tasks.judging.answers import without_thought
from tasks.judging.endpoint import Client, Served
from tasks.judging.judge import judge
from tasks.judging.samples import Request
from tasks.judging.sandbox import why_not_isolated
from tasks.settings import ServiceError

ASKED = Request(model="digest", problem="i", prompt="2+2?", sampling=Sampling(max_new_tokens=9), seed=5)
PLAIN = replace(ASKED, sampling=Sampling(max_new_tokens=9, system=None, thinking=False))
# Status and body, from the body that was sent.
Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class Server:
    """Answers `/v1/chat/completions` by `answer`, and has `models`; `seen` is all that it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.models = ["m", "n"]
        self.url = ""

    def endpoint(self, **fields: Any) -> Endpoint:
        return Endpoint(**{"url": self.url, "model": "m", "concurrency": 4, **fields})

    def engine(self) -> Served:
        return Served(self.endpoint(), "s", "/slices/s", "digest", "digest")


@contextmanager
def served(answer: Answer) -> Iterator[Server]:
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(200, {"object": "list", "data": [{"id": name} for name in server.models]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.seen.append(body)
            server.keys.append(self.headers["Authorization"])
            status, answered = server.answer(body)
            if status == 0:
                self.close_connection = True  # as an engine that dies does
                return
            self.reply(status, answered)

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def said(text: str | None, *, finish: str = "stop", tokens: int = 3, **message: Any) -> tuple[int, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return 200, {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.running.patience.DELAYS", (0.01,))
    monkeypatch.setattr("tasks.running.patience.RETRIES", 3)


def test_a_request_is_asked_as_it_is() -> None:
    with served(lambda body: said("hm</think>4")) as server:
        found = Client(server.endpoint()).complete(ASKED)
    assert (found.text, found.tokens, found.finish) == ("hm</think>4", 3, "stop")
    assert server.seen == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "/think"}, {"role": "user", "content": "2+2?"}],
            "temperature": 0.6,
            "top_p": 0.95,
            "max_tokens": 9,
            "seed": 5,
        }
    ]


@pytest.mark.parametrize("template", ["nemotron3", "nano2"])
def test_the_end_of_a_thought_is_seen_where_it_is_a_special_token(tmp_path: Path, template: str) -> None:
    """A server that decodes as vLLM does: it leaves out special tokens unless it is asked for them."""
    tokenizer = write_tokenizer(tmp_path, template)
    ids = tokenizer.encode(f"hm\n</think>\n4{tokenizer.eos_token}", add_special_tokens=False)
    special = beside_thoughts(tokenizer)
    assert bool(special) == (template == "nemotron3")

    def decoded(body: dict[str, Any]) -> tuple[int, Any]:
        return said(tokenizer.decode(ids, skip_special_tokens=body.get("skip_special_tokens", True)))

    with served(decoded) as server:
        found = Client(server.endpoint(), special=special).complete(ASKED)
        assert Client(server.endpoint()).complete(replace(ASKED, sampling=PLAIN.sampling)).text.endswith("4")
    assert found.text == spoken(ids, tokenizer) == "hm\n</think>\n4"
    assert without_thought(found.text, thinking=True) == "4"
    assert ("skip_special_tokens" in server.seen[0]) == bool(special)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_thought_that_the_server_took_apart_is_put_back(field: str) -> None:
    def text(answer: tuple[int, Any]) -> str:
        with served(lambda body: answer) as server:
            return Client(server.endpoint()).complete(ASKED).text

    assert text(said("4", **{field: "hm"})) == "<think>hm</think>4"
    assert text(said(None, finish="length", **{field: "hm"})) == "<think>hm"
    assert text(said("hm</think>4", **{field: None})) == "hm</think>4"


@pytest.mark.parametrize(
    ("parser", "answer"), [(True, "<think></think>4"), (False, "4")], ids=["a parser", "no parser"]
)
@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_an_answer_with_no_thought_is_one_only_where_the_server_takes_thoughts_apart(
    parser: bool, answer: str, field: str
) -> None:
    """Without a parser the same words are a thought that does not end; the field is there and empty in both."""

    def answered(body: dict[str, Any]) -> tuple[int, Any]:
        if body["messages"][-1]["content"] == ASKED.prompt:
            return said("4", **{field: None})
        return said(None if parser else "101 is prime", finish="length", **{field: "101 is prime" if parser else None})

    with served(answered) as server:
        client = Client(server.endpoint())
        assert [client.complete(ASKED).text for _ in range(3)] == [answer] * 3
        assert len(server.seen) == 3 + 1  # the server is found out once
        assert client.complete(PLAIN).text == "4"


def test_an_answer_that_was_cut_off_is_not_taken_for_one_with_no_thought() -> None:
    with served(lambda body: said("hm", finish="length", reasoning=None)) as server:
        assert Client(server.endpoint()).complete(ASKED).text == "hm"
    assert len(server.seen) == 1


@pytest.mark.parametrize("fault", [(503, {}), (429, {}), (500, {}), (0, None), said("", finish="abort")], ids=str)
def test_a_fault_that_passes_is_waited_out(fault: tuple[int, Any]) -> None:
    faults = [fault, fault]
    with served(lambda body: faults.pop() if faults else said("4")) as server:
        assert Client(server.endpoint()).complete(PLAIN).text == "4"
    assert len(server.seen) == 3


def test_a_completion_that_takes_too_long_is_asked_for_again() -> None:
    answered = threading.Event()
    with served(lambda body: said("4") if len(server.seen) > 1 else (answered.wait(30) and said("late"))) as server:
        assert Client(server.endpoint(seconds=1)).complete(PLAIN).text == "4"
        answered.set()


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((400, {"message": "too long"}), ValueError, r'refused with 400: \{"message": "too long"\}'),
        ((401, {}), ValueError, "refused with 401"),
        ((404, {}), ValueError, "refused with 404"),
        ((200, b"<html>"), ServiceError, "not JSON; correct url"),
        ((302, {}), ServiceError, "answered 302, not 200"),
        ((200, {"choices": []}), ServiceError, "no chat completion"),
        ((200, [1]), ServiceError, "not 200 with an object"),
        (said("4", finish="tool_calls"), ServiceError, "ended a completion with 'tool_calls'"),
    ],
)
def test_a_fault_that_stays_is_one_line_and_not_tried_again(answer: Any, error: type[Exception], words: str) -> None:
    with served(lambda body: answer) as server, pytest.raises(error, match=words):
        Client(server.endpoint()).complete(ASKED)
    assert len(server.seen) == 1


def test_a_model_that_the_server_has_not_is_named_with_those_that_it_has() -> None:
    with served(lambda body: said("4")) as server:
        Client(server.endpoint()).check("/slices/m")
        with pytest.raises(ValueError, match="has no model 'x', but m, n; serve /slices/x by that name"):
            Client(server.endpoint(model="x")).check("/slices/x")


def test_a_size_is_asked_by_its_name_or_by_its_directory_and_only_a_name_has_to_be_listed(tmp_path: Path) -> None:
    rows = [{"problem": "1+1", "answer": "2"}]
    benchmark = Benchmark(name="sums", path=str(write(tmp_path, rows)), format="exact", runs=1)
    with served(lambda body: said("hm</think>2")) as server:
        for model, asked in (("{size}", "m"), ("{path}", "/slices/m"), ("m", "m")):
            engine = Served(server.endpoint(model=model), "m", "/slices/m", "digest", f"digest as {model}")
            assert judge(benchmark, engine, tmp_path / "samples").accuracy == 1
            assert server.seen.pop()["model"] == asked
        with pytest.raises(ValueError, match="has no model 'nano-m', but m, n"):
            judge(
                benchmark,
                Served(server.endpoint(model="nano-{size}"), "m", "", "digest", "digest"),
                tmp_path / "samples",
            )


def test_a_server_that_still_has_an_earlier_runs_weights_is_not_asked_for_this_ones(tmp_path: Path) -> None:
    benchmark = Benchmark(
        name="sums", path=str(write(tmp_path, [{"problem": "1+1", "answer": "2"}])), format="exact", runs=1
    )
    with served(lambda body: said("hm</think>2")) as server:
        server.models, by_digest = ["m-" + "a" * 12], server.endpoint(model="{size}-{digest}")
        assert judge(benchmark, Served(by_digest, "m", "/1", "a" * 64, "a"), tmp_path / "1").accuracy == 1
        with pytest.raises(ValueError, match=r"has no model 'm-b{12}', but m-a{12}; serve /2 by that name"):
            judge(benchmark, Served(by_digest, "m", "/2", "b" * 64, "b"), tmp_path / "2")
    assert [body["model"] for body in server.seen] == server.models


def test_the_key_is_sent_and_a_url_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with served(lambda body: said("4")) as server:
        Client(server.endpoint()).complete(PLAIN)
    assert server.keys == ["Bearer sesame"]
    with pytest.raises(ValueError, match=r"url does not begin with http:// or https://; write http://host:port/v1"):
        Endpoint(url="localhost", model="m")
    with pytest.raises(ValueError, match="url holds a user's name or password; leave it out, and set OPENAI_API_KEY"):
        Endpoint(url="https://me:sesame@host/v1", model="m")


def write(directory: Path, rows: list[dict[str, str]]) -> Path:
    path = directory / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_benchmark_is_judged_and_goes_on_where_it_ended(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}+1", "answer": str(i + 1)} for i in range(10)]
    benchmark = Benchmark(name="sums", path=str(write(tmp_path, rows)), format="math", runs=2, prompt="{problem}")
    asked = itertools.count()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        if 7 <= next(asked) < 20:
            return 400, {}
        i = int(body["messages"][-1]["content"].partition("+")[0])
        return said(f"hm</think>\\boxed{{{i + 1 + i // 8}}}")  # wrong for 8 and 9

    with served(answer) as server:
        samples = tmp_path / "sums.samples.jsonl"
        with pytest.raises(ValueError, match="refused with 400"):
            judge(benchmark, server.engine(), samples)
        kept = len(samples.read_text().splitlines())
        assert kept == 7
        asked = itertools.count(20)
        server.seen.clear()
        found = judge(benchmark, server.engine(), samples)
        assert len(server.seen) == 20 - kept
    assert (found.problems, found.runs, found.accuracy, found.unanswered) == (10, 2, 0.8, 0.0)
    again = judge(benchmark, server.engine(), samples)  # without the server
    assert again == found


def test_programs_are_refused_before_anything_is_asked_where_they_cannot_be_isolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = [{"input": "2", "output": "4"}]
    rows: list[Any] = [{"question_content": "Double it.", "public_test_cases": tests, "metadata": {}}]
    drawn, path = Sampling(thinking=False), str(write(tmp_path, rows))
    benchmark = Benchmark(name="code", path=path, format="livecodebench", runs=1, sampling=drawn)
    why_not_isolated.cache_clear()
    with monkeypatch.context() as patch, served(lambda body: said("```python\nprint(2 * int(input()))\n```")) as server:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(ValueError, match="cannot be isolated here: there is no bwrap"):
            judge(benchmark, server.engine(), tmp_path / "s")
        assert not server.seen
        assert judge(benchmark, server.engine(), tmp_path / "s", unsafe_code=True).accuracy == 1
    why_not_isolated.cache_clear()
