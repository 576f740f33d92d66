"""The MLflow run of a recipe: opened at the start, ended however the pipeline ends, linked both ways."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from prefect.context import FlowRunContext
from prefect.settings import get_current_settings
from prefect.utilities.urls import url_for

from elastic_core.recipe import Recipe
from elastic_core.schema import to_dict
from tasks import tracking
from tasks.corpus.sources import problems_digest, source_identity, teacher_identity
from tasks.records import Release
from tasks.running.code import CODE, code_of, own_digest, project_version
from tasks.running.patience import patiently
from tasks.running.steps import FUNCTIONS, WAYS, fingerprint
from tasks.running.usage import noting
from tasks.settings import ServiceError, Settings, redact

CODE_TAG, STEPS_TAG = f"elastic.{CODE}", "elastic.steps"

logger = logging.getLogger(__name__)


def run_key(recipe: Recipe) -> str:
    """The name of a recipe's run: the same for the same recipe on the same models, data and problems.

    Every setting counts, those too on which no result depends: MLflow lets no parameter of a run change.
    """
    teacher, sources = identities(recipe)
    problems = problems_digest(recipe.evaluation.problems)
    asked = [patiently(each.name, partial(source_identity, each.source)) for each in recipe.evaluation.benchmarks]
    beside = [patiently(each.name, partial(teacher_identity, each.path)) for each in recipe.references if each.path]
    return fingerprint(to_dict(recipe), teacher, sources, problems, asked, beside)[:32]


def identities(recipe: Recipe) -> tuple[str | None, tuple[str, ...]]:
    """What changes with the teacher, None without one, and what changes with each source; waits for who is asked."""
    path = recipe.teacher.path
    teacher = patiently(f"teacher {path}", partial(teacher_identity, path)) if path else None
    sources = recipe.data.sources
    return teacher, tuple(patiently(source.path, partial(source_identity, source)) for source in sources)


def to_do(recipe: Recipe, settings: Settings, pipeline: Callable[..., Any]) -> str:
    """Why the recipe is to be carried out, in one line; "" where that was done on all as it is now, code included."""
    looked_up = partial(tracking.tags_of_finished, settings.tracking_uri, recipe.family, run_key(recipe))
    tags = patiently("looking for the run", looked_up)
    if tags is None:
        return "it was not yet carried out to its end on this teacher and these data"
    before, now = json.loads(tags.get(STEPS_TAG, "{}")), ways(pipeline)
    changed = [name for name in sorted(before.keys() | now) if before.get(name) != now.get(name)]
    return f"{', '.join(changed)} changed since {tags.get(CODE_TAG, 'it was carried out')}" if changed else ""


def ways(pipeline: Callable[..., Any]) -> dict[str, str]:
    """Digests, by name, of the pipeline's own code, and of what each of its cached steps runs.

    A process may have imported steps of others, such as the race's; they make nothing of this pipeline's.
    """
    reached = code_of(pipeline).modules
    own = {function.__name__ for function in FUNCTIONS if function.__module__ in reached}
    return {name: way() for name, way in WAYS.items() if name in own} | {pipeline.__name__: own_digest(pipeline)[:16]}


@contextmanager
def tracked(recipe: Recipe, settings: Settings, pipeline: Callable[..., Any]) -> Iterator[str]:
    """The id of the recipe's run, the same one however often the pipeline is started again.

    The run says by which code it is made, and ends with the block: as failed where that raises.
    """
    key, uri = run_key(recipe), settings.tracking_uri
    made_by = {CODE_TAG: project_version(), STEPS_TAG: json.dumps(ways(pipeline), sort_keys=True)}
    opened = partial(
        tracking.open_run,
        uri,
        experiment=recipe.family,
        run_key=key,
        run_name=flow_run_name() or f"{recipe.family} {key[:8]}",
        tags=made_by | ({tracking.PREFECT_RUN: page} if (page := prefect_url()) else {}),
        artifact_root=f"s3://{settings.bucket}/mlflow/{recipe.family}" if not tracking.is_server(uri) else None,
    )
    run_id = patiently("opening the run", opened)
    patiently("opening the run", partial(tracking.log_params, uri, run_id, to_dict(recipe)))
    try:
        with noting(settings.home, recipe.family):
            yield run_id
    except BaseException:
        try:
            tracking.finish_run(uri, run_id, failed=True)
        except ServiceError as error:
            logger.warning("the run stays open in MLflow: %s", error)
        raise
    patiently("ending the run", partial(tracking.finish_run, uri, run_id))


def link_release(settings: Settings, run_id: str, release: Release) -> None:
    """Say in MLflow, on the run and on the registered versions, where everything is."""
    uri, page = settings.tracking_uri, prefect_url()
    here = "" if settings.registry == uri else f"{redact(settings.registry).rstrip('/')}/"
    models = [f"- [{model}]({here}#/models/{model.replace(':', '/versions/')})" for model in release.models.values()]
    lines = [f"Family {release.family}, version {release.version}, objects at `{release.uri}`:", "\n".join(models)]
    if release.run_id != run_id:
        lines.append(f"This run took every step from the cache; the curves are in run `{release.run_id}`.")
    if page:
        lines.append(f"[Run in Prefect]({page})")
    note = {tracking.NOTE: "\n\n".join(lines)}
    patiently("linking the release", partial(tracking.set_tags, uri, run_id, note))
    if name := flow_run_name():
        patiently("linking the release", partial(tracking.rename_run, uri, run_id, name))
    if page:
        tags, registered = {tracking.PREFECT_RUN: page}, release.models.values()
        patiently("linking the release", partial(tracking.tag_versions, settings.registry, registered, tags))


def flow_run_name() -> str:
    """What this flow run is called; empty outside of one."""
    context = FlowRunContext.get()
    return context.flow_run.name if context is not None and context.flow_run is not None else ""


def prefect_url() -> str:
    """The page of this flow run; empty where the server has no UI, as the one that `elastic run` starts."""
    context = FlowRunContext.get()
    if not get_current_settings().server.ui.enabled:
        return ""
    return (url_for(context.flow_run) or "") if context is not None and context.flow_run is not None else ""
