"""infra/Dockerfile: it lints, builds from what is there in versions that are pinned, and nothing runs as root."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "infra/Dockerfile"
PINNED = {
    re.sub(r"[-_.]+", "-", name).lower()
    for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
}
OF_TORCH = {"cuda-toolkit"}  # torch's own requirement, and so of the version that torch asks for
NEEDED = (
    "elastic_core",
    "tasks",
    "flows",
    "constraints.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of every instruction, on one line each."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of every stage, after those of the stage that it is made from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = list(found.get(base, []))
        found[stage].append((name, rest))
    return found


def packages(run: str) -> set[str]:
    """The names of packages that the pip commands of a RUN install or build."""
    named = set()
    for command in re.split(r"&&|\|\|", run):
        words = [word for word in shlex.split(command) if not word.startswith("--mount")]
        if words[:1] == ["pip"]:
            options = {i for i, word in enumerate(words) if word.startswith("-")}
            values = {i + 1 for i in options if words[i] in ("--constraint", "--wheel-dir", "--find-links")}
            rest = [word for i, word in enumerate(words) if i > 1 and i not in options | values]
            named |= {word.partition("[")[0] for word in rest if not word.startswith(".")}
    return named


def test_it_passes_hadolint():
    linted = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DOCKERFILE], capture_output=True, text=True, timeout=60
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_every_image_that_it_begins_from_is_of_one_version():
    names = set(stages())
    bases = {rest.partition(" AS ")[0] for name, rest in instructions() if name == "FROM"} - names
    assert bases
    assert all(re.fullmatch(r"\w+:\d+\.\d+\.\d+-[\w-]+", base) for base in bases)


def test_its_python_is_one_that_the_package_takes():
    (version,) = {match[1] for _, rest in instructions() if (match := re.match(r"python:(\d+\.\d+)\.", rest))}
    assert f'requires-python = ">={version}' in (ROOT / "pyproject.toml").read_text()
    assert set(re.findall(r"python(\d\.\d+)/", DOCKERFILE.read_text())) == {version}


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_an_image_does_not_run_as_root(target):
    user = [rest for name, rest in stages()[target] if name == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a number, which Kubernetes can check"


@pytest.mark.parametrize("target", ["cpu", "gpu", "kernels"])
def test_every_package_is_of_a_version_in_the_constraints(target):
    runs = [rest for name, rest in stages()[target] if name == "RUN" and "pip " in rest]
    assert runs
    for run in runs:
        assert run.count("pip install") + run.count("pip wheel") == run.count("--constraint constraints.txt")
        assert {name.lower() for name in packages(run)} - OF_TORCH <= PINNED


def test_what_is_copied_is_there_and_reaches_the_builder():
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all((ROOT / path).exists() for path in allowed)
    for sources in (rest.split()[:-1] for name, rest in instructions() if name == "COPY"):
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source in (".", *allowed), source


def test_the_builder_sees_what_the_image_needs_and_nothing_else():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(NEEDED)
