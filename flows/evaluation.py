"""Measure a registered model on data of one's choice."""

from functools import partial
from pathlib import Path
from typing import Annotated

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from elastic_core.recipe import DataConfig, Evaluation
from flows.commands.recipes import checked
from flows.serving.failures import explain_failure
from flows.serving.guard import guard_run
from flows.serving.naming import called
from flows.serving.page import model_link
from tasks import tracking
from tasks.corpus.sources import problems_digest, source_identity
from tasks.data import prepare_data
from tasks.evaluate import Measurement, log_measurement, measure
from tasks.reporting.numbers import fixed, percent
from tasks.reporting.summary import markdown_table
from tasks.running.patience import patiently
from tasks.running.steps import run
from tasks.running.usage import noting
from tasks.settings import Settings
from tasks.slice import fetch_part


@flow(name="evaluate", flow_run_name=called(lambda given: f"{given['model']} measured"), on_failure=[explain_failure])
def evaluation(
    model: str,
    data: Annotated[DataConfig, checked(DataConfig)],
    settings: Annotated[Evaluation, checked(Evaluation)],
) -> Measurement:
    """Measure a registered model: its loss on the held-out part of the data, and the problems that it solves.

    The data are split as in training: the data of the recipe that made a model give back what was held out from it.

    Args:
        model: NAME, NAME@ALIAS or NAME:VERSION; NAME alone is its champion.
        data: The documents, and the share of them that is held out.
        settings: How much is measured, and on which problems.
    """
    guard_run()
    machine = Settings.from_environment()
    workspace = str(machine.home / "workspace")
    version = patiently(f"looking for {model}", partial(tracking.resolve, machine.registry, model))
    name = f"{version.name}:{version.version}"
    with noting(machine.home):
        directory = run(
            fetch_part,
            manifest=version.tags[tracking.MANIFEST],
            part=version.tags[tracking.BUDGET],
            workspace=workspace,
        )
        identity = tuple(patiently(source.path, partial(source_identity, source)) for source in data.sources)
        corpus = run(
            prepare_data, config=data.unweighted(), identity=identity, tokenizer=directory, workspace=workspace
        )
        digest = problems_digest(settings.problems)
        measured = run(measure, model=directory, corpus=corpus, settings=settings, problems_digest=digest)
    patiently("keeping the measurement", partial(log_measurement, machine, version, corpus, measured))
    rows = [
        {
            "model": name,
            "loss": fixed(measured.cross_entropy, 4),
            "accuracy": percent(measured.accuracy, 1),
            "answers cut off": percent(measured.cut_answers, 1),
        }
    ]
    create_markdown_artifact(
        key=f"evaluation-{Path(version.name).name.lower().replace('_', '-').replace('.', '-')}",
        description=f"{name} on {', '.join(source.path for source in data.sources)}",
        markdown=f"{markdown_table(rows)}\n\n{model_link(machine, name)}",
    )
    return measured
