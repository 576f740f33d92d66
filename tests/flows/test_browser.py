"""The pages of Prefect and MLflow as a user's browser shows them: a form, a run, its artifacts, the registry."""

import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urljoin
from uuid import UUID

import pytest
from playwright.sync_api import Page, TimeoutError, expect, sync_playwright
from served import Elastified, Served, eventually

from elastic_core.files.checkpoint import Family, read_family

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",  # which needs more rights than a container has
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PAGE_SECONDS = 60.0
INPUT = "xpath=following::*[self::input or self::textarea][1]"  # that of a label
NAME, STEPS = "from-the-browser", "400"  # enough for a slow browser to see them pass

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH; Debian's package is `chromium`"),
]


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the screenshots go, for people to look at."""
    return tmp_path_factory.mktemp("screens")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            args=FLAGS,
            headless=True,
            viewport={"width": 1400, "height": 1000},
        )
        browser.set_default_timeout(1000 * PAGE_SECONDS)
        expect.set_options(timeout=1000 * PAGE_SECONDS)
        yield browser.pages[0]
        browser.close()


@pytest.fixture(scope="module")
def submitted(served: Served, elastified: Elastified, page: Page, screens: Path) -> str:
    """The address of a run started from the form, with another name and a longer second stage."""
    with served.prefect() as client:
        deployment = client.read_deployment_by_name("elastify/micro").id
    page.goto(f"{served.services()['Prefect'].where}/deployments/deployment/{deployment}")
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    expect(page.get_by_text("The recipe to carry out, by its name")).to_be_visible()
    expect(page.locator(".schema-form-property__label")).to_have_count(2)  # recipe and changes
    page.screenshot(path=screens / "form.png", full_page=True)
    page.get_by_text("Run Name").locator(INPUT).fill(NAME)
    for number, change in enumerate(("family=browsed", f"stages.1.steps={STEPS}")):
        page.get_by_role("button", name="Add item").click()
        page.locator(".schema-form-property-array-item textarea").nth(number).fill(change)
    page.screenshot(path=screens / "form-filled.png", full_page=True)
    page.get_by_role("button", name="Submit").click()
    run = page.get_by_role("link", name=NAME).first.get_attribute("href")
    assert run is not None
    return urljoin(page.url, run)


def test_the_form_of_a_whole_recipe_has_the_shares_of_budgets_in_boxes(served: Served, page: Page, screens: Path):
    with served.prefect() as client:
        deployment = client.read_deployment_by_name("elastify/micro-whole-recipe").id
    page.goto(f"{served.services()['Prefect'].where}/deployments/deployment/{deployment}/run")
    share = page.get_by_text("The share of m.").nth(1)  # in the second stage
    expect(share.locator(INPUT)).to_have_value("0.3")
    expect(page.get_by_text('type "None"')).to_have_count(0)
    share.scroll_into_view_if_needed()
    page.screenshot(path=screens / "shares.png")


def browsed(served: Served) -> Family:
    """The family that the submitted run made: the last."""
    families = (served.home / "workspace").glob("stage2-*/family")
    return read_family(max(families, key=lambda family: family.stat().st_mtime))


def open_artifacts(page: Page, run: str) -> None:
    page.goto(run)
    page.get_by_text("Artifacts", exact=True).first.click()


def open_artifact(page: Page, run: str, artifact: str) -> None:
    """Open an artifact from the page of its run."""
    open_artifacts(page, run)
    page.get_by_text(artifact, exact=True).click()
    page.wait_for_url("**/artifacts/artifact/*")


@pytest.mark.slow
def test_a_run_started_from_its_form_moves_and_completes(served: Served, page: Page, submitted: str, screens: Path):
    page.goto("about:blank")  # drawing the page of a run takes much of a CPU
    eventually(lambda: served.step("distil stage2"), "distillation does not begin")
    progress = page.get_by_text(re.compile(rf"stage2: {STEPS} steps: \d+ of {STEPS}"))
    seen: list[str] = []

    def moved() -> bool:
        open_artifacts(page, submitted)
        with suppress(TimeoutError):
            progress.wait_for(timeout=5000)
            if progress.inner_text() not in seen:
                seen.append(progress.inner_text())
                page.screenshot(path=screens / f"progress-{len(seen)}.png")
        return len(seen) > 1

    eventually(moved, "progress does not move")
    page.goto("about:blank")
    served.ended(UUID(submitted.rpartition("/")[2]))
    page.goto(submitted)
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible()
    page.screenshot(path=screens / "run.png")


@pytest.mark.slow
def test_a_runs_page_opens_its_table_and_its_image(served: Served, page: Page, submitted: str, screens: Path):
    open_artifact(page, submitted, "family-browsed")
    rows = page.get_by_role("table").first.get_by_role("row")
    expect(rows).to_have_count(5)  # the head, the teacher, and three budgets
    expect(rows.nth(4)).to_contain_text(f"{browsed(served).budget('s').params:,}")
    page.screenshot(path=screens / "table.png")
    open_artifact(page, submitted, "family-browsed-quality")
    image = page.locator("img[src^='data:image/png']")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.complete && image.naturalWidth") > 500
    page.screenshot(path=screens / "image.png")


@pytest.mark.slow
def test_the_table_leads_to_mlflows_versions_aliases_and_curves(page: Page, submitted: str, screens: Path):
    open_artifact(page, submitted, "family-browsed")
    link = page.get_by_role("link", name=re.compile("^browsed-s:"))
    version, number = link.get_attribute("href"), link.inner_text().partition(":")[2]
    run = page.get_by_role("link", name="Run in MLflow").get_attribute("href")
    page.goto(version)
    expect(page.get_by_role("heading", name=f"Version {number}")).to_be_visible()
    for alias in ("candidate", "champion"):
        expect(page.get_by_text(alias).first).to_be_visible()
    page.screenshot(path=screens / "version.png")
    page.get_by_role("link", name="Model registry").click()
    for budget in ("l", "m", "s"):
        expect(page.get_by_role("link", name=f"browsed-{budget}")).to_be_visible()
    page.screenshot(path=screens / "models.png")
    page.goto(run)
    page.get_by_text("Model metrics").click()
    expect(page.locator(".js-plotly-plot path.js-line").first).to_be_visible()
    page.screenshot(path=screens / "curves.png")


def test_a_run_of_the_schedule_above_its_ceiling_waits_for_a_person_on_its_page(
    served: Served, elastified: Elastified, page: Page, screens: Path
):
    with served.ticking(recipe=served.recipe("seed=1"), max_gpu_hours=0.0):
        (waiting,) = eventually(served.suspended, "no run is suspended", served.story)
    address = f"{served.services()['Prefect'].where}/runs/flow-run/{waiting.id}"
    page.goto(address)
    expect(page.get_by_text("Suspended", exact=True).first).to_be_visible()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    page.screenshot(path=screens / "waits.png")
    open_artifact(page, address, "waits-for-a-person")
    expect(page.get_by_text("Resume this run to let it train").first).to_be_visible()
    page.screenshot(path=screens / "asks.png")
    served.command("cancel", str(waiting.id))
    assert served.ended(waiting.id).state.is_cancelled()
