"""The engines that serve a model over HTTP, each a process on a loopback port: `vllm serve`, `transformers serve`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tasks.running.loopback import answers, free_ports
from tasks.running.processes import ChildProcess

Kind = Literal["vllm", "transformers"]
INSTALLED_BY: Mapping[Kind, str] = {"vllm": "vllm", "transformers": "'transformers[serving]'"}
KINDS: tuple[Kind, ...] = tuple(INSTALLED_BY)
SERVING = ("openai", "accelerate")  # of transformers' extra, without which our own cannot serve
SERVE_KEY = "ELASTIC_SERVE_KEY"  # of the endpoint; engines listen on loopback alone, and have none
START_SECONDS = 1800.0  # a large checkpoint is read from a slow disk, and graphs are captured

# The state of the scan, else in the weights' type: NVIDIA serves these models so for the scores it publishes.
EXACT_STATE = ("--mamba_ssm_cache_dtype", "float32")
# Files are local, and nobody is told what is served.
WITHHELD = (SERVE_KEY, "VLLM_API_KEY")
ENVIRONMENT = {"DO_NOT_TRACK": "true", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}

# The Python that a script of pip's runs with: on its first line, or on the next where the path is too long for that.
_PYTHON = re.compile(r"""^(?:#!\s*(?:/usr/bin/env\s+)?|'''exec'\s+)"?([^"\n]*?python[\d.]*)"?(?:\s|$)""", re.MULTILINE)
# An exception, or what a command line ends with, after what vLLM puts before each line of a process of its own.
_FAULT = re.compile(r"(?:^\s*|\]\s+)((?:(?:[\w.]+(?:Error|Exception)|[\w :]*\berror):|Value error,) \S.*)$")
SECOND_HAND = "See root cause above"  # what vLLM's server says of the process that failed
LAST_LINES = 200  # an error further up may have passed
# What provides the package of a program has another name where it is a build for CPUs.
_VERSION = (
    "from importlib.metadata import packages_distributions, version; import sys; "
    "print(*sorted({version(name) for name in packages_distributions().get(sys.argv[1], ())}))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An engine's program: which kind it is, where it is, and options of its own for every model."""

    kind: Kind
    path: Path
    options: tuple[str, ...] = ()

    def command(self, directory: Path, name: str, port: int, more: Sequence[str] = ()) -> list[str]:
        """What serves the checkpoint of a directory by a name, with `more` options for this one."""
        where = ["--host", "127.0.0.1", "--port", str(port)]
        if self.kind == "vllm":
            where += ["--served-model-name", name, *EXACT_STATE]
            if not _has_gpu():
                where.append("--no-enable-prefix-caching")  # 0.32 fails with it on a CPU, on prompts past a chunk
        return [str(self.path), "serve", str(directory), *where, *more, *self.options]

    def cache_options(self, size: int) -> tuple[str, ...]:
        """What gives a model's requests so many bytes of cache; nothing where the engine does not bound it."""
        return ("--kv-cache-memory-bytes", str(size)) if self.kind == "vllm" else ()

    def model(self, directory: Path, name: str) -> str:
        """What a request to the engine calls the model."""
        return name if self.kind == "vllm" else str(directory)

    @property
    def takes_tokens(self) -> bool:
        """Whether a prompt may be tokens, and the special ones among those that are written may be seen."""
        return self.kind == "vllm"

    @property
    def answers_together(self) -> bool:
        """Whether requests are answered at once, or one after another."""
        return self.kind == "vllm" or "--continuous-batching" in self.options

    @property
    def name(self) -> str:
        """The kind and its version; ValueError where that cannot be told."""
        return f"{self.kind} {_version(self.kind, self.path)}"

    @property
    def told(self) -> str:
        """The name, and the options that an answer may depend on."""
        own = EXACT_STATE if self.kind == "vllm" else ()
        return " ".join([self.name, *own, *self.options])


def find_program(asked: str | None, options: Sequence[str] = ()) -> Program:
    """The engine asked for, `vllm`, `transformers` or a path of either's program; else vLLM where it is installed.

    ValueError where there is none.
    """
    if asked is not None and asked not in KINDS:
        path = Path(asked).expanduser().absolute()
        if path.name not in KINDS or not os.access(path, os.X_OK) or path.is_dir():
            raise ValueError(f"--engine {asked!r} is not {' or '.join(KINDS)}, nor the path of such a program")
        return Program(kind=KINDS[KINDS.index(path.name)], path=path, options=tuple(options))
    for kind in KINDS:
        if asked in (None, kind) and (found := _installed(kind)) is not None:
            return Program(kind=kind, path=found, options=tuple(options))
    wanted = [kind for kind in KINDS if asked in (None, kind)]
    raise ValueError(
        f"no engine: no {' or '.join(wanted)} that can serve is installed; pip install "
        f"{' or '.join(INSTALLED_BY[kind] for kind in wanted)}, or put such a program on PATH"
    )


def _installed(kind: Kind) -> Path | None:
    """The program beside this Python, if that can serve, or on PATH."""
    beside = Path(sys.executable).with_name(kind)
    if beside.exists() and (kind == "vllm" or all(map(importlib.util.find_spec, SERVING))):
        return beside
    elsewhere = os.pathsep.join(
        folder for folder in os.environ.get("PATH", "").split(os.pathsep) if Path(folder) != beside.parent
    )
    found = shutil.which(kind, path=elsewhere)
    return Path(found).absolute() if found else None


@cache
def _version(kind: Kind, path: Path) -> str:
    """The version of a program, by the packages of its Python: to ask the program itself takes it half a minute."""
    with path.open("rb") as file:
        found = _PYTHON.search(file.read(1000).decode(errors="replace"))
    said = ""
    if found is not None and (python := shutil.which(found[1])) is not None:
        asked = [python, "-c", _VERSION, kind]
        said = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if not said:
        raise ValueError(f"the version of {path} cannot be told; name the program that pip installed with {kind}")
    return said


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class Engine:
    """A program that serves one checkpoint, on another port at every start, with options and variables of its own."""

    def __init__(
        self,
        program: Program,
        directory: Path,
        name: str,
        *,
        log: Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.process = ChildProcess(log, with_children=True)  # vLLM computes in another process than it answers in
        self.program, self.directory = program, directory
        self.model = program.model(directory, name)
        self._name, self._options = name, tuple(options)
        self._environment = {**ENVIRONMENT, **(environment or {})}
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return at once; the engine answers once it has loaded the weights."""
        (self._port,) = free_ports(1)
        command = self.program.command(self.directory, self._name, self._port, self._options)
        environment = {name: value for name, value in os.environ.items() if name not in WITHHELD} | self._environment
        self.process.start(command, environment=environment, directory=self.process.log.parent)

    def answers(self) -> bool:
        """Whether it has loaded the weights."""
        return answers(f"{self.url}/health")

    def last_words(self) -> str:
        """The last error of its log; where there is none, the last line."""
        lines = reversed(self.process.said()[-LAST_LINES:])
        faults = (found[1] for line in lines if (found := _FAULT.search(line)) and SECOND_HAND not in line)
        return next(faults, self.process.last_words())[:300]

    def stop(self) -> None:
        self.process.stop()
