"""What holds for the tree as a whole: importing does nothing, optional packages are optional, words match files."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("elastic_core", "tasks", "flows")
    for path in (ROOT / package).rglob("*.py")
    if path.stem not in ("__init__", "prefect_server")  # uvicorn's: imports Prefect's server, which runs a command
)
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
    code = "import socket, subprocess, threading\n" + IMPORT_WITHOUT.format(blocked=["mamba_ssm"], modules=MODULES)
    code = code.replace(
        "before =",
        "def refuse(*a, **k): raise AssertionError('an import started something')\n"
        "subprocess.Popen.__init__ = refuse\nsocket.socket.bind = refuse\nsocket.socket.connect = refuse\nbefore =",
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


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
