"""What runs around a judged program: it lowers the limits, gives up root's rights, and runs the program.

The sandbox sends this file's text to a Python of its own, which may see nothing of the project: standard library only.
Arguments: the program's file, and as JSON `processes`, `memory_bytes`, `cpu_seconds`, `file_bytes`, `open_files`,
`user` and `function`. A limit or a user that is null stays as it is.

Without a function the program is run as a script. With one, each line of standard input is an argument in JSON; the
function of that name, or the method of the class Solution, is called, and its result is written as JSON.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
from typing import Any

# What LiveCodeBench lets a program use without importing it.
MODULES = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io json"
TYPING = "typing"
RECURSION = 50_000


def main() -> None:
    file, settings = sys.argv[1], json.loads(sys.argv[2])
    limit(settings)
    with open(file, encoding="utf-8") as opened:
        source = opened.read()
    sys.argv[:] = [file]
    sys.setrecursionlimit(RECURSION)
    scope = prelude()
    if settings["function"] is None:
        scope["__name__"] = "__main__"
        with contextlib.suppress(SystemExit):  # what it wrote counts, not its exit code
            exec(compile(source, file, "exec"), scope)
    else:
        call(settings["function"], source, file, scope)


def limit(settings: dict[str, Any]) -> None:
    """Set the limits, then become the user: root may have any number of processes, so it is given up."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: settings["memory_bytes"],
        resource.RLIMIT_CPU: settings["cpu_seconds"],
        resource.RLIMIT_FSIZE: settings["file_bytes"],
        resource.RLIMIT_NOFILE: settings["open_files"],
        resource.RLIMIT_NPROC: settings["processes"],
    }
    for which, value in limits.items():
        if value is not None:
            resource.setrlimit(which, (value, value))
    if settings["user"] is not None:
        os.setgroups([])
        os.setresgid(settings["user"], settings["user"], settings["user"])
        os.setresuid(settings["user"], settings["user"], settings["user"])


def prelude() -> dict[str, Any]:
    scope: dict[str, Any] = {}
    for name in [*MODULES.split(), TYPING]:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", [each for each in vars(module) if not each.startswith("_")])
        scope.update({each: getattr(module, each) for each in names})
    modules = ["sys", "os", "time", "queue", *MODULES.split()]
    scope.update({name: importlib.import_module(name) for name in modules if name not in ("datetime", "copy")})
    return scope


def call(function: str, source: str, file: str, scope: dict[str, Any]) -> None:
    arguments = [json.loads(line) for line in sys.stdin.read().splitlines() if line.strip()]
    result_to = os.dup(1)
    os.dup2(2, 1)  # what the program prints is no result
    scope["__name__"] = "solution"
    exec(compile(source, file, "exec"), scope)
    owner = scope["Solution"]() if "Solution" in scope else None
    result = (getattr(owner, function) if owner is not None else scope[function])(*arguments)
    with os.fdopen(result_to, "w") as out:
        json.dump(result, out)


if __name__ == "__main__":
    main()
