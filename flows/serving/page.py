"""What a run leaves on its page in Prefect: links while it goes on; the table, the plots and the names at its end."""

import base64
import logging
from pathlib import Path

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact

from tasks import tracking
from tasks.promote import Verdict
from tasks.records import EvaluationRecord, OrderComparison, Release
from tasks.reporting.benchmarks import PASS_AT_1, benchmark_table
from tasks.reporting.summary import (
    ORDERS,
    evaluation_warnings,
    markdown_table,
    order_table,
    order_warnings,
    summary_table,
)
from tasks.settings import ServiceError, Settings

logger = logging.getLogger(__name__)


def link_curves(settings: Settings, run_id: str) -> None:
    """A link to the run in MLflow, where the curves grow."""
    if url := run_link(settings, run_id):
        create_link_artifact(key="mlflow-run", link=url, link_text="Curves in MLflow", description="Run in MLflow")


def show_outcome(
    settings: Settings, evaluation: EvaluationRecord, orders: OrderComparison, release: Release, verdict: Verdict
) -> None:
    """The budget table with the registered names, and the report's plots."""
    key = f"family-{release.family.lower().replace('_', '-')}"
    models = "\n".join(f"- {model_link(settings, model)}" for model in release.models.values())
    curves = run_link(settings, release.run_id)
    create_markdown_artifact(
        key=key,
        description=f"{release.family} {release.version}",
        markdown="\n\n".join(
            [
                markdown_table(summary_table(evaluation)),
                *(f"Warning: {warning}." for warning in evaluation_warnings(evaluation)),
                *([PASS_AT_1, markdown_table(benchmark_table(evaluation))] if evaluation.scores else []),
                f"Registered from `{release.uri}`:",
                models,
                verdict.reason,
                f"[Run in MLflow]({curves})" if curves else f"MLflow run `{release.run_id}`",
                *([ORDERS, markdown_table(order_table(orders))] if orders.cuts else []),
                *(f"Warning: {warning}." for warning in order_warnings(orders)),
            ]
        ),
    )
    for plot in sorted(Path(release.report).parent.glob("*.png")):
        # In the artifact itself: the bucket is private, and a signed address would end.
        image = f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}"
        create_image_artifact(image_url=image, key=f"{key}-{plot.stem}", description=f"{release.family}: {plot.stem}")


def headline(evaluation: EvaluationRecord, release: Release, verdict: Verdict) -> str:
    """What a run came to, in one line: the version, each budget's held-out loss, and whether it is the champion."""
    losses = ", ".join(f"{budget.budget} {budget.cross_entropy:.3f}" for budget in evaluation.budgets)
    became = f"is champion, {verdict.reason}" if verdict.promoted else verdict.reason
    teacher = f"teacher {evaluation.teacher_cross_entropy:.3f}"
    return f"{release.family} {release.number} {became}; held-out loss {losses} ({teacher})"


def run_link(settings: Settings, run_id: str) -> str | None:
    """The address of a run's page in MLflow; None where it has none or MLflow does not say, which ends no run."""
    try:
        return tracking.run_url(settings.tracking_uri, run_id)
    except ServiceError as error:
        logger.warning("the page has no link to run %s: %s", run_id, error)
        return None


def model_link(settings: Settings, model: str) -> str:
    """A registered version, NAME:VERSION, in Markdown: with the address of its page where it has one."""
    url = tracking.model_url(settings.registry, model)
    return f"[{model}]({url})" if url else f"`{model}`"
