"""The ceiling of what a schedule may spend: a run that would take more, by its plan, waits for a person."""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run

from elastic_core.planning.machine import H100
from elastic_core.planning.plan import plan_recipe
from elastic_core.planning.profile import recipe_table
from elastic_core.recipe import Recipe
from flows.commands.plan import counted_problems
from flows.commands.teacher import geometry_at, teacher_geometry
from tasks.running.recipe_run import run_key, ways
from tasks.running.steps import fingerprint
from tasks.settings import ServiceError, Settings

PATIENCE = timedelta(days=7)  # then the run fails, and the schedule asks again
ASKS = "waits-for-a-person"  # the key of the artifact, and of the suspension
WAITS = "elastic.flow-run.waits-for-a-person"  # the event
AUTOMATION = "AUTOMATION"  # as Prefect calls what made a run; its cloud names people and schedules too

logger = logging.getLogger(__name__)


def ask_first(recipe: Recipe, settings: Settings, pipeline: Callable[..., Any], max_gpu_hours: float) -> str:
    """Suspend a run that no person started, if its plan is above the ceiling; return once a person has resumed it.

    What a person resumed, or the ceiling let pass, does not ask again when an automation runs it again after a crash;
    the next run of the schedule does, and so does one by other code, which finds nothing in the cache. Returns a line
    where another run of the deployment waits already, so that this one has nothing to do, else "".
    """
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    if run is None or run.deployment_id is None:
        return ""
    allowed = settings.home / "allowed" / fingerprint(run_key(recipe), ways(pipeline))[:32]
    resumed = has_asked(run)
    is_rerun = run.created_by is not None and run.created_by.type == AUTOMATION  # after a crash
    passed = resumed or (is_rerun and allowed.exists())
    if (run.auto_scheduled or is_rerun) and not passed and (cost := over(recipe, max_gpu_hours)):
        if waiting := _waiting(run):
            return f"{waiting.name} has asked already: resume or cancel that run"
        _ask(run, recipe, cost)
    allowed.parent.mkdir(parents=True, exist_ok=True)
    allowed.touch()
    return ""


def over(recipe: Recipe, max_gpu_hours: float) -> str:
    """What a run of the recipe takes, in words, where that is more than the ceiling or is not known; else ""."""
    ceiling = f"the ceiling of this schedule is {max_gpu_hours:g} GPU-hours"
    try:
        path = recipe.teacher.path or ""
        model = geometry_at(path) if path.startswith("s3://") else teacher_geometry(recipe)
        plan = plan_recipe(recipe, model, H100, (1,), recipe_table(recipe), problems=counted_problems(recipe))
    except (ValueError, ServiceError) as error:
        return f"what it would take is not known ({error}), and {ceiling}"
    if unknown := [each.name for each in plan.benchmarks if each.problems is None and each.weight_bytes]:
        return f"how many problems {' and '.join(unknown)} has is not known, and {ceiling}"
    judging = sum(map(plan.judging_hours, plan.benchmarks))
    hours = plan.all_gpu_hours + judging
    dollars = sum(plan.dollars(step) for step in plan.steps) + H100.dollars_per_hour * judging
    if hours <= max_gpu_hours:
        return ""
    longest = " and answers as long as they may be" if judging else ""
    return (
        f"it would take {hours:,.3g} GPU-hours, about ${dollars:,.2f}, by its plan on one GPU with no step in the cache"
        f"{longest} (H100 at {H100.mfu:.0%} of its peak, ${H100.dollars_per_hour:g} an hour), and {ceiling}"
    )


def _ask(run: FlowRun, recipe: Recipe, cost: str) -> None:
    """Say on the run's page what it would take and how to go on, and suspend it: its process ends here."""
    how = "Resume this run to let it train; cancel it to leave everything as it is."
    logger.warning("%s waits for a person: %s. %s", run.name, cost, how)
    create_markdown_artifact(
        key=ASKS,
        description=f"{recipe.family} waits for a person",
        markdown=f"**Waits** New data, a new teacher or new code: {cost}.\n\n**Next** {how} With a higher "
        "`elastic up RECIPE --max-gpu-hours` fewer runs ask.",
    )
    try:
        suspend_flow_run(timeout=round(PATIENCE.total_seconds()), key=ASKS)
    except Pause:
        # Prefect's own event of the state comes too late for the automation that crashes silent runs: it waits a
        # quarter of an hour for that of the state before, which no run of a schedule ever sends.
        emit_event(WAITS, resource={"prefect.resource.id": f"prefect.flow-run.{run.id}"})
        raise


def _waiting(run: FlowRun) -> FlowRun | None:
    """Another run of the same deployment that has asked: it is suspended, or resumed and about to go on."""
    assert run.deployment_id is not None, "asked only of a deployment's runs"
    begun = [StateType.PAUSED, StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
    with get_client(sync_client=True) as client:
        others = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=begun))),
        )
    return next((other for other in others if other.id != run.id and has_asked(other)), None)


def has_asked(run: FlowRun) -> bool:
    """Whether the run was suspended here, whatever it does now."""
    return ASKS in (run.empirical_policy.pause_keys or ())
