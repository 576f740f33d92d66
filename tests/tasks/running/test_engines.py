"""Laws of the engines' programs: which is taken, what it is told, which version it is, and what its log ends with."""

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tasks.running import engines
from tasks.running.engines import Engine, Program, find_program


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    engines._version.cache_clear()
    yield
    engines._version.cache_clear()


def test_without_an_engine_the_command_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    for asked, missing in (
        (
            None,
            r"no vllm or transformers that can serve is installed; pip install vllm or 'transformers\[serving\]'",
        ),
        ("vllm", r"no vllm that can serve is installed; pip install vllm, or put such a program on PATH"),
        ("transformers", r"no transformers that can serve is installed; pip install 'transformers\[serving\]', or"),
    ):
        with pytest.raises(ValueError, match=missing):
            find_program(asked)
    with pytest.raises(ValueError, match="is not vllm or transformers"):
        find_program(str(tmp_path / "vllm"))


def test_vllm_is_taken_before_transformers_and_told_to_keep_its_state_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    for name in ("vllm", "transformers"):
        (tmp_path / name).touch(mode=0o755)
    program = find_program(None, ["--dtype", "float32"])
    command = program.command(Path("/s"), "tiny-s", 1)
    assert command[:3] == [str(tmp_path / "vllm"), "serve", "/s"]
    assert command[-2:] == ["--dtype", "float32"]
    assert command[command.index("--mamba_ssm_cache_dtype") + 1] == "float32"
    other = find_program("transformers").command(Path("/s"), "tiny-s", 1)
    assert other == [str(tmp_path / "transformers"), "serve", "/s", "--host", "127.0.0.1", "--port", "1"]
    assert program.cache_options(7) == ("--kv-cache-memory-bytes", "7")
    assert find_program("transformers").cache_options(7) == ()


BEGINS = {
    "pip": "#!{python}",
    "options": "#!{python} -I",
    "env": "#!/usr/bin/env {python}",
    "a long path": "#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''",
}


@pytest.mark.parametrize("begins", BEGINS.values(), ids=BEGINS)
def test_a_program_has_the_version_of_its_pythons_package(begins: str, tmp_path: Path) -> None:
    path = tmp_path / "transformers"
    path.write_text(begins.format(python=sys.executable) + "\nraise SystemExit('it is not run')\n")
    program = Program(kind="transformers", path=path, options=("--dtype", "float32"))
    assert program.name == f"transformers {version('transformers')}"
    assert program.told == f"{program.name} --dtype float32"


def test_a_build_for_cpus_is_vllm_and_what_keeps_its_state_exact_is_told(vllm_package: Path, tmp_path: Path) -> None:
    path = tmp_path / "vllm"
    path.write_text(f"#!{sys.executable}\n")
    assert Program(kind="vllm", path=path).told == "vllm 0.99 --mamba_ssm_cache_dtype float32"


WITHOUT = {"another program": "#!/bin/sh\ndocker run vllm", "no script": "\x7fELF", "no package": f"#!{sys.executable}"}


@pytest.mark.parametrize("text", WITHOUT.values(), ids=WITHOUT)
def test_a_program_whose_version_cannot_be_told_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "vllm"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"the version of {path} cannot be told; name the program that pip installed"):
        _ = Program(kind="vllm", path=path).name


LOGS = {
    "an exception": (
        "(EngineCore pid=1) ERROR 11-29 19:06 [core.py:1] ValueError: no memory is left\nTraceback\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"
        "resource_tracker.py:254: UserWarning: leaked\n  warnings.warn('leaked')\n",
        "ValueError: no memory is left",
    ),
    "a command line": ("usage: vllm serve\nvllm: error: unknown: --frob\n\n", "vllm: error: unknown: --frob"),
    "a configuration": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, max_model_len (99999) is too large\n    For further information visit ...\n",
        "Value error, max_model_len (99999) is too large",
    ),
    "neither": ("loading\nKilled\n\n", "Killed"),
    "nothing": ("", "nothing"),
}


@pytest.mark.parametrize(("log", "words"), LOGS.values(), ids=LOGS)
def test_an_engine_says_its_last_error_rather_than_its_last_line(log: str, words: str, tmp_path: Path) -> None:
    engine = Engine(Program(kind="vllm", path=tmp_path / "vllm"), tmp_path, "s", log=tmp_path / "log")
    (tmp_path / "log").write_text(log)
    assert engine.last_words() == words
