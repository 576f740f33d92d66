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

# LiveCodeBench begins each program with `from MODULE import *` for all of these, and `import MODULE` for all but the
# last two. Builtins come late because operator and math have a `pow` of two arguments, and io an `open` of its own.
MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "builtins typing"
)
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
    """The names that a program finds without importing them."""
    modules = {name: importlib.import_module(name) for name in MODULES.split()}
    scope: dict[str, Any] = {}
    for module in modules.values():
        names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
        scope.update({name: getattr(module, name) for name in names})
    return scope | {name: module for name, module in modules.items() if name not in ("builtins", "typing")}


def call(function: str, source: str, file: str, scope: dict[str, Any]) -> None:
    """Write the result of the program's function, or of its class Solution's method, to standard output."""
    arguments = [json.loads(line) for line in sys.stdin.read().splitlines() if line.strip()]
    result_to = os.dup(1)
    os.dup2(2, 1)  # what the program prints is no result
    scope["__name__"] = "solution"
    exec(compile(source, file, "exec"), scope)
    owner = scope["Solution"]() if "Solution" in scope else None
    result = (getattr(owner, function) if owner is not None else scope[function])(*arguments)
    with os.fdopen(result_to, "w") as out:
        json.dump(result, out, default=plain)


def plain(value: Any) -> Any:
    """A number or an array of numpy's as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no result in JSON")


if __name__ == "__main__":
    main()
