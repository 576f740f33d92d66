"""The README speaks of what is there: its commands, options, files and make targets exist."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from flows.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHOWN = re.compile(r"^elastic (\w+)(.*?)(?:  |$)", flags=re.MULTILINE)
COMMANDS = SHOWN.findall(README)
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "infra").glob("*.md"))}
ON_PAGES = [(page, *shown) for page, text in PAGES.items() for shown in SHOWN.findall(text)]


def test_the_readme_shows_every_command():
    assert {name for name, _ in COMMANDS} == set(get_command(app).commands)


@pytest.mark.parametrize(("name", "arguments"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_a_shown_command_has_the_options_shown(name, arguments):
    options = {option for parameter in get_command(app).commands[name].params for option in parameter.opts}
    assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", arguments)) <= options


@pytest.mark.parametrize(("page", "name", "arguments"), ON_PAGES, ids=[f"{page}-{name}" for page, name, _ in ON_PAGES])
def test_a_page_shows_commands_and_options_that_there_are(page, name, arguments):
    assert name in get_command(app).commands
    test_a_shown_command_has_the_options_shown(name, arguments)


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page]):
        assert (ROOT / "infra" / link).exists(), link


def test_every_file_named_in_the_file_map_is_there():
    block = README.split("elastic_core/\n", 1)[1].split("```")[0]
    core = re.findall(r"\b(\w+\.py)\b", block.split("tasks/ ")[0])
    assert set(core) == {path.name for path in (ROOT / "elastic_core").rglob("*.py")} - {"__init__.py"}
    for link in re.findall(r"\]\((infra/[^)]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_make_target_named_is_in_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)", README)) <= targets


def test_the_readme_is_short():
    assert len(README.splitlines()) < 150
