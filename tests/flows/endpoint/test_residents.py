"""The endpoint of `elastic serve`: what passes through it, and the sizes that come and go behind it."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import standin
from endpoint import CACHE, CHAT, ONE, TWO, Stage, events, eventually, runs
from prometheus_client.parser import text_string_to_metric_families

from flows.commands.serve import serve_models
from flows.endpoint.residents import Residents
from tasks.settings import ServiceError


def test_the_sizes_are_its_models(serve: Stage) -> None:
    with serve("tiny-s") as served:
        listed = served.get("/v1/models").json()["data"]
        assert [each["id"] for each in listed] == ["tiny-l", "tiny-m", "tiny-s"]
        assert served.get("/v1/models/tiny-m").json() == listed[1]
        for refused in (served.get("/v1/models/tiny-x"), served.ask("tiny-x")):
            assert refused.status_code == 404
            assert "tiny-l, tiny-m, tiny-s" in refused.json()["error"]["message"]
        for body in (b"", b"[]", b'{"messages": []}'):
            assert httpx.post(f"{served.url}/v1/chat/completions", content=body).status_code == 400


def test_a_request_and_its_answer_pass_as_they_are(serve: Stage) -> None:
    with serve("tiny-s") as served:
        answer = served.ask("tiny-s", temperature=0.5, anything={"else": [1, None]})
        assert answer.json() == standin.completion("tiny-s", "said by s in pieces")
        (asked,) = served.asked("tiny-s")
        sent = {"model": "tiny-s", "messages": CHAT, "temperature": 0.5, "anything": {"else": [1, None]}}
        assert asked == {"path": "/v1/chat/completions", **sent}
        served.ask("tiny-s", "/v1/completions", prompt="x")
        assert served.asked("tiny-s")[1]["path"] == "/v1/completions"
        (serve.directory / "tiny-s.json").write_text('{"refuses": "too long"}')
        refused = served.ask("tiny-s")
        assert (refused.status_code, refused.json()) == (400, {"error": {"message": "too long"}})


def test_a_stream_passes_piece_by_piece(serve: Stage) -> None:
    with serve("tiny-s") as served, served.client() as client:
        (serve.directory / "gated").touch()
        with client.stream("POST", "/v1/chat/completions", json={"model": "tiny-s", "stream": True}) as answer:
            pieces = answer.iter_text()
            assert "said by s" in next(pieces)  # and the engine waits before it says more
            (serve.directory / "gated").unlink()
            assert "".join(pieces).endswith("data: [DONE]\n\n")


def test_with_a_key_only_health_is_told_to_everyone(serve: Stage) -> None:
    with serve("tiny-s", key="secret") as served:
        assert served.ask("tiny-s").status_code == 200
        for path in ("/v1/models", "/v1/models/tiny-s", "/metrics", "/docs"):
            for headers in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "secret"}):
                assert httpx.get(f"{served.url}{path}", headers=headers).status_code == 401
        assert httpx.post(f"{served.url}/v1/chat/completions", json={"model": "tiny-s"}).status_code == 401
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert len(served.asked("tiny-s")) == 1


def test_a_size_starts_when_asked_for_and_the_longest_unused_goes(serve: Stage) -> None:
    with serve("tiny-s", "tiny-m", "tiny-l") as served:
        assert served.states() == {"tiny-l": "stopped", "tiny-m": "running", "tiny-s": "running"}
        assert served.ask("tiny-s").status_code == 200
        assert served.ask("tiny-l").json()["by"] == "tiny-l"
        assert served.states() == {"tiny-l": "running", "tiny-m": "stopped", "tiny-s": "running"}
        eventually(lambda: not any(map(runs, served.processes("tiny-m")[0])))


def test_a_size_that_answers_is_not_stopped_before_it_has(serve: Stage) -> None:
    with serve("tiny-s", memory=ONE) as served, served.client() as client:
        (serve.directory / "gated").touch()
        with client.stream("POST", "/v1/chat/completions", json={"model": "tiny-s", "stream": True}) as answer:
            pieces = answer.iter_text()
            next(pieces)
            other: list[httpx.Response] = []
            asking = threading.Thread(target=lambda: other.append(served.ask("tiny-l")))
            asking.start()
            eventually(lambda: served.states()["tiny-l"] == "starting")
            assert not served.processes("tiny-l")
            (serve.directory / "gated").unlink()
            assert "".join(pieces).endswith("data: [DONE]\n\n")
        asking.join()
        assert other[0].json()["by"] == "tiny-l"


def test_many_who_ask_for_sizes_that_do_not_fit_together_all_get_answers(serve: Stage) -> None:
    with serve(memory=ONE) as served:
        answers: list[str] = []
        names = ["tiny-s", "tiny-m", "tiny-l"] * 3
        asking = [threading.Thread(target=lambda n=n: answers.append(served.ask(n).json()["by"])) for n in names]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        assert sorted(answers) == sorted(names)


def test_a_size_too_large_for_the_memory_is_refused_in_a_line(serve: Stage) -> None:
    with pytest.raises(ServiceError, match=r"tiny-s takes 1 KiB with 24 B of cache, and there are 1000 B of memory"):
        asyncio.run(started(serve.residents(memory=1000)))


def test_an_engine_that_cannot_start_says_why_and_the_others_go_on(serve: Stage) -> None:
    (serve.directory / "tiny-s.fails").touch()
    with pytest.raises(ServiceError, match="tiny-s did not start: RuntimeError: there is no device; log: /"):
        asyncio.run(started(serve.residents(memory=TWO)))
    with serve("tiny-l") as served:
        refused = served.ask("tiny-s")
        assert (refused.status_code, served.ask("tiny-l").status_code) == (503, 200)
        assert "no device" in refused.json()["error"]["message"]
        (serve.directory / "tiny-s.fails").unlink()
        assert served.ask("tiny-s").status_code == 200


async def started(residents: Residents) -> None:
    async with residents:
        await residents.start(["tiny-s"])


def test_a_killed_engine_comes_back_without_its_old_children(serve: Stage) -> None:
    with serve("tiny-s") as served, served.client() as client:
        (engine, child), *_ = served.processes("tiny-s")
        (serve.directory / "gated").touch()
        with client.stream("POST", "/v1/chat/completions", json={"model": "tiny-s", "stream": True}) as answer:
            pieces = answer.iter_text()
            next(pieces)
            os.kill(engine, 9)
            (error,) = events("".join(pieces))
            assert "ask again" in error["error"]["message"]  # and no end that looks like one
        (serve.directory / "gated").unlink()
        assert served.ask("tiny-s").json()["by"] == "tiny-s"
        eventually(lambda: not runs(child))
        assert len(served.processes("tiny-s")) == 2


def test_an_engine_that_keeps_ending_keeps_nobody_waiting_and_is_still_started_again(serve: Stage) -> None:
    with serve("tiny-s") as served:
        (serve.directory / "tiny-s.fails").touch()
        os.kill(served.processes("tiny-s")[0][0], 9)
        refused = served.ask("tiny-s")
        assert refused.status_code == 503
        assert "tiny-s keeps ending: RuntimeError: there is no device" in refused.json()["error"]["message"]
        (serve.directory / "tiny-s.fails").unlink()
        eventually(lambda: served.ask("tiny-s").status_code == 200)


def test_a_client_that_hangs_up_lets_go_of_its_size(serve: Stage) -> None:
    with serve("tiny-s", memory=ONE) as served:
        (serve.directory / "gated").touch()
        with served.client(timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json={"model": "tiny-s"})
        eventually(lambda: served.ask("tiny-l", stream=False) if unlink(serve.directory / "gated") else None)
        assert served.states()["tiny-l"] == "running"


def unlink(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True


def test_metrics_are_those_of_all_engines_with_the_size_as_a_label(serve: Stage) -> None:
    with serve("tiny-s", "tiny-m") as served:
        families = {each.name: each for each in text_string_to_metric_families(served.get("/metrics").text)}
        assert {sample.labels["size"]: sample.value for sample in families["asked"].samples} == {
            "tiny-s": 3.0,
            "tiny-m": 3.0,
        }
        running = {sample.labels["size"]: sample.value for sample in families["elastic_size_running"].samples}
        assert running == {"tiny-l": 0.0, "tiny-m": 1.0, "tiny-s": 1.0}


# What ends the command


def test_a_taken_port_and_an_open_address_without_a_key_end_the_command(serve: Stage) -> None:
    program = serve.program()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is taken"):
            serve_models(["tiny-s"], program, host="127.0.0.1", port=port, memory=None, cache=CACHE)
    with pytest.raises(ValueError, match="set ELASTIC_SERVE_KEY in the environment"):
        serve_models(["tiny-s"], program, host="0.0.0.0", port=port, memory=None, cache=CACHE)


def test_an_engine_ends_its_children_when_the_command_is_killed(serve: Stage) -> None:
    code = """
import os, sys, time
from pathlib import Path
from tasks.running.engines import Engine, find_program
engine = Engine(find_program(sys.argv[1]), Path("."), "tiny-s", log=Path(sys.argv[2]) / "log")
engine.start()
time.sleep(600)
"""
    command = subprocess.Popen([sys.executable, "-c", code, str(serve.program().path), str(serve.directory)])
    processes = serve.directory / "processes"
    _, engine, child = eventually(lambda: processes.exists() and processes.read_text().split())
    command.kill()
    command.wait()
    eventually(lambda: not runs(int(engine)) and not runs(int(child)))
