"""The engines that serve a size over HTTP, each a process on a loopback port: `vllm serve`, or `transformers serve`."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flows.serving.servers import QUIET, free_ports
from tasks.running.processes import ChildProcess

Kind = Literal["vllm", "transformers"]
KINDS: tuple[Kind, ...] = ("vllm", "transformers")
SERVE_KEY = "ELASTIC_SERVE_KEY"  # of the endpoint; engines listen on loopback alone, and have none

# Files are local, and nobody is told what is served.
WITHHELD = (SERVE_KEY, "VLLM_API_KEY")
ENVIRONMENT = {**QUIET, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An engine's program: which kind it is, where it is, and options of its own for every size."""

    kind: Kind
    path: Path
    options: tuple[str, ...] = ()

    def command(self, directory: Path, name: str, port: int, cache: int) -> list[str]:
        """What serves the checkpoint of a directory by a name."""
        where = ["--host", "127.0.0.1", "--port", str(port)]
        if self.kind == "transformers":
            return [str(self.path), "serve", str(directory), *where, *self.options]
        own = ["--served-model-name", name, "--kv-cache-memory-bytes", str(cache)]
        # The state of the scan, else in the weights' type: NVIDIA serves these models so for the scores it publishes.
        own += ["--mamba_ssm_cache_dtype", "float32"]
        if not _has_gpu():
            own += ["--no-enable-prefix-caching"]  # 0.32 fails with it on a CPU, on prompts longer than a chunk
        return [str(self.path), "serve", str(directory), *where, *own, *self.options]

    def model(self, directory: Path, name: str) -> str:
        """What a request to the engine calls the model."""
        return name if self.kind == "vllm" else str(directory)

    @property
    def takes_tokens(self) -> bool:
        """Whether a prompt may be tokens, and the special ones among those that are written may be seen."""
        return self.kind == "vllm"


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
    raise ValueError(
        f"no engine: {asked or 'neither vllm nor transformers'} can serve here; pip install vllm, or "
        "'transformers[serving]', or give a program's path as --engine"
    )


def _installed(kind: Kind) -> Path | None:
    """The program beside this Python, or on PATH. Our own transformers can serve only with its extra."""
    beside = Path(sys.executable).with_name(kind)
    if beside.exists():
        return beside if kind == "vllm" or importlib.util.find_spec("openai") is not None else None
    found = shutil.which(kind)
    return Path(found).absolute() if found else None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class Engine:
    """A program that serves one checkpoint, on another port at every start."""

    def __init__(self, program: Program, directory: Path, name: str, *, cache: int, log: Path) -> None:
        self.process = ChildProcess(log, with_children=True)  # vLLM computes in another process than it answers in
        self.program, self.directory = program, directory
        self.model = program.model(directory, name)
        self._name, self._cache = name, cache
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return at once; the engine answers once it has loaded the weights."""
        (self._port,) = free_ports(1)
        command = self.program.command(self.directory, self._name, self._port, self._cache)
        environment = {name: value for name, value in os.environ.items() if name not in WITHHELD} | ENVIRONMENT
        self.process.start(command, environment=environment, directory=self.process.log.parent)

    def stop(self) -> None:
        self.process.stop()
