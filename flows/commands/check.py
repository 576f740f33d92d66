"""`elastic check`: what would end a run, found before anything is spent on it."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import typer

from elastic_core.budget import bytes_text
from elastic_core.files.checkpoint import open_checkpoint, read_config
from elastic_core.geometry import ModelConfig
from elastic_core.judging import Benchmark, Endpoint
from elastic_core.planning.machine import Accelerator, Locality
from elastic_core.planning.plan import RecipePlan, plan_recipe
from elastic_core.planning.profile import recipe_table
from elastic_core.recipe import DataSource, Evaluation, Recipe, Stage
from flows.commands.plan import locality_of_runs
from flows.serving.services import embedded_services
from tasks.artifacts import check_bucket, check_keys
from tasks.artifacts.leases import check_workspace
from tasks.corpus.ends import end_warnings
from tasks.corpus.sample import Sample, sample
from tasks.corpus.tokenizer import SMALLEST_VOCABULARY, check_tokenizer, train_tokenizer
from tasks.judging.benchmarks import PROBLEMS_FILE, read_benchmark, write_problems
from tasks.judging.decoder import encoded
from tasks.judging.endpoint import Client
from tasks.judging.judge import require_scorer
from tasks.judging.started import check_gpus, program_for
from tasks.reporting.numbers import human_count
from tasks.running.places import elsewhere
from tasks.running.preflight import (
    bring_side_files,
    check_cluster,
    check_model,
    check_prefect,
    check_problems,
    check_teacher,
    prefect_url,
)
from tasks.running.ray_cluster import RayCluster
from tasks.running.usage import written_by_open_runs
from tasks.settings import ServiceError, Settings, make_home, redact
from tasks.teacher import left_out_text
from tasks.tracking import check_server

DOCUMENTS = 64  # of each source, to read and render
SHOWN = 600  # characters of a rendered document
EPOCHS = 4  # data that are seen more often are worth less and less (arXiv 2305.16264)

T = TypeVar("T")


class Findings:
    """Prints a line for everything that is looked at, and counts what is at fault."""

    def __init__(self) -> None:
        self.faults = 0

    def look(self, what: str, check: Callable[[], tuple[str, T]]) -> T | None:
        """What a check gives, after its line; None where it finds a fault."""
        try:
            said, value = check()
        except (ValueError, ServiceError, OSError) as error:
            self.faults += 1
            typer.echo(f"FAULT  {what}: {redact(' '.join(str(error).split()))}")
            return None
        typer.echo(f"ok     {what}: {said}")
        return value


def check_recipe(recipe: Recipe) -> int:
    """Look at everything that a run needs, a line each, and return how much of it is at fault."""
    findings, home, locality = Findings(), make_home(), locality_of_runs(recipe)
    with embedded_services(home, share=True), tempfile.TemporaryDirectory() as work:
        look_at_services(findings)
        directory = findings.look("teacher", partial(_teacher, recipe, Path(work) / "teacher"))
        if directory is None:
            typer.echo("       data, benchmarks, budgets, GPUs and the rest are looked at when there is a teacher")
            return findings.faults
        for warning in end_warnings(directory) if recipe.teacher.pretrain is None else ():
            typer.echo(f"note   teacher: {warning}")
        _look_at_data(findings, recipe, directory, Path(work))
        if recipe.evaluation.problems is not None:
            findings.look("evaluation.problems", partial(_problems, recipe, directory))
        for benchmark in recipe.evaluation.benchmarks:
            look = partial(_benchmark, benchmark, recipe.evaluation, directory, Path(work) / f"asked-{benchmark.name}")
            findings.look(f"benchmark {benchmark.name}", look)
        if recipe.evaluation.engine is not None:
            findings.look("evaluation.engine", partial(_engine, recipe))
        if recipe.evaluation.endpoint is not None:
            findings.look("evaluation.endpoint", partial(_endpoint, recipe.evaluation.endpoint))
        pretraining = recipe.teacher.pretrain
        model = read_config(directory) if pretraining is None else pretraining.model
        plan = findings.look("budgets", partial(_budgets, recipe, model, locality))
        if plan is not None:
            on_ray = isinstance(elsewhere(), RayCluster)
            findings.look("GPUs", partial(_cluster, recipe) if on_ray else partial(_gpus, plan))
            findings.look("disk", partial(_disk, plan, home))
    return findings.faults


def look_at_services(findings: Findings) -> None:
    """Prefect, MLflow and the bucket, as the environment names them, or as `elastic run` brings them along."""
    settings = Settings.from_environment()

    def prefect() -> tuple[str, None]:
        check_prefect(url := prefect_url())
        return (f"{redact(url)} answers" if url else "a server of its own"), None

    def mlflow(uri: str) -> tuple[str, None]:
        check_server(uri)
        return f"{redact(uri)} answers", None

    def bucket() -> tuple[str, None]:
        check_bucket(settings)
        return f"s3://{settings.bucket} stores, gives back and overwrites nothing", None

    def keys() -> tuple[str, None]:
        check_keys(settings)
        return "what signs manifests, and what verifies them, can be read", None

    findings.look("Prefect", prefect)
    for uri in sorted({settings.tracking_uri, settings.registry}):
        findings.look("MLflow" if uri == settings.tracking_uri else "registry", partial(mlflow, uri))

    def workspace() -> tuple[str, None]:
        check_workspace(settings)
        return f"{settings.workspace} lets one host at a time do a step", None

    findings.look("bucket", bucket)
    if settings.workspace is not None:
        findings.look("workspace", workspace)
    if settings.signing_key or settings.verification_key:
        findings.look("keys", keys)


def _teacher(recipe: Recipe, work: Path) -> tuple[str, Path]:
    """A directory with the teacher's config and tokenizer; of a teacher to train, with a tokenizer of single bytes."""
    path = recipe.teacher.path
    if path is None:
        train_tokenizer([], work, vocab_size=SMALLEST_VOCABULARY)
        return "trained by the run, as its tokenizer is", work
    left = "; its weights are looked at when they are here"
    if Path(path).is_dir():
        opened, directory = open_checkpoint(Path(path)), Path(path)
        model, left = opened.config, f"; {left_out_text(opened)}" if opened.left_out else ""
    else:
        bring_side_files(path, work)
        model, directory = read_config(work), work
    check_tokenizer(directory, model.vocab_size)
    check_teacher(recipe, model)
    return f"{path}: {model.num_layers} layers, hidden size {model.hidden_size}, and a tokenizer{left}", directory


def _look_at_data(findings: Findings, recipe: Recipe, tokenizer: Path, work: Path) -> None:
    """A line and the first text of each source; a fault where all together do not fill a sequence, and a note where
    the stages would read them many times.
    """
    held: list[int | None] = []
    for i, source in enumerate(recipe.data.sources):
        found = findings.look(f"data.sources[{i}]", partial(_source, source, tokenizer, work / str(i)))
        if found is not None:
            first = found.texts[0] if len(found.texts[0]) <= SHOWN else f"{found.texts[0][:SHOWN]} ..."
            typer.echo("".join(f"         | {line}\n" for line in first.splitlines()), nl=False)
        held.append(found.held if found is not None else None)
    known = [tokens for tokens in held if tokens is not None]
    if len(known) < len(held) or not sum(known):
        return
    tokens, longest = sum(known), max(recipe.stages, key=lambda stage: stage.sequence_length)
    if tokens <= longest.sequence_length:
        findings.look("data", partial(_too_few, tokens, longest))
    trained = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in recipe.stages)
    if trained > EPOCHS * tokens:
        typer.echo(
            f"note   data: the sources hold at most about {human_count(tokens)} tokens, and the stages train on "
            f"{human_count(trained)}, {trained / tokens:,.0f} times as many; bring more documents, or take fewer "
            "steps (`elastic init --tokens` counts them)"
        )


def _too_few(tokens: int, stage: Stage) -> tuple[str, None]:
    raise ValueError(
        f"the sources hold at most about {human_count(tokens)} tokens, too few for a sequence of {stage.name}, "
        f"{stage.sequence_length:,} and its next; bring more documents, or shorten stages.sequence_length"
    )


def _source(source: DataSource, tokenizer: Path, work: Path) -> tuple[str, Sample]:
    """Read and encode the first documents as a run would."""
    found = sample(source, tokenizer, DOCUMENTS, work)
    if not found.texts:
        raise ValueError(f"{source.path}: the dataset is empty; add documents or take it out of data.sources")
    counted = f"{found.tokens:,} tokens" + (
        "" if found.learned == found.tokens else f", {found.learned:,} of them learned"
    )
    return f"{source.path}: the first {len(found.texts)} texts are {counted}; the first of all:", found


def _problems(recipe: Recipe, tokenizer: Path) -> tuple[str, None]:
    check_problems(recipe.evaluation, tokenizer)
    return f"{recipe.evaluation.problems}: read and rendered", None


def _benchmark(benchmark: Benchmark, evaluation: Evaluation, tokenizer: Path, work: Path) -> tuple[str, None]:
    """Read every problem, as our own decoder would where it is to answer, and look for what scores the answers."""
    require_scorer(benchmark.form, evaluation.unsafe_code)
    work.mkdir()
    count = write_problems(benchmark, work)
    if evaluation.is_decoded:
        asked = replace(benchmark, path=str(work / PROBLEMS_FILE), format=benchmark.form)
        encoded(tokenizer, read_benchmark(asked), benchmark.sampling)
    return f"{benchmark.source.path}: {count:,} problems, {benchmark.runs} runs of each", None


def _engine(recipe: Recipe) -> tuple[str, None]:
    """The program here. Where steps for a GPU run elsewhere, the run looks there before it spends anything."""
    engine = recipe.evaluation.engine
    assert engine is not None, "looked at only where there is one"
    program, place = program_for(engine, recipe.dtype), elsewhere()
    if place is None:
        check_gpus(engine)
    there = "" if place is None else f"; the run asks {place.name} for the same"
    return f"{program.name}, {program.path}{there}", None


def _endpoint(endpoint: Endpoint) -> tuple[str, None]:
    """Ask the server for its models, once. The sizes may be served later, when they are there."""
    models = Client(endpoint).models()
    return f"{endpoint.url} answers, with the models {', '.join(models) or 'none yet'}", None


def _budgets(recipe: Recipe, model: ModelConfig, locality: Locality) -> tuple[str, RecipePlan]:
    """A plan on the GPUs of this machine, or on one such as `elastic plan` assumes."""
    check_model(recipe, model)
    count = torch.cuda.device_count()
    memory = torch.cuda.get_device_properties(0).total_memory if count else 80 * 10**9
    accelerator = Accelerator(memory=memory, flops_per_second=1e15, mfu=0.4, dollars_per_hour=0)
    plan = plan_recipe(recipe, model, accelerator, (max(1, count),), recipe_table(recipe), locality)
    plan.require_budgets()
    sizes = ", ".join(f"{planned.budget.name} {human_count(planned.params)}" for planned in plan.budgets)
    return f"{sizes} parameters", plan


def _gpus(plan: RecipePlan) -> tuple[str, None]:
    count = torch.cuda.device_count()
    if not count:
        return "none here; training runs on this CPU, or on workers with GPUs, for which `elastic plan` is asked", None
    name, memory = torch.cuda.get_device_name(0), bytes_text(plan.accelerator.memory)
    if not plan.fitting:
        raise ValueError(
            f"a stage does not fit on {count} x {name} of {memory}; `elastic plan RECIPE --gpus {count} --gpu-memory "
            f"{plan.accelerator.memory // 10**9}GB` says what would"
        )
    return f"{count} x {name} of {memory}, on which every stage fits", None


def _cluster(recipe: Recipe) -> tuple[str, None]:
    return check_cluster(recipe).words, None


def _disk(plan: RecipePlan, home: Path) -> tuple[str, None]:
    """What the plan needs at the most, without what a run has written that would go on, and what is free."""
    (_, most), free, written = plan.disk, shutil.disk_usage(home).free, written_by_open_runs(home, plan.family)
    needed = max(0, most - written)
    more, known = ("more ", f" beside {bytes_text(written)} of a run that goes on") if written else ("", "")
    said = f"about {bytes_text(needed)} {more}are needed at the most{known}, and {bytes_text(free)} are free in {home}"
    if free < needed:
        raise ValueError(f"{said}; make room, or set ELASTIC_HOME to a larger disk")
    return said, None
