"""Laws of a run's page in Prefect."""

from pathlib import Path
from typing import Any

import pytest
from records import evaluated, measured

from flows.serving import page
from tasks import tracking
from tasks.promote import Verdict
from tasks.records import OrderComparison, Release
from tasks.settings import ServiceError, Settings


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is put on the page, while MLflow does not tell where its runs are."""
    found: list[Any] = []

    def away(uri: str, run_id: str) -> str:
        raise ServiceError(f"MLflow at {uri}: refused", transient=True)

    for kind in ("link", "markdown", "image"):
        monkeypatch.setattr(page, f"create_{kind}_artifact", lambda **given: found.append(given))
    monkeypatch.setattr(tracking, "run_url", away)
    return found


SETTINGS = Settings(tracking_uri="http://mlflow:5000", bucket="models")


def test_a_run_goes_on_without_the_link_that_mlflow_does_not_give(
    shown: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    page.link_curves(SETTINGS, "r")
    assert not shown
    assert caplog.messages == ["the page has no link to run r: MLflow at http://mlflow:5000: refused"]


def test_the_outcome_is_shown_without_the_link_that_mlflow_does_not_give(shown: list[Any], tmp_path: Path) -> None:
    release = Release(
        family="tiny",
        version="1",
        registration="1",
        uri="s3://b",
        models={"m": "tiny-m:3"},
        run_id="r",
        report=str(tmp_path / "report.html"),
    )
    orders = OrderComparison(heldout_tokens=400, cuts=())
    page.show_outcome(
        SETTINGS, evaluated(measured("m", 2.0)), orders, release, Verdict(promoted=True, reason="no budget is worse")
    )
    (artifact,) = shown
    assert "MLflow run `r`" in artifact["markdown"] and "no budget is worse" in artifact["markdown"]
