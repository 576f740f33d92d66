"""The endpoint: OpenAI's protocol at one address for all sizes, passed on to the engine of the one asked for."""

import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.endpoint.protocol import DONE, Gone, Refused, event, problem, refusal, unless_gone
from flows.endpoint.residents import Residents
from flows.endpoint.thinking import Composition, read_pair
from tasks.settings import ServiceError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
EVENTS = "text/event-stream"
OPEN_TO_ALL = ("/health",)

_log = logging.getLogger(__name__)


def endpoint(residents: Residents, key: str | None) -> Starlette:
    """The application. With a key every request but for /health has to bring it, as `Authorization: Bearer KEY`."""

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_listed(residents, name) for name in residents.sizes]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in residents.sizes:
            return _no_model(residents, name)
        return JSONResponse(_listed(residents, name))

    async def health(request: Request) -> Response:
        states = residents.states()
        well = "running" in states.values()
        return JSONResponse({"status": "ok" if well else "starting", "models": states}, 200 if well else 503)

    async def metrics(request: Request) -> Response:
        return Response(await measured(residents), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", metrics),
            *(Route(path, Completions(residents, path), methods=["POST"]) for path in (CHAT, COMPLETIONS)),
        ],
        middleware=[Middleware(Keyed, key=key)] if key else [],
    )


class Keyed:
    """Lets through who has the key."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_TO_ALL:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                refused = JSONResponse(problem("this needs the endpoint's key", "invalid_api_key"), 401)
                return await refused(scope, receive, send)
        return await self._app(scope, receive, send)


class Completions:
    """Answers one kind of completion, streamed or not, by one size or by a pair of them."""

    def __init__(self, residents: Residents, path: str) -> None:
        self._residents, self._path = residents, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _body(Request(scope, receive))
            async with AsyncExitStack() as held:
                answer = await unless_gone(receive, self._answer(body, held))
                await answer(scope, receive, send)
        except Refused as refused:
            await JSONResponse(refused.body, refused.status)(scope, receive, send)
        except ServiceError as error:
            _log.warning("%s", error)
            await JSONResponse(problem(str(error)), 503, {"Retry-After": "5"})(scope, receive, send)
        except httpx.TransportError as error:
            fault = f"the engine broke off ({type(error).__name__}); ask again"
            await JSONResponse(problem(fault), 502)(scope, receive, send)
        except (Gone, ClientDisconnect):
            return

    async def _answer(self, body: dict[str, Any], held: AsyncExitStack) -> Response:
        """The answer, of which the first piece is there; what it needs is held until it is sent."""
        name = body["model"]
        if name not in self._residents.sizes and "?" in name:
            return await self._composed(body, held)
        if name not in self._residents.sizes:
            return _no_model(self._residents, name)
        engine = await held.enter_async_context(self._residents.using(name))
        asked = self._residents.client.stream("POST", f"{engine.url}{self._path}", json=body | {"model": engine.model})
        answer = await held.enter_async_context(asked)
        if answer.status_code != 200:
            raise await refusal(answer)
        kind = answer.headers.get("content-type")
        if kind is None or not kind.startswith(EVENTS):
            return Response(await answer.aread(), media_type=kind)
        return StreamingResponse(_to_the_end(answer.aiter_raw()), media_type=EVENTS)

    async def _composed(self, body: dict[str, Any], held: AsyncExitStack) -> Response:
        if self._path != CHAT:
            raise Refused(400, "a size thinks for another only in chats", "unsupported")
        composition = Composition(self._residents, read_pair(body["model"], self._residents.sizes), body)
        pieces = await held.enter_async_context(aclosing(composition.deltas()))
        if not body.get("stream"):
            return JSONResponse(await _whole(composition, pieces, body["model"]))
        first: dict[str, str] = await anext(pieces, {})
        return StreamingResponse(_to_the_end(_chunks(composition, first, pieces, body)), media_type=EVENTS)


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except ValueError as error:
        raise Refused(400, f"the request is not JSON: {error}", "invalid_json") from error
    if not isinstance(body, dict) or not isinstance(body.get("model"), str):
        raise Refused(400, "the request names no model", "invalid_model")
    return body


async def _to_the_end(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The pieces of a stream; one that breaks off ends in an error, which a client would else take for its end."""
    try:
        async for piece in pieces:
            yield piece
    except (Refused, ServiceError, httpx.TransportError) as error:
        _log.warning("a stream broke off: %s", error or type(error).__name__)
        yield event(error.body if isinstance(error, Refused) else problem("the engine broke off; ask again"))


async def _whole(composition: Composition, pieces: AsyncIterator[dict[str, str]], model: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": ""}
    async for piece in pieces:
        for field, text in piece.items():
            message[field] = message.get(field, "") + text
    choice = {"index": 0, "message": message, "finish_reason": composition.finish}
    return _headed("chat.completion", model) | {"choices": [choice], "usage": _usage(composition)}


async def _chunks(
    composition: Composition, first: dict[str, str], pieces: AsyncIterator[dict[str, str]], body: dict[str, Any]
) -> AsyncIterator[bytes]:
    head = _headed("chat.completion.chunk", body["model"])

    def chunk(delta: dict[str, str], finish: str | None = None) -> bytes:
        return event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield chunk({"role": "assistant", **first})
    async for piece in pieces:
        yield chunk(piece)
    yield chunk({}, composition.finish)
    if (body.get("stream_options") or {}).get("include_usage"):
        yield event(head | {"choices": [], "usage": _usage(composition)})
    yield DONE


def _headed(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _usage(composition: Composition) -> dict[str, int]:
    read, written = composition.prompt_tokens, composition.tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _listed(residents: Residents, name: str) -> dict[str, Any]:
    size = residents.sizes[name]
    return {"id": name, "object": "model", "created": int(size.created), "owned_by": size.family}


def _no_model(residents: Residents, name: str) -> Response:
    known = ", ".join(residents.sizes)
    return JSONResponse(problem(f"there is no model {name!r} here, but {known}", "model_not_found"), 404)


async def measured(residents: Residents) -> bytes:
    """Which sizes run, and what their engines measure, with the size as a label, in Prometheus's text format."""
    running = GaugeMetricFamily("elastic_size_running", "Whether a size is in memory and answers.", labels=["size"])
    for name, state in residents.states().items():
        running.add_metric([name], float(state == "running"))
    families: dict[str, Metric] = {running.name: running}
    for name, engine in residents.running().items():
        try:
            answer = await residents.client.get(f"{engine.url}/metrics")
        except httpx.TransportError:  # it has just died
            continue
        for family in text_string_to_metric_families(answer.text) if answer.status_code == 200 else ():
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={**sample.labels, "size": name}) for sample in family.samples]
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


class _Collected:
    """Metrics as a collector gives them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics
