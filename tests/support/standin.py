"""A stand-in for `vllm serve` or `transformers serve`, with a child as vLLM has: it says what a test wrote down.

All files are in the directory STANDIN: `NAME.json` has what model NAME says, `asked-NAME.jsonl` what it was asked,
`processes` has every process that was started, `devices` the CUDA devices that each was to see, and its options. While
there is a file `gated`, a stream waits after each of its pieces, and another answer until it is gone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DIRECTORY = Path(os.environ.get("STANDIN", "."))
OPTIONS = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=False))
NAME = OPTIONS.get("--served-model-name") or Path(sys.argv[2] if len(sys.argv) > 2 else "").name


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models" and "--served-model-name" in OPTIONS:
            self.reply({"data": [{"id": NAME, "max_model_len": 100}]})
        else:
            self.reply("# HELP asked_total Requests.\n# TYPE asked_total counter\nasked_total 3.0\n")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = DIRECTORY / f"asked-{NAME}.jsonl"
        with asked.open("a") as file:
            file.write(json.dumps({"path": self.path, **body}) + "\n")
        said = json.loads((DIRECTORY / f"{NAME}.json").read_text())
        if len(asked.read_text().splitlines()) == said.get("dies_at"):
            die()
        if "refuses" in said:
            self.reply({"error": {"message": said["refuses"]}}, 400)
        elif body.get("stream"):
            self.stream(said["pieces"], body.get("max_tokens"))
        else:
            gate()
            self.reply(completion(NAME, "".join(said["pieces"])))

    def stream(self, pieces: list[str], most: int | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        told = pieces[:most]
        for piece in told:
            self.event({"choices": [{"text": piece, "finish_reason": None}]})
            gate()
        self.event({"choices": [{"text": "", "finish_reason": "stop" if told == pieces else "length"}]})
        self.event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(told)}})
        self.chunk("data: [DONE]\n\n")
        self.chunk("")

    def event(self, said: dict[str, Any]) -> None:
        self.chunk(f"data: {json.dumps(said)}\n\n")

    def chunk(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def reply(self, content: dict[str, Any] | str, status: int = 200) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def write_program(directory: Path, kind: str) -> Path:
    """The program of such an engine, which is this file."""
    path = directory / kind
    path.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    path.chmod(0o755)
    return path


def gate() -> None:
    while (DIRECTORY / "gated").exists():
        time.sleep(0.01)


def completion(name: str, text: str) -> dict[str, Any]:
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return {"by": name, "text": text, "choices": [choice], "usage": {"completion_tokens": 3}}


def die() -> None:
    """End as a process that ran out of memory does, with an error that is not its log's last line."""
    sys.stderr.write("(EngineCore pid=7) ERROR 01-01 [core.py:9] MemoryError: the cache is full\n")
    sys.stderr.write("RuntimeError: Engine core failed. See root cause above.\nleaked shared memory\n")
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with (DIRECTORY / "processes").open("a") as file:
        file.write(f"{NAME} {os.getpid()} {child.pid}\n")
    with (DIRECTORY / "devices").open("a") as file:
        file.write(" ".join([os.environ.get("CUDA_VISIBLE_DEVICES", ""), *sys.argv[3:]]) + "\n")
    if (DIRECTORY / f"{NAME}.fails").exists():
        sys.exit("RuntimeError: there is no device")

    def end(*_: object) -> None:
        child.kill()
        os._exit(0)

    signal.signal(signal.SIGTERM, end)
    ThreadingHTTPServer(("127.0.0.1", int(OPTIONS["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
