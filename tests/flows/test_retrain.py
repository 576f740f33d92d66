"""The schedule retrains by itself: not without need, when new data come, and only what is no worse is promoted."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from served import SCHEDULE, Elastified, Served, eventually

pytestmark = pytest.mark.services

OFTEN = CronSchedule(cron="* * * * * */30")


def change(served: Served, **changes: Any) -> None:
    """Edit the deployment, as on its page; runs that were scheduled before are scheduled anew."""
    with served.prefect() as client:
        client.update_deployment(client.read_deployment_by_name("retrain/micro").id, DeploymentUpdate(**changes))


def ticks(served: Served) -> list[FlowRun]:
    """The runs that the schedule began and that ended, oldest first."""
    return [run for run in served.runs("retrain") if run.auto_scheduled and run.state.is_final()]


def retrained(served: Served) -> list[FlowRun]:
    """Those ticks that found something to do."""
    return [run for run in ticks(served) if run.state.name not in ("Unchanged", "Skipped")]


def suspended(served: Served) -> list[FlowRun]:
    """Those that wait for a person."""
    return [run for run in served.runs("retrain") if run.state.name == "Suspended"]


def next_retrained(served: Served) -> FlowRun:
    before = len(retrained(served))
    eventually(lambda: len(retrained(served)) > before, "the schedule does not retrain", served.story)
    return retrained(served)[before]


@pytest.fixture(scope="module")
def made(served: Served, elastified: Elastified) -> Iterator[Served]:
    """The family is there, made from the data as they are, and the schedule ticks twice a minute."""
    with served.prefect() as client:
        deployment = client.read_deployment_by_name("retrain/micro")
        assert [held.schedule.cron for held in deployment.schedules] == [SCHEDULE]
        change(served, schedules=[DeploymentScheduleUpdate(schedule=OFTEN, active=True)])
        yield served
        client.pause_deployment(deployment.id)


def test_the_schedule_fires_and_does_nothing_where_nothing_changed(made: Served):
    before, ended = made.aliases("micro-s"), len(ticks(made))
    (run, *_) = eventually(lambda: ticks(made)[ended:], "the schedule does not fire")
    assert run.state.name == "Unchanged", run.state.message
    assert made.aliases("micro-s") == before


def test_new_data_are_retrained_on_once_and_promoted_by_the_schedule(made: Served):
    new = made.aliases("micro-s")["candidate"] + 1
    with made.command.recipe.with_name("stories.jsonl").open("a") as file:
        file.write(json.dumps({"text": "the red cat saw the blue bird and then it ran under the mat"}) + "\n")
    eventually(made.trainers, "the schedule does not retrain", made.story)
    by_hand = made.start("retrain/micro")
    run = next_retrained(made)
    assert run.state.is_completed(), run.state.message
    assert made.ended(by_hand).state.name == "Unchanged", "a person's run does not wait for the one under way"
    assert "another retraining of micro is under way" in {tick.state.message for tick in ticks(made)}
    after = {"candidate": new, "champion": new}
    assert made.aliases("micro-s") == after, run.state.message
    eventually(lambda: ticks(made)[-1].state.name == "Unchanged", "the schedule does not go on")
    assert made.aliases("micro-s") == after


def test_above_the_ceiling_a_run_waits_for_a_person_and_a_worse_candidate_is_not_promoted(
    made: Served,
):
    champion = made.aliases("micro-s")["champion"]
    # A rate of 0.05 may by chance lower the cross-entropy of a teacher that has hardly learned.
    worse = made.recipe("stages.1.optimizer.learning_rate=0.5", "stages.1.steps=6")
    change(made, parameters={"recipe": worse, "max_gpu_hours": 0.0, "force": False})
    (waiting,) = eventually(lambda: suspended(made), "no run is suspended", made.story)
    left = f"{waiting.name} has asked already: resume or cancel that run"
    eventually(lambda: ticks(made)[-1].state.message == left, "the next run does not leave it to that one")
    assert "GPU-hours, about $" in made.artifacts(waiting.id)["waits-for-a-person"].data
    assert made.aliases("micro-s")["candidate"] == champion and not made.trainers()
    with made.prefect() as client:  # while the schedule goes on
        client.resume_flow_run(waiting.id)
    run = made.ended(waiting.id)
    assert run.state.is_completed(), run.state.message
    assert "stays candidate" in run.state.message
    assert not suspended(made), "a run of the schedule asked again for what a person had resumed"
    assert made.aliases("micro-s") == {"candidate": champion + 1, "champion": champion}
