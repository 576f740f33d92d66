"""An HTTP proxy as companies have one: clients ask it for whole URLs, and it counts what it was asked for."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from answers import Answer, answering

OF_THE_CONNECTION = {"connection", "content-length", "proxy-connection", "transfer-encoding", "expect"}


@contextmanager
def http_proxy() -> Iterator[tuple[str, list[str]]]:
    """Its URL, and the URLs that it was asked for."""
    asked: list[str] = []

    def respond(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        asked.append(target)
        url = urlsplit(target)
        connection = http.client.HTTPConnection(url.netloc, timeout=60)
        kept = {name: value for name, value in headers.items() if name.lower() not in OF_THE_CONNECTION}
        try:
            connection.request(method, target.removeprefix(f"http://{url.netloc}"), body=body or None, headers=kept)
            answer = connection.getresponse()
            content = answer.read()
            passed = {name: value for name, value in answer.getheaders() if name.lower() not in OF_THE_CONNECTION}
            if method == "HEAD":
                passed["Content-Length"] = answer.headers.get("Content-Length", "0")
            return answer.status, content, passed
        finally:
            connection.close()

    with answering(respond) as url:
        yield url, asked
