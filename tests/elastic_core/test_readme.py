"""elastic_core/README.md: every law that the code names is on it, what it names is there, its figures are measured."""

import re
from pathlib import Path

import pytest

from elastic_core.layers.kind import Kind, Mixer
from flows.commands.recipes import load_recipe

ROOT = Path(__file__).parents[2]
CORE = ROOT / "elastic_core"
PAGE = (CORE / "README.md").read_text()
# What stands under each of the page's headings of the second level, by its title.
PARTS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)*)", PAGE, flags=re.MULTILINE))
LAWS = dict(re.findall(r"^- \*\*(C\d+) .+?\*\*((?:.+\n)+?)(?=- |\n|\Z)", PARTS["The laws"], flags=re.MULTILINE))
LINKS = re.findall(r"(?:\]\(|src=\")([^)\"]+)", PAGE)
PICTURES = sorted((CORE / "pictures").iterdir())

MOST_BYTES = 60_000  # of a picture: every clone of the repository has it


def test_every_law_that_the_code_names_is_on_the_page():
    sources = [path for folder in ("elastic_core", "tasks", "flows", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = {law for path in sources for law in re.findall(r"\bC\d+\b", path.read_text())}
    assert {"C1", "C2", "C6"} <= named <= LAWS.keys()


def test_the_laws_are_numbered_from_one():
    assert list(LAWS) == [f"C{number}" for number in range(1, len(LAWS) + 1)]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_names_the_tests_that_hold_it(law):
    named = re.findall(r"\[`(\w+)`\]\((../tests/[^)]+)\)", LAWS[law])
    assert any(name.startswith("test_") for name, _ in named)
    for name, path in named:
        assert Path(path).stem == name
        assert "def test_" in (CORE / path).read_text() or "def bench_" in (CORE / path).read_text(), path


def test_the_links_lead_somewhere():
    headings = re.findall(r"^#+ (.+)$", PAGE, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for link in LINKS:
        if link.startswith("#"):
            assert link[1:] in anchors, link
        elif not link.startswith("https://arxiv.org/"):
            assert (CORE / link).exists(), link


def test_every_picture_is_small_and_shown():
    assert {path.relative_to(CORE).as_posix() for path in PICTURES} <= set(LINKS)
    for picture in PICTURES:
        assert picture.stat().st_size <= MOST_BYTES, picture.name


def test_the_figures_on_what_differs_are_measured():
    measured = "".join((ROOT / "infra" / page).read_text() for page in ("race.md", "benchmarks.md"))
    table = re.findall(r"^\|.*\|$", PARTS["The method"], flags=re.MULTILINE)
    figures = re.findall(r"\d\.\d{3,}", "\n".join(table))
    assert len(figures) >= 10
    for figure in figures:
        assert re.search(rf"(?<![\d.]){figure}(?!\d)", measured), figure


def test_the_changes_that_give_the_papers_choices_are_settings():
    changes = re.findall(r"`([\w.]+=\w+)`", PARTS["The method"])
    recipe, plain = load_recipe(Path("tiny"), changes), load_recipe(Path("tiny"))
    assert len(changes) >= 5
    assert recipe.importance != plain.importance and recipe.shapes != plain.shapes
    assert recipe.stages[0].shares != plain.stages[0].shares and recipe.stages[0].router != plain.stages[0].router


def test_all_that_a_kind_answers_is_on_the_page_and_nothing_else():
    part = PARTS["Adding a layer kind"]
    rows = re.findall(r"^\| (`.+?) \|", part, flags=re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    answers = {name for name in (*vars(Kind), *Kind.__annotations__) if not name.startswith("_")}
    assert listed == answers
    asked_of_mixers = {name for name in ("lay_out", "components", "residual")}
    assert all(f"`{name}`" in part for name in asked_of_mixers)
    assert asked_of_mixers <= {*vars(Mixer), *Mixer.__annotations__}


def test_the_readme_leads_here():
    assert "](elastic_core/README.md)" in (ROOT / "README.md").read_text()
