"""The endpoint of `elastic serve`, over real HTTP, with a stand-in for the engines."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import standin
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from flows.commands.serve import serve_models
from flows.serving.engines import Program, find_program
from flows.serving.front import endpoint
from flows.serving.residents import Residents, Size
from tasks.corpus.tokenizer import train_tokenizer
from tasks.settings import ServiceError

WEIGHTS, CACHE = 1000, 24  # bytes, of each size
ONE, TWO = 1024, 2048  # memory for so many sizes
CHAT = [{"role": "user", "content": "2 + 2?"}]


def eventually(true: Any) -> Any:
    deadline = time.monotonic() + 60  # far beyond what it takes; a test that hangs should end
    while not (result := true()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return result


@dataclass(frozen=True)
class Serving:
    """A running endpoint of the sizes tiny-l, tiny-m and tiny-s."""

    url: str
    directory: Path
    key: str | None

    def client(self, timeout: float = 60.0) -> httpx.Client:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def ask(self, model: str, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json={"model": model, "messages": CHAT, **fields})

    def asked(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / f"asked-{name}.jsonl").read_text().splitlines()]

    def says(self, name: str, *pieces: str) -> None:
        (self.directory / f"{name}.json").write_text(json.dumps({"pieces": pieces}))

    def states(self) -> dict[str, str]:
        return dict(self.get("/health").json()["models"])

    def processes(self, name: str) -> list[list[int]]:
        """The engine and its child, of each start."""
        lines = [line.split() for line in (self.directory / "processes").read_text().splitlines()]
        return [[int(process) for process in line[1:]] for line in lines if line[0] == name]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the endpoint itself reads of a checkpoint: its tokenizer, and how large its weights are."""
    directory = tmp_path_factory.mktemp("checkpoint")
    text = Path(standin.__file__).read_text()
    train_tokenizer([text], directory, vocab_size=300, max_length=100)
    (directory / "model.safetensors").write_bytes(bytes(WEIGHTS))
    return directory


@pytest.fixture
def program(tmp_path: Path) -> Program:
    path = tmp_path / "vllm"
    path.write_text(f"#!{sys.executable}\n{Path(standin.__file__).read_text()}")
    path.chmod(0o755)
    return find_program(str(path))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STANDIN", str(tmp_path))
    for name in "lms":
        (tmp_path / f"tiny-{name}.json").write_text(json.dumps({"pieces": [f"said by {name}", " in", " pieces"]}))
    return tmp_path


async def nothing() -> None:
    pass


def sizes(checkpoint: Path) -> dict[str, Size]:
    return {
        f"tiny-{budget}": Size(
            name=f"tiny-{budget}",
            family="tiny",
            budget=budget,
            directory=checkpoint,
            created=1e9,
            bring=nothing,
        )
        for budget in "lms"
    }


@contextmanager
def serving(
    program: Program, checkpoint: Path, directory: Path, *start: str, memory: int = TWO, key: str | None = None
) -> Iterator[Serving]:
    """Serve for the duration; whatever was started must have ended then."""
    listening = socket.create_server(("127.0.0.1", 0))
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        async with Residents(
            sizes(checkpoint), program, memory=memory, cache=CACHE, logs=directory / "logs"
        ) as residents:
            await residents.start(list(start))
            config = uvicorn.Config(endpoint(residents, key), log_level="warning", timeout_graceful_shutdown=1)
            servers.append(uvicorn.Server(config))
            await servers[0].serve(sockets=[listening])

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        eventually(lambda: servers and servers[0].started)
        yield Serving(f"http://127.0.0.1:{listening.getsockname()[1]}", directory, key)
    finally:
        servers[0].should_exit = True
        thread.join()
        listening.close()
    started = [int(word) for word in (directory / "processes").read_text().split() if word.isdecimal()]
    eventually(lambda: not any(map(runs, started)))  # a kill takes a moment


def runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def events(text: str) -> list[Any]:
    said = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [each if each == "[DONE]" else json.loads(each) for each in said]


def test_the_sizes_are_its_models(program: Program, checkpoint: Path, directory: Path) -> None:
    with serving(program, checkpoint, directory, "tiny-s") as served:
        listed = served.get("/v1/models").json()["data"]
        assert [each["id"] for each in listed] == ["tiny-l", "tiny-m", "tiny-s"]
        assert served.get("/v1/models/tiny-m").json() == listed[1]
        for refused in (served.get("/v1/models/tiny-x"), served.ask("tiny-x")):
            assert refused.status_code == 404
            assert "tiny-l, tiny-m, tiny-s" in refused.json()["error"]["message"]
        for body in (b"", b"[]", b'{"messages": []}'):
            assert httpx.post(f"{served.url}/v1/chat/completions", content=body).status_code == 400


def test_a_request_and_its_answer_pass_as_they_are(program: Program, checkpoint: Path, directory: Path) -> None:
    with serving(program, checkpoint, directory, "tiny-s") as served:
        answer = served.ask("tiny-s", temperature=0.5, anything={"else": [1, None]})
        assert answer.json() == {"by": "tiny-s", "text": "said by s in pieces"}
        (asked,) = served.asked("tiny-s")
        sent = {"model": "tiny-s", "messages": CHAT, "temperature": 0.5, "anything": {"else": [1, None]}}
        assert asked == {"path": "/v1/chat/completions", **sent}
        served.ask("tiny-s", "/v1/completions", prompt="x")
        assert served.asked("tiny-s")[1]["path"] == "/v1/completions"
        (directory / "tiny-s.json").write_text('{"refuses": "too long"}')
        refused = served.ask("tiny-s")
        assert (refused.status_code, refused.json()) == (400, {"error": {"message": "too long"}})


def test_a_stream_passes_piece_by_piece(program: Program, checkpoint: Path, directory: Path) -> None:
    with serving(program, checkpoint, directory, "tiny-s") as served, served.client() as client:
        (directory / "gated").touch()
        with client.stream("POST", "/v1/chat/completions", json={"model": "tiny-s", "stream": True}) as answer:
            pieces = answer.iter_text()
            assert "said by s" in next(pieces)  # and the engine waits before it says more
            (directory / "gated").unlink()
            assert "".join(pieces).endswith("data: [DONE]\n\n")


def test_with_a_key_only_health_is_told_to_everyone(program: Program, checkpoint: Path, directory: Path) -> None:
    with serving(program, checkpoint, directory, "tiny-s", key="secret") as served:
        assert served.ask("tiny-s").status_code == 200
        for path in ("/v1/models", "/v1/models/tiny-s", "/metrics", "/docs"):
            for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
                assert httpx.get(f"{served.url}{path}", headers=headers).status_code == 401
        assert httpx.post(f"{served.url}/v1/chat/completions", json={"model": "tiny-s"}).status_code == 401
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert len(served.asked("tiny-s")) == 1


def test_a_size_starts_when_asked_for_and_the_longest_unused_goes(
    program: Program, checkpoint: Path, directory: Path
) -> None:
    with serving(program, checkpoint, directory, "tiny-s", "tiny-m", "tiny-l") as served:
        assert served.states() == {"tiny-l": "stopped", "tiny-m": "running", "tiny-s": "running"}
        assert served.ask("tiny-s").status_code == 200
        assert served.ask("tiny-l").json()["by"] == "tiny-l"
        assert served.states() == {"tiny-l": "running", "tiny-m": "stopped", "tiny-s": "running"}
        eventually(lambda: not any(map(runs, served.processes("tiny-m")[0])))


def test_a_size_that_answers_is_not_stopped_before_it_has(program: Program, checkpoint: Path, directory: Path) -> None:
    with serving(program, checkpoint, directory, "tiny-s", memory=ONE) as served, served.client() as client:
        (directory / "gated").touch()
        with client.stream("POST", "/v1/chat/completions", json={"model": "tiny-s", "stream": True}) as answer:
            pieces = answer.iter_text()
            next(pieces)
            other: list[httpx.Response] = []
            asking = threading.Thread(target=lambda: other.append(served.ask("tiny-l")))
            asking.start()
            eventually(lambda: served.states()["tiny-l"] == "starting")
            assert not served.processes("tiny-l")
            (directory / "gated").unlink()
            assert "".join(pieces).endswith("data: [DONE]\n\n")
        asking.join()
        assert other[0].json()["by"] == "tiny-l"


def test_many_who_ask_for_sizes_that_do_not_fit_together_all_get_answers(
    program: Program, checkpoint: Path, directory: Path
) -> None:
    with serving(program, checkpoint, directory, memory=ONE) as served:
        answers: list[str] = []
        names = ["tiny-s", "tiny-m", "tiny-l"] * 3
        asking = [threading.Thread(target=lambda n=n: answers.append(served.ask(n).json()["by"])) for n in names]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert sorted(answers) == sorted(names)


def test_a_size_too_large_for_the_memory_is_refused_in_a_line(
    program: Program, checkpoint: Path, directory: Path
) -> None:
    with pytest.raises(ServiceError, match=r"tiny-s takes 1 KiB with 24 B of cache, and there are 1000 B of memory"):
        asyncio.run(started(Residents(sizes(checkpoint), program, memory=1000, cache=CACHE, logs=directory)))


def test_an_engine_that_cannot_start_says_why_and_the_others_go_on(
    program: Program, checkpoint: Path, directory: Path
) -> None:
    (directory / "tiny-s.fails").touch()
    with pytest.raises(ServiceError, match="tiny-s did not start: RuntimeError: there is no device; log: /"):
        asyncio.run(started(Residents(sizes(checkpoint), program, memory=TWO, cache=CACHE, logs=directory)))
    with serving(program, checkpoint, directory, "tiny-l") as served:
        refused = served.ask("tiny-s")
        assert (refused.status_code, served.ask("tiny-l").status_code) == (503, 200)
        assert "no device" in refused.json()["error"]["message"]
        (directory / "tiny-s.fails").unlink()
        assert served.ask("tiny-s").status_code == 200


async def started(residents: Residents) -> None:
    async with residents:
        await residents.start(["tiny-s"])


def test_a_killed_engine_comes_back_without_its_old_children(
    program: Program, checkpoint: Path, directory: Path
) -> None:
    with serving(program, checkpoint, directory, "tiny-s") as served, served.client() as client:
        (engine, child), *_ = served.processes("tiny-s")
        (directory / "gated").touch()
        with client.stream("POST", "/v1/chat/completions", json={"model": "tiny-s", "stream": True}) as answer:
            pieces = answer.iter_text()
            next(pieces)
            os.kill(engine, 9)
            (error,) = events("".join(pieces))
            assert "ask again" in error["error"]["message"]  # and no end that looks like one
        (directory / "gated").unlink()
        assert served.ask("tiny-s").json()["by"] == "tiny-s"
        eventually(lambda: not runs(child))
        assert len(served.processes("tiny-s")) == 2


def test_a_client_that_hangs_up_lets_go_of_its_size(program: Program, checkpoint: Path, directory: Path) -> None:
    with serving(program, checkpoint, directory, "tiny-s", memory=ONE) as served:
        (directory / "gated").touch()
        with served.client(timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json={"model": "tiny-s"})
        eventually(lambda: served.ask("tiny-l", stream=False) if unlink(directory / "gated") else None)
        assert served.states()["tiny-l"] == "running"


def unlink(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True


def test_metrics_are_those_of_all_engines_with_the_size_as_a_label(
    program: Program, checkpoint: Path, directory: Path
) -> None:
    with serving(program, checkpoint, directory, "tiny-s", "tiny-m") as served:
        families = {each.name: each for each in text_string_to_metric_families(served.get("/metrics").text)}
        assert {sample.labels["size"]: sample.value for sample in families["asked"].samples} == {
            "tiny-s": 3.0,
            "tiny-m": 3.0,
        }
        running = {sample.labels["size"]: sample.value for sample in families["elastic_size_running"].samples}
        assert running == {"tiny-l": 0.0, "tiny-m": 1.0, "tiny-s": 1.0}


# A small size thinks, a large one answers


def test_a_small_size_thinks_and_a_large_one_goes_on_after_its_thought(
    program: Program, checkpoint: Path, directory: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with serving(program, checkpoint, directory, memory=ONE) as served:
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
        assert (thought["stop"], answered["stop"]) == (["</think>"], ["END"])
        assert thought["temperature"] == answered["temperature"] == 0.5
        assert thought["max_tokens"] == 100 - len(thought["prompt"])
        assert answered["max_tokens"] == 100 - len(answered["prompt"])


def test_a_composed_answer_streams_piece_by_piece(program: Program, checkpoint: Path, directory: Path) -> None:
    with serving(program, checkpoint, directory, "tiny-s", "tiny-l") as served, served.client() as client:
        served.says("tiny-s", "hm", "m</think>")
        served.says("tiny-l", "4", "!")
        (directory / "gated").touch()
        body = {"model": "tiny?think=s&answer=l", "messages": CHAT, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            pieces = answer.iter_text()
            first = next(pieces)
            (directory / "gated").unlink()
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


def test_a_thought_is_cut_at_its_limit_and_an_answer_at_the_requests(
    program: Program, checkpoint: Path, directory: Path
) -> None:
    with serving(program, checkpoint, directory, "tiny-s", "tiny-l") as served:
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
    model: str, fields: dict[str, Any], said: str, program: Program, checkpoint: Path, directory: Path
) -> None:
    with serving(program, checkpoint, directory, "tiny-s") as served:
        refused = served.ask(model, **fields)
        assert refused.status_code in (400, 404)
        assert said in refused.json()["error"]["message"]
        assert served.ask(model, "/v1/completions", prompt="x").status_code in (400, 404)


# What ends the command


def test_without_an_engine_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for asked in (None, "vllm", "transformers"):
        with pytest.raises(ValueError, match="pip install vllm"):
            find_program(asked)
    with pytest.raises(ValueError, match="is not vllm or transformers"):
        find_program(str(tmp_path / "vllm"))


def test_vllm_is_taken_before_transformers_and_told_to_keep_its_state_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    for name in ("vllm", "transformers"):
        (tmp_path / name).touch(mode=0o755)
    program = find_program(None, ["--dtype", "float32"])
    command = program.command(Path("/s"), "tiny-s", 1, CACHE)
    assert command[:3] == [str(tmp_path / "vllm"), "serve", "/s"]
    assert command[-2:] == ["--dtype", "float32"]
    assert command[command.index("--mamba_ssm_cache_dtype") + 1] == "float32"
    other = find_program("transformers").command(Path("/s"), "tiny-s", 1, CACHE)
    assert other == [str(tmp_path / "transformers"), "serve", "/s", "--host", "127.0.0.1", "--port", "1"]


def test_a_taken_port_and_an_open_address_without_a_key_end_the_command(program: Program) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is taken"):
            serve_models(["tiny-s"], program, host="127.0.0.1", port=port, memory=None, cache=CACHE)
    with pytest.raises(ValueError, match="set ELASTIC_SERVE_KEY in the environment"):
        serve_models(["tiny-s"], program, host="0.0.0.0", port=port, memory=None, cache=CACHE)


def test_an_engine_ends_its_children_when_the_command_is_killed(program: Program, directory: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from flows.serving.engines import Engine, find_program
engine = Engine(find_program(sys.argv[1]), Path("."), "tiny-s", cache=1, log=Path(sys.argv[2]) / "log")
engine.start()
time.sleep(600)
"""
    command = subprocess.Popen([sys.executable, "-c", code, str(program.path), str(directory)])
    processes = directory / "processes"
    _, engine, child = eventually(lambda: processes.exists() and processes.read_text().split())
    command.kill()
    command.wait()
    eventually(lambda: not runs(int(engine)) and not runs(int(child)))
