"""What every step of the pipeline shares: its cache key, its retries, and its place in the workspace.

A step's key is made of its inputs' content and of the code that computes it, so that running again after a change
starts at the first step that the change reaches.
"""

import hashlib
import inspect
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.results import ResultStore, get_result_store

from elastic_core.files.locks import held
from tasks.records import Artifact, Release, StageRecord
from tasks.running.gpu import DEPLOYMENT_VARIABLE, device_to_oneself, run_on_workers
from tasks.running.patience import DELAYS, JITTER, RETRIES, say_waiting
from tasks.settings import ServiceError, home_directory, is_transient

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# They say where results and reports go, not what they are: no part of a key.
UNKEYED = {"workspace", "run_id"}

# Each step's key as a function of its inputs by name, and the steps that need a GPU.
KEYS: dict[str, Callable[[Mapping[str, Any]], str]] = {}
ON_GPU: dict[str, Task[Any, Any]] = {}


def step(*code: ModuleType, on_gpu: bool = False, cached: bool = True) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function a step: persisted, cached by content, retried after transient faults.

    `code` names the modules whose source is part of the key, beside the function's own. A step `on_gpu` has the
    machine's devices to itself, here or on the workers that the environment names. One that is not `cached` depends on
    what the registry holds, and is done each time.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        own = inspect.getmodule(function)
        modules = (*code, own) if own else code

        def key(parameters: Mapping[str, Any]) -> str:
            inputs = {name: value for name, value in parameters.items() if name not in UNKEYED}
            return fingerprint(function.__name__, code_digest(*modules), inputs)

        made = Task(
            function,
            persist_result=cached,
            result_serializer="json",
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _, parameters: key(parameters)) if cached else NO_CACHE,
            retries=RETRIES,
            retry_delay_seconds=list(DELAYS),
            retry_jitter_factor=JITTER,
            retry_condition_fn=_is_worth_retrying,
        )
        KEYS[made.name] = key
        if on_gpu:
            ON_GPU[made.name] = made
        return made

    return decorate


def run(step: Task[P, R], *inputs: P.args, **named: P.kwargs) -> R:
    """Run a step, or take its result from the cache; what a cached result names and is gone is made again.

    Where the step fails, its exception carries a note that names it.
    """
    began = time.monotonic()
    try:
        with _turn(step, named) as done_elsewhere:
            state = step(*inputs, **named, return_state=True)
            if state.name == "Cached" and _is_gone(state.result()):
                state = step.with_options(refresh_cache=True)(*inputs, **named, return_state=True)
            record = state.result()
    except Exception as error:
        error.add_note(f"step: {step.name}")
        raise
    cached = state.name == "Cached" and not done_elsewhere
    logger.info("%-16s %s", step.name, "cached" if cached else f"{time.monotonic() - began:.1f} s")
    return record


@contextmanager
def _turn(step: Task[Any, Any], inputs: Mapping[str, Any]) -> Iterator[bool]:
    """Wait until the step may run here; whether it was done by a worker meanwhile, and only has to be looked up.

    A cached step is made by one run at a time: who finds another making it waits, and then takes its result.
    """
    deployment = os.environ.get(DEPLOYMENT_VARIABLE)
    if not step.persist_result:
        yield False
    elif step.name in ON_GPU and deployment:
        done = not _is_known(step, inputs)
        if done:
            run_on_workers(deployment, step.name, inputs, KEYS[step.name](inputs))
            if not _is_known(step, inputs):
                raise ServiceError(
                    f"{step.name} was done by {deployment}, but its result is not seen here; give its workers the same "
                    "ELASTIC_HOME and PREFECT_LOCAL_STORAGE_PATH, on a file system that both see"
                )
        yield done
    else:
        home = home_directory()
        lock = home / "locks" / f"{step.name}-{KEYS[step.name](inputs)[:16]}"
        with ExitStack() as stack:
            stack.enter_context(held(lock, waits=f"waiting for {step.name}, which another run is making"))
            if step.name in ON_GPU and not _is_known(step, inputs):
                stack.enter_context(device_to_oneself(home))
            yield False


def _is_known(step: Task[Any, Any], inputs: Mapping[str, Any]) -> bool:
    """Whether the cache has the step's result, with its files."""
    store, key = get_result_store().update_for_task(step), KEYS[step.name](inputs)
    assert isinstance(store, ResultStore), "a coroutine only inside another"
    return bool(store.exists(key)) and not _is_gone(store.read(key).result)


def _is_gone(record: Any) -> bool:
    return isinstance(record, Artifact | StageRecord | Release) and not record.exists()


def _is_worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """Prefect asks this where attempts are left; its own line about the next one is not shown by `elastic run`."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, BaseException) or not is_transient(error):
        return False
    say_waiting(task.name, error, run.run_count)
    return True


def fingerprint(*values: Any) -> str:
    """SHA-256 over values by content: an Artifact counts by its digest, a dataclass by its fields."""
    text = json.dumps([_content(value) for value in values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(value: Any) -> Any:
    if isinstance(value, Artifact):
        return value.digest
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _content(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _content(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_content(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def code_digest(*modules: ModuleType) -> str:
    """SHA-256 over the source of modules."""
    return hashlib.sha256("".join(inspect.getsource(module) for module in modules).encode()).hexdigest()


def new_directory(workspace: str, name: str) -> Path:
    """A path in the workspace that nothing has yet; the step writes it whole or not at all."""
    root = Path(workspace)
    root.mkdir(parents=True, exist_ok=True)
    return root / f"{name}-{secrets.token_hex(4)}"


def artifact(directory: Path) -> Artifact:
    """A finished directory as an artifact, with the digest over its files' names and bytes."""
    total = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.relative_to(directory)}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return Artifact(path=str(directory), digest=total.hexdigest())
