"""What a Prefect server holds of this project: work pools, deployments and automations.

`elastic up` puts them there; infra/prefect.yaml says the same to `prefect deploy` for a server of one's own.
"""

import argparse
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.states import Cancelled, Crashed
from prefect.types.entrypoint import EntrypointType

from elastic_core.recipe import Recipe
from elastic_core.schema import told
from flows.commands.recipes import keep_recipe, load_recipe, recipe_names
from flows.retrain import SKIPPED, UNCHANGED
from flows.serving.ceiling import WAITS
from flows.serving.schedule import NEVER, Schedule
from flows.serving.services import HEARTBEAT
from tasks.running.gpu_pool import DEPLOYMENT_VARIABLE

# So many runs of a pool at once: a run on the gpu pool has all devices of its worker's machine to itself.
POOLS = {"cpu": None, "gpu": 1}
GPU_STEP = "gpu-step/gpu"
BY_RUNS = "started by runs alone"  # beside the deployment in the list from which people choose
SILENCE = timedelta(seconds=90)  # three heartbeats
BEGINNING = timedelta(minutes=15)  # on Kubernetes a node may have to come, and then the image

FLOWS = ["elastify", "retrain", "export", "evaluate", "gpu-step"]
FINAL_EVENTS = {
    f"prefect.flow-run.{name}" for name in ("Completed", UNCHANGED, SKIPPED, "Failed", "Cancelled", "Crashed")
}
WAITING_EVENTS = {WAITS, "prefect.flow-run.Suspended", "prefect.flow-run.Paused"}  # for a person, with no process
BEAT, CRASHED = "prefect.flow-run.heartbeat", "prefect.flow-run.Crashed"
PENDING, CANCELLING, ANYTHING = "prefect.flow-run.Pending", "prefect.flow-run.Cancelling", "prefect.flow-run.*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A flow, by its module path, that a pool's workers run, on a `schedule` (cron) if there is one.

    Where there is no schedule here, one that was set on the server stays. A parameter of `choices` is one of those in
    the form. The form of a whole recipe has a box for the share of each budget of `budgets`, by its name.
    """

    entrypoint: str
    name: str
    pool: str
    parameters: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    schedule: str | None = None
    rerun: bool = True
    choices: dict[str, list[str]] = field(default_factory=dict)
    budgets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def apply(self) -> None:
        """Create it on the server, or bring it up to date."""
        flow: Flow[..., Any] = load_flow_from_entrypoint(self.entrypoint, use_placeholder_flow=False)
        applied = RunnerDeployment.from_flow(
            flow,
            name=self.name,
            cron=self.schedule,
            parameters=self.parameters,
            triggers=[self.rerun_crashed(flow.name, list(inspect.signature(flow.fn).parameters))] if self.rerun else [],
            description=inspect.getdoc(flow.fn),
            work_pool_name=self.pool,
            job_variables={"env": {**HEARTBEAT, **self.environment}},
            entrypoint_type=EntrypointType.MODULE_PATH,
            tags=list(self.tags),
        )
        applied.model_fields_set.discard("paused")  # what is sent replaces what the server has, and people pause there
        for parameter, choices in self.choices.items():
            applied._parameter_openapi_schema.properties[parameter]["enum"] = choices
        if self.budgets:  # else the form has one box, for JSON; a share of any other name is still taken
            shares = applied._parameter_openapi_schema.definitions["Stage"]["properties"]["budgets"]
            shares["properties"] = {
                name: {"title": name, "type": "number", "position": position, "description": f"The share of {name}."}
                for position, name in enumerate(self.budgets)
            }
        if self.schedule is None:
            applied.model_fields_set.discard("schedules")
        applied.apply()

    def rerun_crashed(self, flow: str, parameters: list[str]) -> DeploymentEventTrigger:
        """The automation that starts a run again, with what it was given, when its process is gone."""
        return DeploymentEventTrigger(
            name=f"run a crashed {flow}/{self.name} again",
            expect={CRASHED},
            match_related=[
                {"prefect.resource.role": "flow", "prefect.resource.name": flow},
                {"prefect.resource.role": "deployment", "prefect.resource.name": self.name},
            ],
            parameters={name: f"{{{{ flow_run.parameters['{name}'] }}}}" for name in parameters},
        )


def deployments(recipe: Recipe, schedule: str | None = None, max_gpu_hours: float = 0.0) -> tuple[Deployment, ...]:
    """All of them; `recipe` is what the forms of `elastify` and `retrain` begin with.

    That of `elastify` asks for a recipe by name and for changes; a second deployment has a form of the whole recipe.
    """
    on_gpu_pool = {DEPLOYMENT_VARIABLE: GPU_STEP}
    here = {DEPLOYMENT_VARIABLE: ""}  # whatever the worker's environment says: a run must not wait for its own place
    given = {"recipe": told(recipe)}
    budgets = tuple(budget.name for budget in recipe.budgets)
    return (
        Deployment(
            entrypoint="flows.elastify.elastify_by_name",
            name=recipe.family,
            pool="cpu",
            parameters={"recipe": recipe.family, "changes": []},
            environment=on_gpu_pool,
            choices={"recipe": recipe_names()},
        ),
        Deployment(
            entrypoint="flows.elastify.elastify",
            name=f"{recipe.family}-whole-recipe",
            pool="cpu",
            parameters=given,
            environment=on_gpu_pool,
            budgets=budgets,
        ),
        Deployment(
            entrypoint="flows.retrain.retrain",
            name=recipe.family,
            pool="cpu",
            parameters={**given, "max_gpu_hours": max_gpu_hours, "force": False},
            environment=on_gpu_pool,
            schedule=schedule,
            budgets=budgets,
        ),
        Deployment(
            entrypoint="flows.export.export",
            name="any-family",
            pool="cpu",
            parameters={"ffn_layout": "padded"},
        ),
        Deployment(
            entrypoint="flows.evaluation.evaluation",
            name="any-model",
            pool="gpu",
            parameters={"settings": {"sequence_length": 1024}},
            environment=here,
        ),
        # Whoever waits for such a step starts it again.
        Deployment(
            entrypoint="flows.serving.gpu_step.gpu_step",
            name="gpu",
            pool="gpu",
            environment=here,
            rerun=False,
            tags=(BY_RUNS,),
        ),
    )


def recipe_parameter(path: str) -> dict[str, Any]:
    """A step of prefect.yaml: a recipe as the value of a parameter."""
    return {"recipe": told(load_recipe(Path(path)))}


def apply_all(recipe: Recipe, schedule: str | None, max_gpu_hours: float | None, *, fresh: bool) -> list[str]:
    """Pools, deployments and automations, new or brought up to date. What retrains by a schedule of before is told.

    `schedule` is a cron expression, NEVER to take away what there is, or None to leave it; so does None for the
    ceiling. `fresh` says that no worker
    of this server can be alive: runs that it believes running are ended, and begin again unless they were cancelled.
    """
    keep_recipe(recipe)
    with get_client(sync_client=True) as client:
        for pool, limit in POOLS.items():
            ensure_pool(client, pool, limit)
        ceiling = held_ceiling(client, recipe.family) if max_gpu_hours is None else max_gpu_hours
        for deployment in deployments(recipe, None if schedule == NEVER else schedule, ceiling):
            deployment.apply()
        if schedule == NEVER:
            unschedule(client, recipe.family)
        for automation in (silent_runs(), stillborn_runs()):
            ensure_automation(client, automation)
        if fresh:
            end_orphans(client)
        return [line for name, line in standing_schedules(client) if schedule is None or name != recipe.family]


def held_ceiling(client: SyncPrefectClient, family: str) -> float:
    """The GPU-hours that the schedule of a family may take without asking; 0 where nobody has said."""
    try:
        return float(client.read_deployment_by_name(f"retrain/{family}").parameters.get("max_gpu_hours", 0.0))
    except ObjectNotFound:
        return 0.0


def unschedule(client: SyncPrefectClient, family: str) -> None:
    deployment = client.read_deployment_by_name(f"retrain/{family}")
    for held in deployment.schedules:
        client.delete_deployment_schedule(deployment.id, held.id)


def standing_schedules(client: SyncPrefectClient) -> Iterator[tuple[str, str]]:
    """The families that a schedule retrains, each with a line that says so and how to end it.

    Once a nightly schedule was the default, and nothing tells it from one that a person wanted.
    """
    for deployment in client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"]))):
        when = [_when(held.schedule) for held in deployment.schedules if held.active]
        if when and not deployment.paused:
            yield (
                deployment.name,
                f"retrain/{deployment.name} trains by itself, by a schedule of before ({', '.join(when)}), what takes "
                f"up to {deployment.parameters.get('max_gpu_hours', 0.0):g} GPU-hours, and asks for more; "
                f"`elastic up RECIPE --schedule {NEVER}`, with the recipe of {deployment.name}, ends that",
            )


def _when(schedule: Any) -> str:
    return str(getattr(schedule, "cron", None) or getattr(schedule, "interval", None) or schedule)


def ensure_pool(client: SyncPrefectClient, name: str, limit: int | None) -> None:
    """A process pool; one that is there keeps the type and the limit that its owner gave it."""
    try:
        client.read_work_pool(name)
    except ObjectNotFound:
        client.create_work_pool(WorkPoolCreate(name=name, type="process", concurrency_limit=limit))


def silent_runs(within: timedelta = SILENCE) -> AutomationCore:
    """A run that was heard of, and then neither beats nor ends, is crashed: that frees its place in the pool.

    One that is to be cancelled is not, for a crashed run is started again: Prefect calls it cancelled after a while.
    Nor is one that waits for a person.
    """
    return lost_runs(
        "elastic: runs that fell silent have crashed",
        "no sign of life from its process",
        after=BEAT,
        expect={BEAT, CANCELLING, *FINAL_EVENTS, *WAITING_EVENTS},
        within=within,
    )


def stillborn_runs(within: timedelta = BEGINNING) -> AutomationCore:
    """A run that a worker took and that never began is crashed: its process died before it could beat."""
    return lost_runs(
        "elastic: runs that never began have crashed",
        "a worker took it, and its process never began",
        after=PENDING,
        expect={ANYTHING},
        within=within,
    )


def lost_runs(name: str, message: str, *, after: str, expect: set[str], within: timedelta) -> AutomationCore:
    """The automation that crashes a run of ours when none of the expected events follows `after` in time."""
    return AutomationCore(
        name=name,
        trigger=EventTrigger(
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related={"prefect.resource.role": "flow", "prefect.resource.name": FLOWS},
            for_each={"prefect.resource.id"},
            after={after},
            expect=expect,
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message=message)],
    )


def ensure_automation(client: SyncPrefectClient, wanted: AutomationCore) -> None:
    found = client.read_automations_by_name(wanted.name)
    if found:
        client.update_automation(found[0].id, wanted)
    else:
        client.create_automation(wanted)


def end_orphans(client: SyncPrefectClient) -> None:
    """Crash the runs that workers left behind when they and the server ended together; cancel those that were to be."""
    going_on = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    for run in client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=going_on)))
    ):
        if run.deployment_id or run.parent_task_run_id:
            ended = Cancelled if run.state_type == StateType.CANCELLING else Crashed
            client.set_flow_run_state(run.id, ended(message="`elastic up` was stopped while it ran"), force=True)


def main() -> None:
    """Apply everything to the server of PREFECT_API_URL."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--schedule")
    parser.add_argument("--max-gpu-hours", type=float)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--notes", type=Path, help="where to write the lines that the user is to read")
    given = parser.parse_args()
    try:
        schedule = Schedule(cron=given.schedule, max_gpu_hours=given.max_gpu_hours)
        recipe = load_recipe(given.recipe)
    except ValueError as error:
        sys.exit(str(error))
    lines = apply_all(recipe, schedule.cron, schedule.max_gpu_hours, fresh=given.fresh)
    if given.notes is not None:
        given.notes.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
