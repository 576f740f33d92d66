"""Check at the start what a run will need hours later."""

from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from elastic_core.config import Evaluation, ModelConfig, Recipe
from elastic_core.cost import subnet_params
from elastic_core.subnet import full_subnet
from tasks.artifacts import check_bucket
from tasks.data import check_length, read_record
from tasks.documents import first_line
from tasks.evaluate import encode_questions, read_problems
from tasks.records import Artifact
from tasks.settings import ServiceError, Settings, redact
from tasks.tokenizer import load_tokenizer
from tasks.tracking import CHECK_SECONDS, check_server


def check_services() -> None:
    """ServiceError, one line, unless Prefect and MLflow answer and the bucket takes what we write."""
    settings = Settings.from_environment()
    check_prefect(PREFECT_API_URL.value())
    check_server(settings.tracking_uri)
    check_bucket(settings)


def check_prefect(url: str | None) -> None:
    """ServiceError unless Prefect's server answers at `url`; without one, the flow starts a temporary server."""
    if url is None:
        return
    with get_client(sync_client=True, httpx_settings={"timeout": CHECK_SECONDS}) as client:
        fault = client.api_healthcheck()
    if fault is not None:
        raise ServiceError(
            f"Prefect at {redact(url)} does not answer ({first_line(fault)}); check PREFECT_API_URL", transient=True
        )


def check_model(recipe: Recipe, model: ModelConfig) -> None:
    """ValueError for axes that the teacher does not have and for a budget above it."""
    recipe.axes.bind(model)
    full = subnet_params(model, full_subnet(model))
    for budget in recipe.budgets:
        if budget.params is not None and budget.params > full:
            raise ValueError(
                f"budget {budget.name}: {budget.params:,} parameters is above the teacher's {full:,}; "
                "lower it, or leave params out for the full model"
            )


def check_problems(evaluation: Evaluation, tokenizer: Artifact) -> None:
    """ValueError for a problem that cannot be read, or that the teacher's chat template refuses."""
    if evaluation.problems is not None:
        problems = read_problems(Path(evaluation.problems), evaluation.max_problems)
        encode_questions(load_tokenizer(Path(tokenizer.path)), problems)


def check_corpus(recipe: Recipe, corpus: Artifact) -> None:
    """ValueError unless everything that cuts sequences from the corpus gets at least one."""
    record = read_record(Path(corpus.path))
    stages = [*recipe.stages, *([recipe.teacher.pretrain.stage()] if recipe.teacher.pretrain else [])]
    wanted = [(f"stage {stage.name}", record.train, stage.sequence_length) for stage in stages]
    wanted.append(("importance", record.train, recipe.importance.sequence_length))
    wanted.append(("evaluation", record.heldout, recipe.evaluation.sequence_length))
    for name, split, sequence_length in wanted:
        try:
            check_length(split, sequence_length)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
