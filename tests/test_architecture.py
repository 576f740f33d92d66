"""What holds for the tree as a whole: importing does nothing, optional packages are optional, words match files."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("elastic_core", "tasks", "flows")
    for path in (ROOT / package).rglob("*.py")
    if path.stem not in ("__init__", "prefect_server")  # uvicorn's: imports Prefect's server, which runs a command
)
LONGEST_FUNCTION, LONGEST_FILE = 60, 450  # lines; tests may be longer files
OF_A_KIND = re.compile(r"\bMAMBA\b|mamba_(?!ssm)|attention_heads")  # mamba_ssm is a package
ROOMS_OF_KINDS = re.compile(r"elastic_core/(layers/.*|geometry\.py|files/stock_config\.py)")
TABLE_OF_CONTENTS = ("flows/elastify.py", "pipeline")  # reads as the plan of a run, one call after the other
SOURCES = [path for folder in ("elastic_core", "tasks", "flows", "infra") for path in (ROOT / folder).rglob("*.py")]
CORE = [module for module in MODULES if module.startswith("elastic_core")]

IMPORT_WITHOUT = """
import importlib, importlib.abc, os, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Refuse())

before = dict(os.environ)
for module in {modules!r}:
    importlib.import_module(module)
assert dict(os.environ) == before, "an import changed the environment"
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_elastic_core_imports_with_torch_safetensors_and_scipy_alone():
    blocked = [
        "prefect",
        "mlflow",
        "boto3",
        "transformers",
        "datasets",
        "tokenizers",
        "mamba_ssm",
        "causal_conv1d",
        "triton",
    ]
    done = run(IMPORT_WITHOUT.format(blocked=blocked, modules=CORE))
    assert done.returncode == 0, done.stderr


def test_importing_any_module_starts_nothing():
    code = "import socket, subprocess, threading\n" + IMPORT_WITHOUT.format(
        blocked=["mamba_ssm", "ray"], modules=MODULES
    )
    code = code.replace(
        "before =",
        "def refuse(*a, **k): raise AssertionError('an import started something')\n"
        "subprocess.Popen.__init__ = refuse\nsocket.socket.bind = refuse\nsocket.socket.connect = refuse\nbefore =",
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_a_function_is_read_on_one_screen() -> None:
    long = [
        f"{path}:{node.lineno} {node.name} has {lines} lines, and may have {LONGEST_FUNCTION}: make it simpler"
        for folder in ("elastic_core", "tasks", "flows", "infra", "tests")
        for path in sorted(file.relative_to(ROOT) for file in (ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
        and (str(path), node.name) != TABLE_OF_CONTENTS
    ]
    assert not long, "\n".join(long)


def test_no_file_is_too_long_to_be_read_at_once() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    long = {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE}
    assert not long, f"a file may have {LONGEST_FILE} lines: {long}"


def test_what_is_known_of_a_layer_kind_stands_in_its_own_room() -> None:
    """Outside: the fields of subnets and masks, those of orders, and what a checkpoint and its recipe must agree on."""
    naming = {str(path.relative_to(ROOT)) for path in SOURCES if OF_A_KIND.search(path.read_text())}
    outside = {path for path in naming if not ROOMS_OF_KINDS.fullmatch(path)}
    assert outside == {"elastic_core/subnet.py", "elastic_core/files/reorder.py", "tasks/running/preflight.py"}


SMALL = ["diff", "garbage", "init", "ls", "plan", "profile", "promote", "pull", "rollback", "show", "slice"]


def brought_by_extras() -> list[str]:
    """What is imported of the packages that a plain `pip install elastic-family` leaves out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def named(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}

    left_out = {name for extra in ("pipeline", "eval") for name in named(project["optional-dependencies"][extra])}
    left_out -= {"jinja2", "mlflow"}  # torch brings the one, and a part of the other is installed
    found = packages_distributions().items()
    modules = [module for module, by in found if {name.lower().replace("_", "-") for name in by} & left_out]
    assert {"prefect", "transformers", "datasets"} <= set(modules)
    return [*modules, "huggingface_hub", "httpx", "pandas"]


@pytest.fixture(scope="module")
def small() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `elastic` where no extra is installed, in a directory without anything."""
    blocked = IMPORT_WITHOUT.format(blocked=brought_by_extras(), modules=[])

    def elastic(*arguments: str) -> subprocess.CompletedProcess[str]:
        code = f"{blocked}\nsys.argv = ['elastic', *{list(arguments)!r}]\nfrom flows.cli import main\nmain()"
        return run(code)

    return elastic


def test_the_registry_slices_and_plans_need_no_extra() -> None:
    modules = [f"flows.commands.{name}" for name in SMALL]
    done = run(IMPORT_WITHOUT.format(blocked=brought_by_extras(), modules=modules))
    assert done.returncode == 0, done.stderr


def test_a_plan_and_the_schema_are_made_without_an_extra_by_a_recipes_name(small: Any) -> None:
    planned = small("plan", "nano-12b", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["teacher_params"] == 12_310_001_152
    assert json.loads(small("schema").stdout)["title"] == "Recipe"


@pytest.mark.parametrize(
    "arguments", [("run", "tiny"), ("runs",), ("check", "tiny"), ("serve", "tiny-s")], ids=" ".join
)
def test_what_needs_an_extra_says_in_one_line_which(arguments: tuple[str, ...], small: Any) -> None:
    done = small(*arguments)
    assert done.returncode == 1
    assert re.fullmatch(
        r"elastic: this needs \w+, which is not installed: pip install 'elastic-family\[pipeline\]'\n", done.stderr
    ), done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["plan", "--help"], ["pull", "--help"]], ids=" ".join
)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
sys.argv = ["elastic", *{arguments!r}]
from flows.cli import app
try:
    app()
except SystemExit as leaving:
    assert not leaving.code
heavy = {{"torch", "prefect", "mlflow", "transformers", "datasets", "boto3"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_the_processes_of_a_run_do_not_load_what_only_some_steps_use() -> None:
    late = {"datasets", "transformers", "mlflow", "matplotlib", "scipy.optimize", "torch.distributed.tensor"}
    code = "import sys, flows.elastify, flows.serving.gpu_step, elastic_core.training.job\n"
    done = run(f"{code}loaded = {late} & sys.modules.keys()\nassert not loaded, loaded")
    assert done.returncode == 0, done.stderr
