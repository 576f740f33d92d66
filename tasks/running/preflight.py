"""Check at the start what a run will need hours later."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from elastic_core.budget import bytes_text
from elastic_core.files.checkpoint import read_config
from elastic_core.geometry import MOE, ModelConfig
from elastic_core.planning.machine import H100
from elastic_core.planning.plan import check_budgets, plan_recipe
from elastic_core.planning.profile import recipe_table
from elastic_core.recipe import Evaluation, Recipe, Stage
from tasks.artifacts import check_bucket, get_file, list_objects, open_store
from tasks.artifacts.leases import check_workspace
from tasks.corpus.ends import end_warnings
from tasks.corpus.hub import bring_model, commit_of, parse_model
from tasks.corpus.mixing import check_portions
from tasks.corpus.pieces import first_line
from tasks.corpus.problems import encode_questions, read_problems
from tasks.corpus.record import check_length, read_record
from tasks.corpus.tokenizer import load_tokenizer
from tasks.judging.benchmarks import asked_from, read_benchmark
from tasks.judging.decoder import encoded
from tasks.judging.judge import require_scorer
from tasks.records import Artifact
from tasks.reporting.fit import unfit
from tasks.reporting.numbers import counted
from tasks.running import code
from tasks.running.nodes import nodes_for
from tasks.running.places import elsewhere
from tasks.running.ray_cluster import Host, RayCluster
from tasks.running.steps import ON_GPU
from tasks.running.training import processes_for
from tasks.running.workspace import small_files
from tasks.settings import PREFECT_API, ServiceError, Settings, redact, remedy
from tasks.tracking import CHECK_SECONDS, check_server

MOST_WITHOUT_GPU = 1.0  # hours of an H100 that CPUs are trusted with
LEAST_HELD_OUT = 0.5  # of the tokens asked for: below, the standard error of a loss is over 1.4 times that planned

logger = logging.getLogger(__name__)

# Of a checkpoint, what is read before its weights are.
SIDE_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]

# What gives a checkpoint's tensors their shapes.
GEOMETRY = (
    *("hybrid_override_pattern", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "use_conv_bias"),
    *("n_routed_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size"),
)


def check_services() -> None:
    """ServiceError, one line, unless Prefect and MLflow answer, and bucket and workspace take what we write."""
    settings = Settings.from_environment()
    check_prefect(prefect_url())
    for uri in sorted({settings.tracking_uri, settings.registry}):
        check_server(uri)
    check_bucket(settings)
    if settings.workspace is not None:
        check_workspace(settings)


def prefect_url() -> str | None:
    """The URL of Prefect's API; None where a flow starts a temporary server."""
    url: str | None = PREFECT_API_URL.value()
    return url


def check_prefect(url: str | None) -> None:
    """ServiceError unless Prefect's server answers at `url`; without one, the flow starts a temporary server."""
    if url is None:
        return
    with get_client(sync_client=True, httpx_settings={"timeout": CHECK_SECONDS}) as client:
        fault = client.api_healthcheck()
    if fault is not None:
        raise ServiceError(
            f"Prefect at {redact(url)} does not answer ({first_line(fault)}); "
            + remedy(PREFECT_API, otherwise="check the profile that `prefect config view` shows"),
            transient=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForRecipe:
    """What a cluster has for a recipe, in words, and the fewest nodes that each stage fits on, by its name."""

    words: str
    least_nodes: Mapping[str, int]


def check_cluster(recipe: Recipe) -> ForRecipe:
    """What a Ray cluster has for a recipe; nothing, with the words "", where steps for a GPU run elsewhere.

    A ValueError names the host that cannot do the steps that this process knows, or the stage that fits on no host.
    """
    place = elsewhere()
    if not isinstance(place, RayCluster):
        return ForRecipe(words="", least_nodes={})
    named = (recipe.teacher.path, recipe.evaluation.problems, *(reference.path for reference in recipe.references))
    files = [path for path in named if path is not None and Path(path).exists()]  # of this host, else of the Hub or S3
    steps = {f"{step.fn.__module__}:{name}": code.runs(step.fn) for name, step in ON_GPU.items()}
    hosts = place.hosts(steps, files)
    for host in hosts:
        if host.fault:
            raise ValueError(f"{host.name}, a host of {place.name}, cannot work: {host.fault}")
    least = min(hosts, key=lambda host: host.gpu_memory)
    count = counted(len(hosts), "host")
    if not least.gpus:
        _check_without_gpu(recipe, place)
        return ForRecipe(words=f"{place.name} has {count} without a GPU", least_nodes={})
    fewest = _check_stages(recipe, least, len(hosts))
    each = f"{least.gpus} x {least.gpu} of {bytes_text(least.gpu_memory)}"
    words = f"{place.name} has {count}, the least with {each}, on which every stage fits"
    return ForRecipe(words=words, least_nodes=fewest)


def _check_without_gpu(recipe: Recipe, place: RayCluster) -> None:
    """ValueError for a recipe that hosts without a GPU would take weeks for: those with one may not be there yet."""
    hours = plan_recipe(recipe, _geometry(recipe), H100, (1,), recipe_table(recipe)).all_gpu_hours
    if hours > MOST_WITHOUT_GPU:
        raise ValueError(
            f"no host of {place.name} has a GPU, and by its plan {recipe.family} takes {hours:,.0f} hours of one; "
            "start hosts with GPUs before the run"
        )


def _check_stages(recipe: Recipe, host: Host, hosts: int) -> dict[str, int]:
    """The fewest of so many hosts like this one that each stage fits on; ValueError where it does not fit on all."""
    accelerator = replace(H100, memory=host.gpu_memory, on_a_host=host.gpus)
    used = {stage.name: _processes_by_hosts(stage, host.gpus, hosts) for stage in recipe.stages}
    counts = {count for by_hosts in used.values() for count in by_hosts.values()}
    plan = plan_recipe(recipe, _geometry(recipe), accelerator, sorted(counts), recipe_table(recipe))
    meshes = {planned.stage.name: {mesh.gpus: mesh for mesh in planned.meshes} for planned in plan.stages}
    faults = [
        unfit(accelerator, planned, mesh)
        for planned in plan.stages
        if (by_hosts := used.get(planned.stage.name))
        and not (mesh := meshes[planned.stage.name][by_hosts[max(by_hosts)]]).fits
    ]
    if faults:
        raise ValueError(f"{' '.join(faults)} The cluster has {counted(hosts, 'host')} of {counted(host.gpus, 'GPU')}.")
    return {
        name: min(count for count, processes in by_hosts.items() if meshes[name][processes].fits)
        for name, by_hosts in used.items()
    }


def _processes_by_hosts(stage: Stage, gpus: int, hosts: int) -> dict[int, int]:
    """With how many processes a stage trains on so many hosts, by the numbers of hosts that its batch divides among."""
    counts = {count for most in range(1, hosts + 1) if (count := nodes_for(stage, most, gpus)) > 1}
    return {1: processes_for(stage, gpus), **{count: count * gpus for count in sorted(counts)}}


def _geometry(recipe: Recipe) -> ModelConfig:
    """The teacher's geometry, by the recipe or by its config.json, wherever that is."""
    teacher = recipe.teacher
    told = teacher.model if teacher.pretrain is None else teacher.pretrain.model
    if told is not None:
        return told
    assert teacher.path is not None, "recipe.Teacher has one of path and pretrain"
    if Path(teacher.path).is_dir():
        return read_config(Path(teacher.path))
    with TemporaryDirectory() as directory:
        bring_side_files(teacher.path, Path(directory) / "teacher")
        return read_config(Path(directory) / "teacher")


def check_model(recipe: Recipe, model: ModelConfig) -> None:
    """ValueError for a teacher of another geometry than the recipe says, what it lacks, and a budget above it."""
    check_teacher(recipe, model)
    check_budgets(recipe.budgets, model, recipe_table(recipe))


def check_teacher(recipe: Recipe, model: ModelConfig) -> None:
    """ValueError for a teacher of another geometry than the recipe says, and for what it lacks of axes and stages."""
    if recipe.teacher.model is not None:
        _check_geometry(recipe.teacher.model, model, recipe.teacher.path)
    axes, table = recipe.axes.bind(model), recipe_table(recipe)
    if table is not None:
        table.check(model, axes)
    for stage in recipe.stages:
        if stage.expert_balance and MOE not in model.hybrid_override_pattern:
            raise ValueError(f"stage {stage.name}: expert_balance is given, but the teacher has no layers with experts")


def _check_geometry(expected: ModelConfig, found: ModelConfig, path: str | None) -> None:
    for name in GEOMETRY:
        wanted, there = getattr(expected, name), getattr(found, name)
        if wanted != there:
            raise ValueError(
                f"teacher.model.{name} is {wanted}, but the checkpoint at {path} has {there}; "
                "correct the recipe, whose plan is for another model"
            )


def bring_side_files(path: str, directory: Path) -> None:
    """Put what a teacher in S3 or on the Hub has beside its weights into a new directory."""
    if not path.startswith("s3://"):
        hub = parse_model(path)
        bring_model(hub, commit_of(hub), SIDE_FILES, directory)
        return
    store = open_store(Settings.from_environment(need_bucket=False))
    directory.mkdir()
    for found in list_objects(store, path):
        if any(fnmatch(found.path, pattern) for pattern in SIDE_FILES):
            get_file(store, found.uri, directory / found.path)


def check_problems(evaluation: Evaluation, tokenizer: Path) -> None:
    """ValueError for a problem that cannot be read, or that the teacher's chat template refuses or loses."""
    if evaluation.problems is not None:
        problems = read_problems(Path(evaluation.problems), evaluation.max_problems)
        encode_questions(load_tokenizer(tokenizer), problems, evaluation.chat_template_kwargs)


def check_scorers(evaluation: Evaluation) -> None:
    """ValueError where this machine lacks what benchmarks are scored by; workers that judge see to it themselves."""
    if evaluation.endpoint is not None or elsewhere() is None:
        for benchmark in evaluation.benchmarks:
            require_scorer(benchmark.form, evaluation.unsafe_code)


def check_prompts(evaluation: Evaluation, problems: Mapping[str, Artifact], tokenizer: Path) -> None:
    """ValueError where our own decoder is to answer a problem that the model's chat template refuses or loses."""
    if evaluation.is_decoded:
        for benchmark in evaluation.benchmarks:
            brought = problems[benchmark.name]
            asked = asked_from(replace(brought, path=str(small_files(brought))), benchmark)
            encoded(tokenizer, read_benchmark(asked), benchmark.sampling)


def check_ends(tokenizer: Path) -> None:
    """Say in a line each what the teacher's files tell differently about the end of a text."""
    for warning in end_warnings(tokenizer):
        logger.warning("%s", warning)


def check_corpus(recipe: Recipe, corpus: Artifact) -> None:
    """ValueError unless everything that cuts sequences from the corpus gets at least one.

    A warning is logged where far fewer tokens are held out than evaluation asks for.
    """
    record = read_record(small_files(corpus))
    stages = [*recipe.stages, *([recipe.teacher.pretrain.stage()] if recipe.teacher.pretrain else [])]
    wanted = [(f"stage {stage.name}", record.train, stage.sequence_length) for stage in stages]
    wanted.append(("importance", record.train, recipe.importance.sequence_length))
    if recipe.shapes.by == "measured":
        wanted.append(("shapes", record.train, recipe.shapes.sequence_length))
    wanted.append(("evaluation", record.heldout, recipe.evaluation.sequence_length))
    for name, split, sequence_length in wanted:
        with _for(name):
            check_length(split.file, split.tokens, sequence_length)
    for stage in stages:
        with _for(f"stage {stage.name}"):
            check_portions(recipe.data, record, stage)
    held, asked = record.heldout.tokens, recipe.evaluation.heldout_tokens
    if held < LEAST_HELD_OUT * asked:
        logger.warning(
            "evaluation.heldout_tokens asks for %s tokens, and the corpus holds out %s, on which losses are measured; "
            "raise data.heldout_fraction or add documents",
            f"{asked:,}",
            f"{held:,}",
        )


@contextmanager
def _for(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
