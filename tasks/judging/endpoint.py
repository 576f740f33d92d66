"""Completions from any server that speaks OpenAI's chat protocol: vLLM, SGLang, `transformers serve`, llama.cpp."""

import os
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import requests

from elastic_core.judging import PATH, Endpoint, Sampling
from tasks.corpus.chats import CLOSE, OPEN
from tasks.judging.samples import Completion, Request, SampleFile, Wanted, fill
from tasks.running.bars import Report
from tasks.running.patience import patiently
from tasks.settings import ServiceError, redact

R = TypeVar("R")

API_KEY = "OPENAI_API_KEY"
CONNECT_SECONDS = 10.0
FINISHES = ("stop", "length")
# Its answer begins with a thought, which shows whether the server has a reasoning parser.
PUZZLE, PUZZLE_TOKENS = "How many prime numbers lie between 100 and 200? Check each number by itself.", 512


class NotServed(ValueError):
    """A server does not have the model that is to answer."""


class Served:
    """The engine that is a server: it answers as the model of a size, whose files are at a path and have a digest.

    `identity` tells the model, and all else that an answer depends on, as far as it can be told. `special` is
    `Client`'s.
    """

    def __init__(
        self, endpoint: Endpoint, size: str, path: str, digest: str, identity: str, special: Collection[str] = ()
    ) -> None:
        self.identity, self._special = identity, special
        self._endpoint = replace(endpoint, model=endpoint.model_of(size, path, digest))
        self._path = path
        self._listed = PATH not in endpoint.model  # a server that loads what it is asked for does not list it

    def fill(self, samples: SampleFile, wanted: Sequence[Wanted], report: Report) -> None:
        """Have the server make the samples that are missing. NotServed where it does not have the model."""
        client = Client(self._endpoint, special=self._special)
        if self._listed:
            client.check(self._path)
        fill(samples, wanted, client.complete, self._endpoint.concurrency, report)


class Client:
    """Asks an endpoint, from any number of threads; faults that pass are waited out.

    A server that this process has started gets neither key nor proxy, and `look` is called after each fault: it raises
    where that server has ended, so that nobody waits for it. `special` are the special tokens of a model to which the
    marks of a thought are special too (`beside_thoughts`): the server is asked for all of them, and they are removed.
    """

    def __init__(
        self, endpoint: Endpoint, look: Callable[[], None] | None = None, special: Collection[str] = ()
    ) -> None:
        self._endpoint, self._look, self._special = endpoint, look, special
        self._url = endpoint.url.rstrip("/")
        self._shown = redact(self._url)
        self._threads = threading.local()
        self._has_parser: bool | None = None  # None until an answer has shown it
        self._finds_out = threading.Lock()

    def models(self) -> list[str]:
        """The names of the models that the server says it has."""
        listed = self._answered("GET", "models", None)
        return [str(each.get("id")) for each in listed.get("data", []) if isinstance(each, dict)]

    def check(self, path: str) -> None:
        """NotServed, which says where the model's files are, where the server does not have it."""
        names = self._patiently(self.models)
        if self._endpoint.model not in names:
            shown = ", ".join(names) or "none"
            raise NotServed(
                f"{self._shown} has no model {self._endpoint.model!r}, but {shown}; serve {path} by that name, or "
                "correct model"
            )

    def complete(self, request: Request) -> Completion:
        """What the model writes, its thought included, in whatever field the server gives that.

        A model that was to think may answer with no thought at all. A server with a reasoning parser gives that as it
        gives, without a parser, a thought that never ends; with a parser it gets an empty thought here, so that it
        counts as an answer.
        """
        completion, apart = self._ask(request.prompt, request.sampling, request.seed)
        bare = not apart and OPEN not in completion.text and CLOSE not in completion.text
        doubtful = bare and completion.text and completion.finish == "stop" and request.sampling.thinking
        if doubtful and self._takes_thoughts_apart(request.sampling):
            return replace(completion, text=f"{OPEN}{CLOSE}{completion.text}")
        return completion

    def _takes_thoughts_apart(self, sampling: Sampling) -> bool:
        with self._finds_out:
            if self._has_parser is None:
                few = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, PUZZLE_TOKENS))
                _, self._has_parser = self._ask(PUZZLE, few, seed=0)
            return self._has_parser

    def _ask(self, prompt: str, sampling: Sampling, seed: int) -> tuple[Completion, bool]:
        """A completion, and whether the server gave its thought in a field of its own."""
        system = [{"role": "system", "content": sampling.system}] if sampling.system is not None else []
        body = {
            "model": self._endpoint.model,
            "messages": [*system, {"role": "user", "content": prompt}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "seed": seed,
        }
        if self._special:
            body["skip_special_tokens"] = False
        completion, apart = self._patiently(
            lambda: _completion(self._answered("POST", "chat/completions", body), self._shown)
        )
        text = completion.text
        for token in self._special:
            text = text.replace(token, "")
        return replace(completion, text=text), apart

    def _patiently(self, attempt: Callable[[], R]) -> R:
        def attempted() -> R:
            try:
                return attempt()
            except Exception:
                if self._look is not None:
                    self._look()
                raise

        return patiently(f"asking {self._shown}", attempted)

    def _answered(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        seconds = self._endpoint.seconds
        try:
            response = self._session().request(
                method, f"{self._url}/{path}", json=body, timeout=(CONNECT_SECONDS, seconds), allow_redirects=False
            )
        except requests.ReadTimeout as error:
            raise ServiceError(f"no answer within {seconds:g} s", transient=True) from error
        except requests.ConnectionError as error:
            raise ServiceError("it cannot be reached, or broke off; check that it is up", transient=True) from error
        if 400 <= response.status_code < 500 and response.status_code not in (408, 425, 429):
            said = redact(" ".join(response.text.split())[:500])
            raise ValueError(f"{self._shown}/{path} refused with {response.status_code}: {said}")
        response.raise_for_status()
        try:
            answer = response.json()
        except requests.JSONDecodeError as error:
            raise ServiceError(f"{self._shown}/{path} gave an answer that is not JSON; correct url") from error
        if response.status_code != 200 or not isinstance(answer, dict):
            fault = f"answered {response.status_code}, not 200 with an object"
            raise ServiceError(f"{self._shown}/{path} {fault}; correct url")
        return answer

    def _session(self) -> requests.Session:
        """A session of this thread's own: they are not safe to share."""
        if not hasattr(self._threads, "session"):
            self._threads.session = requests.Session()
            self._threads.session.trust_env = self._look is None
            if self._look is None and (key := os.environ.get(API_KEY)):
                self._threads.session.headers["Authorization"] = f"Bearer {key}"
        session: requests.Session = self._threads.session
        return session


def _completion(answer: dict[str, Any], server: str) -> tuple[Completion, bool]:
    """A completion, and whether its thought was in a field of its own."""
    try:
        choice = answer["choices"][0]
        message, finish, tokens = choice["message"], choice["finish_reason"], int(answer["usage"]["completion_tokens"])
        thought = message.get("reasoning_content") or message.get("reasoning")  # a parser of the server's took it apart
        text = message.get("content") or ""
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServiceError(f"{server} gave an answer that is no chat completion: {error!r}") from error
    if finish not in FINISHES:  # an engine that ends, or was told to, says `abort`
        fault = f"{server} ended a completion with {finish!r}, neither stop nor length"
        raise ServiceError(fault, transient=finish == "abort")
    if thought:
        text = f"{OPEN}{thought}{CLOSE}{text}" if text else f"{OPEN}{thought}"
    return Completion(text=text, tokens=tokens, finish=finish), bool(thought)
