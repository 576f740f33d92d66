"""What every step of the pipeline shares: its cache key, its retries, and its place in the workspace.

A step's key is made of its inputs' content, of the code and the libraries that compute its result and, on a GPU, of the
device, so that running again after a change starts at the first step that the change reaches. The directory that a step
works in carries the same key.
"""

import functools
import hashlib
import inspect
import json
import logging
import os
import secrets
import shutil
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import Task
from prefect.cache_policies import NO_CACHE, CacheKeyFnPolicy
from prefect.results import ResultStore, get_result_store

from elastic_core.files.locks import held
from elastic_core.schema import UNKEYED_FIELD, build, to_dict
from tasks.records import Artifact, Release, StageRecord
from tasks.running import code, usage
from tasks.running.asked import WORKERS_OF, Asked, device_of_run
from tasks.running.digests import can_be_made, damage, recorded, remedy, set_aside
from tasks.running.patience import DELAYS, JITTER, RETRIES, patiently, say_waiting
from tasks.running.places import device, device_to_oneself, elsewhere, give_back_memory, this_device
from tasks.running.workspace import at_hand, claimed, is_stored, store_result, stored_result, to_this_home
from tasks.settings import WORKSPACE, ServiceError, home_directory, is_transient

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# They say where a step runs and results and reports go, not what they are: no part of a key.
UNKEYED = {"workspace", "run_id", "least_nodes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Making:
    """What a result depends on: the step's inputs by content, what it runs (code.runs), and on a GPU the device."""

    step: str
    inputs: str
    runs: dict[str, str]
    device: str

    @property
    def key(self) -> str:
        return fingerprint(self)

    @property
    def note(self) -> Path:
        """Where it is noted how these inputs' result was made last."""
        return home_directory() / "made" / f"{self.step}-{self.inputs[:32]}.json"


# How each step's result is made, as a function of its inputs by name; and the steps that need a GPU.
MAKINGS: dict[str, Callable[[Mapping[str, Any]], Making]] = {}
ON_GPU: dict[str, Task[Any, Any]] = {}
# How each cached step makes its results, whatever its inputs: a digest of what it runs and where.
WAYS: dict[str, Callable[[], str]] = {}
# What each step's run is called, as a function of its inputs by name.
TITLES: dict[str, Callable[[Mapping[str, Any]], str]] = {}
FUNCTIONS: list[Callable[..., Any]] = []

# The key of the step that runs, and its inputs as they are here.
_own_key: ContextVar[str] = ContextVar("own_key")
_own_inputs: ContextVar[Mapping[str, Any]] = ContextVar("own_inputs")


def step(
    title: str | None = None, *, on_gpu: bool = False, cached: bool = True
) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function a step: persisted, cached by content, retried after transient faults.

    Its runs, and its lines, are called by the `title`, with inputs in it ("distil {stage.name}"), or else by the
    function's name as words. Its inputs are here and as they were recorded before it runs. A step `on_gpu` has the
    machine's devices to itself, here or on the workers that the environment names. One that is not `cached` depends on
    what the registry holds, and is done each time.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        name, signature = function.__name__, inspect.signature(function)

        def making(parameters: Mapping[str, Any]) -> Making:
            bound = signature.bind(**parameters)
            bound.apply_defaults()
            inputs = {name: value for name, value in bound.arguments.items() if name not in UNKEYED}
            where = device() if on_gpu else ""
            return Making(step=name, inputs=fingerprint(inputs), runs=code.runs(function), device=where)

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            with at_hand(signature.bind(*args, **kwargs).arguments) as inputs:
                code.check_unchanged(function)
                tokens = _own_key.set(making(inputs).key), _own_inputs.set(inputs)
                try:
                    return function(**inputs)  # type: ignore[call-arg]
                finally:
                    _own_key.reset(tokens[0])
                    _own_inputs.reset(tokens[1])
                    if on_gpu:
                        give_back_memory()

        made = Task(
            checked,
            persist_result=cached,
            result_serializer="json",
            cache_policy=CacheKeyFnPolicy(cache_key_fn=lambda _, given: making(given).key) if cached else NO_CACHE,
            retries=RETRIES,
            retry_delay_seconds=list(DELAYS),
            retry_jitter_factor=JITTER,
            retry_condition_fn=_is_worth_retrying,
        )
        MAKINGS[made.name] = making
        if cached:
            WAYS[made.name] = lambda: fingerprint(code.runs(function), device() if on_gpu else "")[:16]
        TITLES[made.name] = (title or name.replace("_", " ")).format_map
        FUNCTIONS.append(function)
        if on_gpu:
            ON_GPU[made.name] = made
        return made

    return decorate


def run(step: Task[P, R], *inputs: P.args, **named: P.kwargs) -> R:
    """Run a step, or take its result from the cache; a cached result that is gone or damaged is made again.

    Where the step fails, its exception carries a note that names it.
    """
    began, title = time.monotonic(), TITLES[step.name](named)
    for function in FUNCTIONS:
        code.runs(function)  # of all steps at the first: their files may change while the run goes on
    try:
        known = _known(step, named, say=True)
        if known is None and step.persist_result:
            usage.note_begun(MAKINGS[step.name](named).key)
        with nullcontext(False) if known is not None else _turn(step, named) as done_elsewhere:
            if known is None:  # another may have made it meanwhile
                known = _known(step, named, mends=not done_elsewhere)
            task = step.with_options(refresh_cache=known is None, task_run_name=lambda: title)
            if own_key():  # inside a step, which is itself tried again, and finds here what was done
                task = task.with_options(retries=0)
            state = task(*inputs, **named, return_state=True)
            record = state.result()
            if step.persist_result and known is None:
                _note(MAKINGS[step.name](named), record)
            if step.persist_result:
                made = known is None and not done_elsewhere
                store_result(step.name, MAKINGS[step.name](named).key, record, made=made)
        if step.persist_result:
            usage.note(MAKINGS[step.name](named).key, record)
    except Exception as error:
        error.add_note(f"step: {step.name}")
        raise
    cached = state.name == "Cached" and not done_elsewhere
    logger.info("%-26s  %s", title, "cached" if cached else f"{time.monotonic() - began:.1f} s")
    return record


def do_asked(step: str, inputs: Mapping[str, Any], device: str, runs: Mapping[str, str]) -> None:
    """Do a step that a run in another process asks for, and leave the result in the cache that both share.

    What is given is as in `Asked`. ValueError where this process has another device, other code or other libraries.
    """
    if step not in ON_GPU:
        raise ValueError(f"step {step!r} is not one of {', '.join(ON_GPU)}; the worker and the run differ in version")
    task = ON_GPU[step]
    hints = typing.get_type_hints(task.fn)
    given = {name: build(hints[name], value, f"{step}.{name}") for name, value in inputs.items()}
    if "workspace" in given:  # of the host that asks
        given["workspace"] = str(home_directory() / "workspace")
    if not device.startswith(WORKERS_OF) and device != this_device():
        raise ValueError(f"{step}: the run asks for {device}, this worker has {this_device()}; start `elastic up` anew")
    token = device_of_run.set(device)
    try:
        if changed := code.differences(runs, MAKINGS[step](given).runs):
            raise ValueError(f"{step}: the worker is not as the run that asks: {changed}; install the same in both")
        with usage.noting(home_directory()):
            run(task, **given)
    finally:
        device_of_run.reset(token)


@contextmanager
def _turn(step: Task[Any, Any], inputs: Mapping[str, Any]) -> Iterator[bool]:
    """Have another host do the step where places.py names one, and give True; else wait until it may run here.

    A cached step is made by one run at a time: who finds another making it waits, and then takes its result.
    """
    making, title = MAKINGS[step.name](inputs), TITLES[step.name](inputs)
    if not step.persist_result:
        yield False
        return
    _say_why(title, making)
    place = elsewhere() if step.name in ON_GPU else None
    if place is not None:
        place.do(
            Asked(
                step=step.name,
                module=step.fn.__module__,
                title=title,
                inputs=to_dict(inputs),
                key=making.key,
                runs=making.runs,
                device=making.device,
            )
        )
        if _known(step, inputs) is None:
            raise ServiceError(
                f"{title} was done by {place.name}, but its result is not seen here; give its workers the same "
                f"{WORKSPACE}, or the same ELASTIC_HOME and PREFECT_LOCAL_STORAGE_PATH on a file system that both see"
            )
        yield True
    else:
        home = home_directory()
        lock = home / "locks" / f"{step.name}-{making.key[:16]}"
        with ExitStack() as stack:
            stack.enter_context(held(lock, waits=f"waiting for {title}, which another run is making"))
            stack.enter_context(claimed(step.name, making.key, lambda: _known(step, inputs) is not None))
            if step.name in ON_GPU and _known(step, inputs) is None:
                stack.enter_context(device_to_oneself(home))
            yield False


def _known(step: Task[Any, Any], inputs: Mapping[str, Any], *, say: bool = False, mends: bool = False) -> Any:
    """The step's result from the cache, when it and its files are as they were recorded; else None.

    With `say`, a line about what is damaged is logged. With `mends`, the damaged files are set aside; only who holds
    the step's lock may ask for that. A ServiceError where they cannot be made again: files of the user's own.
    """
    if not step.persist_result:
        return None
    making = MAKINGS[step.name](inputs)
    store: ResultStore = get_result_store().update_for_task(step, _sync=True)  # type: ignore[call-arg, assignment]
    record = _read(store, making, step) if (there := store.exists(making.key)) else None  # a torn one does not exist
    if record is not None and _is_whole(here := to_this_home(record), step, say, mends):
        if here != record:
            store.write(here, key=making.key)
            _note(making, here)
        return here
    stored = stored_result(step.name, making.key, typing.get_type_hints(step.fn).get("return"))
    if stored is not None and _is_whole(stored, step, say, mends):
        store.write(stored, key=making.key)
        _note(making, stored)
        return stored
    if record is None and say and (there or _noted(making)):
        how = "damaged" if there else "gone or torn"
        logger.warning("%s: its record in the cache, %s, is %s; it is made again", step.name, making.key, how)
    return None


def _is_whole(record: Any, step: Task[Any, Any], say: bool, mends: bool) -> bool:
    """Whether all that a step's result speaks of is there, as it was recorded."""
    if isinstance(record, Release):
        return patiently(f"looking for {record.family} {record.version} in the registry", record.exists)
    for made in recorded(record):
        if (spoiled := damage(made)) and not is_stored(made):
            if not can_be_made(made):
                raise ServiceError(f"{spoiled}; {remedy(made)}")
            if say:
                logger.warning("%s; %s makes it again", spoiled, step.name)
            if mends:
                set_aside(made)
            return False
    return True


def _read(store: ResultStore, making: Making, step: Task[Any, Any]) -> Any:
    """The record of a result in the cache; None where it is torn, or is not the one that was noted when it was made."""
    try:
        record = store.read(making.key).result
        noted = _noted(making).get("result")
        return record if _is_result(record, step) and noted in (None, fingerprint(record)) else None
    except (ValueError, TypeError, KeyError, AttributeError):  # what Prefect raises for a torn file
        return None


def _is_result(record: Any, step: Task[Any, Any]) -> bool:
    """Whether a step returns such records; one of a class that is no more is read as plain data."""
    hint = typing.get_type_hints(step.fn).get("return")
    return not isinstance(hint, type) or isinstance(record, hint)


def _note(making: Making, record: Any) -> None:
    """Note how a result was made, and what it is."""
    making.note.parent.mkdir(parents=True, exist_ok=True)
    part = making.note.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({**asdict(making), "result": fingerprint(record)}, indent=1))
    part.replace(making.note)


def _noted(making: Making) -> dict[str, Any]:
    """The note about a result that was made in this way; {} where there is none."""
    note = _last_note(making)
    return note if all(note.get(name) == value for name, value in asdict(making).items()) else {}


def _last_note(making: Making) -> dict[str, Any]:
    """The note about what was made last of these inputs, in whatever way; one that cannot be read is none."""
    try:
        note = json.loads(making.note.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) and note.keys() > asdict(making).keys() else {}


def _say_why(title: str, making: Making) -> None:
    """Tell what has changed since a result was made of the same inputs."""
    note = _last_note(making)
    if not note:
        return
    changed = [code.differences(note["runs"], making.runs)]
    if note["device"] != making.device:
        changed.append(f"it was made on {note['device']}, and this is {making.device}")
    if any(changed):
        logger.warning("%s is made again: %s", title, "; ".join(filter(None, changed)))


def _is_worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """Prefect asks this where attempts are left; its own line about the next one is not shown by `elastic run`."""
    error = state.result(raise_on_failure=False)
    if not isinstance(error, BaseException) or not is_transient(error):
        return False
    say_waiting(task.name, error, run.run_count)
    return True


def fingerprint(*values: Any) -> str:
    """SHA-256 over values by content: an Artifact counts by its digest, a dataclass by its fields.

    A setting on which no result depends, such as how often checkpoints are written, does not count: a stage that is
    half done goes on when it changes.
    """
    text = json.dumps([_content(value) for value in values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(value: Any) -> Any:
    if isinstance(value, Artifact):
        return value.digest
    if isinstance(value, StageRecord):
        return [value.family.digest, value.metrics_sha256]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _content(getattr(value, f.name)) for f in fields(value) if UNKEYED_FIELD not in f.metadata}
    if isinstance(value, Mapping):
        return {str(k): _content(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_content(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def own_key() -> str:
    """The key of the step that runs; "" outside of steps."""
    return _own_key.get("")


def own_inputs() -> Mapping[str, Any]:
    """The inputs of the step that runs, with every artifact at its place on this host."""
    return _own_inputs.get()


def work_directory(workspace: str, name: str) -> Path:
    """Where the running step works, in the workspace: the same place at each attempt, another once its key changes."""
    return Path(workspace) / f"{name}-{_own_key.get()[:16]}"


def end_work(directory: Path) -> None:
    """Remove the directory that a step worked in; killed on the way, it leaves nothing to go on from."""
    leaving = directory.with_name(f".{directory.name}-{secrets.token_hex(4)}.partial")
    directory.rename(leaving)
    shutil.rmtree(leaving)


def new_directory(workspace: str, name: str) -> Path:
    """A path in the workspace that nothing has yet; the step writes it whole or not at all."""
    root = Path(workspace)
    root.mkdir(parents=True, exist_ok=True)
    return root / f"{name}-{secrets.token_hex(4)}"
