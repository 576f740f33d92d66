"""The code and the libraries that a step runs, found from the import statements; and the version of the project.

A step depends on the part of its own module that its function reaches, on every module of ours that this part imports,
and so on. Where and how a step runs is left out (PLUMBING): that code cannot change a result.
"""

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from elastic_core.schema import syntax_tree

PROJECT = "elastic-family"
DIGEST_LENGTH = 64  # of SHA-256 in hex
CODE = "code"  # the name of the project's version in a lineage
COMMIT = "ELASTIC_COMMIT"
PACKAGES = ("elastic_core", "tasks", "flows")
PLUMBING = (
    "tasks.running",
    "tasks.artifacts",
    "tasks.tracking",
    "tasks.settings",
    "tasks.records",
    "elastic_core.files.locks",
    "elastic_core.training.faults",
    "elastic_core.training.launch",
)
# Used on a GPU alone, where they are installed.
KERNELS = ("causal_conv1d", "mamba_ssm", "triton")

Function = Callable[..., Any]

# The modules whose files were read, and when each had been written.
_read_at: dict[str, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """SHA-256 of each module that a step runs, and the packages of others that these import."""

    modules: dict[str, str]
    packages: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parsed:
    """What the source of a module says: its digest, and the names of the modules that it imports."""

    digest: str
    imports: frozenset[str]


@cache
def code_of(function: Function) -> Code:
    """Everything that runs when a step's function runs, as it was when this process asked first."""
    return _reachable(function, _parsed)


def own_digest(function: Function) -> str:
    """SHA-256 of a function and of what it reaches in its own module."""
    return _reached(function).digest


def check_unchanged(function: Function) -> None:
    """ValueError where the files of a step's code are no longer those that its key was made of.

    A process goes on with the code that it has loaded, and starts trainers from the files.
    """
    if all(_written(name) == at for name, at in _read_at.items()):
        return
    if changed := differences(code_of(function).modules, _reachable(function, _parse).modules):
        raise ValueError(
            f"{function.__name__}: {changed} while this run was going; run again with the code as it is now"
        )


def _reachable(function: Function, parse: Callable[[str], "_Parsed"]) -> Code:
    own = _reached(function)
    modules, packages = {f"{function.__module__}.{function.__name__}": own.digest}, set[str]()
    waiting = set(own.imports)
    while waiting:
        name = waiting.pop()
        if name.partition(".")[0] not in PACKAGES:
            packages.add(name.partition(".")[0])
        elif name not in modules and not _is_plumbing(name):
            parsed = parse(name)
            modules[name] = parsed.digest
            waiting |= parsed.imports
    return Code(modules=dict(sorted(modules.items())), packages=frozenset(packages - sys.stdlib_module_names))


def _is_plumbing(name: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in PLUMBING)


@cache
def _parsed(name: str) -> _Parsed:
    return _parse(name)


def _parse(name: str) -> _Parsed:
    tree = syntax_tree(_source(name))
    return _Parsed(digest=_digest(tree.body), imports=frozenset(_imports(tree.body, name)))


def _reached(function: Function) -> _Parsed:
    """The statements of a function's module that it reaches by name, and what these import."""
    tree = syntax_tree(_source(function.__module__))
    binding: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        for name in _bound(statement):
            binding.setdefault(name, []).append(statement)
    if function.__name__ not in binding:  # a function inside another: all of its module
        return _parsed(function.__module__)
    waiting, names, reached = {function.__name__}, set[str](), set[ast.stmt]()
    while waiting:
        names.add(name := waiting.pop())
        for statement in binding.get(name, ()):
            if statement not in reached:
                reached.add(statement)
                if not isinstance(statement, ast.Import | ast.ImportFrom):
                    waiting |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - names
    body = [_only(statement, names) for statement in tree.body if statement in reached]
    return _Parsed(digest=_digest(body), imports=frozenset(_imports(body, function.__module__)))


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of a module gives a meaning."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            return  # what is inside is no name of the module
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def _only(statement: ast.stmt, names: set[str]) -> ast.stmt:
    """An import, without what none of `names` needs."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        kept = [alias for alias in statement.names if (alias.asname or alias.name.partition(".")[0]) in names]
        if isinstance(statement, ast.Import):
            return ast.Import(names=kept)
        return ast.ImportFrom(module=statement.module, names=kept, level=statement.level)
    return statement


def _imports(body: Iterable[ast.stmt], module: str) -> Iterator[str]:
    """The modules that statements import, wherever in them, and the packages that hold these."""
    for node in _running(body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name(f"{'.' * node.level}{node.module or ''}", _spec(module).parent or "")
            yield from _with_parents(base)
            if base.partition(".")[0] in PACKAGES:
                yield from (name for alias in node.names if _is_module(name := f"{base}.{alias.name}"))


def _running(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Every node but what is for type checkers alone."""
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[: end + 1]) for end in range(len(parts)))


def _digest(body: Iterable[ast.stmt]) -> str:
    """SHA-256 over what statements do: neither comments and docstrings nor the look of the source count."""
    bare = (_Bare().visit(statement) for statement in body)
    text = "\n".join(ast.unparse(statement) for statement in bare if statement is not None)
    return hashlib.sha256(text.encode()).hexdigest()


class _Bare(ast.NodeTransformer):
    """Removes texts that stand alone, as docstrings do."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else self.generic_visit(node)


def _spec(name: str) -> ModuleSpec:
    spec = sys.modules[name].__spec__ if name in sys.modules else importlib.util.find_spec(name)
    assert spec is not None, f"{name} is imported, and not there"
    return spec


@cache
def _is_module(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # what would hold it is a module itself
        return False


def _written(name: str) -> int:
    """When the file of a module was written last, in ns."""
    origin = _spec(name).origin
    return Path(origin).stat().st_mtime_ns if origin and Path(origin).exists() else 0


def _source(name: str) -> str:
    origin = _spec(name).origin
    _read_at.setdefault(name, _written(name))
    return Path(origin).read_text(encoding="utf-8") if origin else ""  # a folder without __init__.py


@cache
def libraries(packages: frozenset[str]) -> dict[str, str]:
    """The versions of these packages but the kernels, without a build's own mark such as `+cpu`."""
    return {name: versions for name in sorted(packages - {*KERNELS}) if (versions := _version(name))}


@cache
def runs(function: Function) -> dict[str, str]:
    """What a step runs, by name: digests of its modules and of the form of its result, versions of its libraries."""
    code, result = code_of(function), typing.get_type_hints(function).get("return")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return code.modules | dict(_forms(result)) | libraries(code.packages) | {"python": python}


def _forms(hint: Any) -> Iterator[tuple[str, str]]:
    """The digest of the fields of every record in a type, by the record's name."""
    if is_dataclass(hint) and isinstance(hint, type):
        form = [(field.name, str(field.type)) for field in fields(hint)]
        yield f"{hint.__module__}.{hint.__name__}", hashlib.sha256(repr(form).encode()).hexdigest()
        for field_hint in typing.get_type_hints(hint).values():
            yield from _forms(field_hint)
    for argument in typing.get_args(hint):
        yield from _forms(argument)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What a step ran before and runs now, where that is not the same, in one line; "" where it is."""
    versions, modules = [], []
    for name in sorted(before.keys() | now.keys()):
        then, here = before.get(name, "not used"), now.get(name, "not used")
        if then != here and DIGEST_LENGTH in (len(then), len(here)):
            modules.append(f"{name} changed")
        elif then != here:
            versions.append(f"{name} was {then} and is {here}")
    told = versions + modules
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return ", ".join(told[:3]) + more


@cache
def kernels() -> str:
    """The versions of the kernels for a GPU that are installed."""
    return ", ".join(f"{name} {version}" for name in KERNELS if (version := _version(name)))


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(metadata.packages_distributions())


def _version(package: str) -> str:
    """The version of what provides a package; "" where it is not installed."""
    named = {metadata.version(distribution).partition("+")[0] for distribution in _distributions().get(package, ())}
    return " ".join(sorted(named))


@cache
def project_version() -> str:
    """The project's version and commit, `0.1.0+g1a2b3c4d5e6f`; `.dirty` where files differ from the commit's.

    Without a checkout the commit is that of the repository that pip installed from, or the image's; else there is none.
    """
    commit = _checked_out() or _installed_from() or os.environ.get(COMMIT, "")[:12]
    return f"{metadata.version(PROJECT)}{f'+g{commit}' if commit else ''}"


def _checked_out() -> str:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # another project's repository may be further up
        return ""
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", *PACKAGES)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit}.dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout.strip()


def _installed_from() -> str:
    told = metadata.distribution(PROJECT).read_text("direct_url.json")
    commit = json.loads(told).get("vcs_info", {}).get("commit_id", "") if told else ""
    return str(commit)[:12]
