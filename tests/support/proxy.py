"""A network that is at fault: an HTTP proxy in front of one server, which spoils a share of all requests."""

import http.client
import itertools
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("delay", "refuse", "500", "503", "lose the answer", "truncate")
DELAY_SECONDS = 1.0
OURS = {"connection", "content-length", "expect", "keep-alive", "transfer-encoding"}  # headers of the connection


@dataclass
class FaultProxy:
    """Its address, and how many requests it passed on and spoilt, by kind; `share` may change at any time."""

    upstream: str
    share: float
    url: str = ""
    seen: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._chance, self._kinds = random.Random(0), itertools.cycle(FAULTS)

    def next_fault(self) -> str:
        """The kinds take turns, so that each comes up; when one comes up is left to (seeded) chance."""
        with self._lock:
            fault = next(self._kinds) if self._chance.random() < self.share else "none"
            self.seen[fault] += 1
            return fault


@contextmanager
def fault_proxy(upstream: str, share: float) -> Iterator[FaultProxy]:
    """Pass requests on as they are, the Host header too, since S3's signatures hold it."""
    proxy = FaultProxy(upstream, share)

    class Handler(_Handler):
        network = proxy

    with _Server(("127.0.0.1", 0), Handler) as server:
        proxy.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, name="fault-proxy")
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, which ours do when they are killed."""


class _Handler(BaseHTTPRequestHandler):
    network: FaultProxy
    protocol_version = "HTTP/1.1"
    timeout = 60

    def _pass_on(self) -> None:
        body = self._body()
        fault = self.network.next_fault()
        if fault == "delay":
            time.sleep(DELAY_SECONDS)
        elif fault == "refuse":
            return self._reset()
        elif fault in ("500", "503"):
            return self._answer(int(fault), [], b"")
        status, headers, content = self._ask(body)
        if fault == "lose the answer":
            return self._reset()
        self._answer(status, headers, content, cut=fault == "truncate")

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _pass_on

    def _body(self) -> bytes:
        assert "Transfer-Encoding" not in self.headers, "none of our clients sends chunks"
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.network.upstream).netloc, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in OURS:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        except (OSError, http.client.HTTPException):
            return 502, [], b""
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, cut: bool = False) -> None:
        length = dict(headers).get("Content-Length") if self.command == "HEAD" else None
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in OURS:
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = self.close_connection or cut

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass
