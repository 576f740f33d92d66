"""What the endpoint and its engines say to each other and to clients, in OpenAI's words."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

import httpx
from starlette.types import Receive

R = TypeVar("R")

DONE = b"data: [DONE]\n\n"


class Refused(Exception):
    """A request that is answered with an error. `body` is what an engine said to it, where it was an engine's."""

    def __init__(self, status: int, message: str, code: str | None = None, *, body: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = problem(message, code) if body is None else body


class Gone(Exception):
    """The client has hung up."""


def problem(message: str, code: str | None = None) -> dict[str, Any]:
    """An error, as OpenAI's clients read it."""
    return {"error": {"message": message, "type": "invalid_request_error" if code else "server_error", "code": code}}


def event(data: Any) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


async def events(answer: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a streamed completion; Refused for one that is an error."""
    async for line in answer.aiter_lines():
        if not line.startswith("data:") or (data := line.removeprefix("data:").strip()) == "[DONE]":
            continue
        said = json.loads(data)
        if "error" in said:
            raise Refused(502, "the engine failed while it answered", body=said)
        yield said


async def refusal(answer: httpx.Response) -> Refused:
    """What an engine answered instead of a completion."""
    text = (await answer.aread()).decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        body = problem(text[:500])
    return Refused(answer.status_code, "the engine refused", body=body)


async def unless_gone(receive: Receive, work: Awaitable[R]) -> R:
    """What the work gives; where the client hangs up meanwhile, it is cancelled, and Gone raised."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
            raise Gone
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
