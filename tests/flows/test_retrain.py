"""The schedule retrains by itself: not without need, when new data come, and only what is no worse is promoted."""

import json

import pytest
from prefect.client.schemas.objects import FlowRun
from served import SCHEDULE, Elastified, Served, eventually

pytestmark = pytest.mark.services

UNDER_WAY = "another retraining of micro is under way"


@pytest.fixture(scope="module")
def made(served: Served, elastified: Elastified) -> Served:
    """The family is there, made from the data as they are."""
    return served


def next_tick(served: Served, after: int) -> FlowRun:
    """The first run of the schedule to end after that many."""
    eventually(lambda: len(served.ticks()) > after, "the schedule does not fire", served.story)
    return served.ticks()[after]


def test_the_schedule_fires_and_does_nothing_where_nothing_changed(made: Served):
    with made.prefect() as client:
        schedules = client.read_deployment_by_name("retrain/micro").schedules
    assert [held.schedule.cron for held in schedules] == [SCHEDULE]
    before = made.aliases("micro-s")
    with made.ticking():
        run = next_tick(made, len(made.ticks()))
    assert run.state.name == "Unchanged", run.state.message
    assert made.aliases("micro-s") == before


@pytest.mark.slow
def test_new_data_are_retrained_on_once_and_promoted_by_the_schedule(made: Served):
    new = made.aliases("micro-s")["candidate"] + 1
    with made.command.recipe.with_name("stories.jsonl").open("a") as file:
        file.write(json.dumps({"text": "the red cat saw the blue bird and then it ran under the mat"}) + "\n")
    ended = len(made.ticks())
    with made.ticking():
        eventually(made.trainers, "the schedule does not retrain", made.story)
        by_hand = made.start("retrain/micro")
        skipped = next_tick(made, ended)
    assert skipped.state.message == UNDER_WAY
    assert made.ended(by_hand).state.name == "Unchanged", "a person's run does not wait for the one under way"
    (run,) = [tick for tick in made.ticks()[ended:] if tick.state.name not in ("Skipped", "Unchanged")]
    assert run.state.is_completed(), run.state.message
    after = {"candidate": new, "champion": new}
    assert made.aliases("micro-s") == after, run.state.message
    with made.ticking():
        run = next_tick(made, len(made.ticks()))
    assert run.state.name == "Unchanged", run.state.message
    assert made.aliases("micro-s") == after


@pytest.mark.slow
def test_above_the_ceiling_a_run_waits_for_a_person_and_a_worse_candidate_is_not_promoted(
    made: Served,
):
    champion = made.aliases("micro-s")["champion"]
    # A rate of 0.05 may by chance lower the cross-entropy of a teacher that has hardly learned.
    worse = made.recipe("stages.1.optimizer.learning_rate=0.5", "stages.1.steps=6")
    with made.ticking(recipe=worse, max_gpu_hours=0.0):
        (waiting,) = eventually(made.suspended, "no run is suspended", made.story)
        assert "GPU-hours, about $" in made.artifacts(waiting.id)["waits-for-a-person"].data
        left = f"{waiting.name} has asked already: resume or cancel that run"
        eventually(lambda: made.ticks()[-1].state.message == left, "the next run does not leave it to that one")
        assert made.aliases("micro-s")["candidate"] == champion and not made.trainers()
        ended = len(made.ticks())
        with made.prefect() as client:
            client.resume_flow_run(waiting.id)
        next_tick(made, ended)  # it does not ask again for what a person has resumed
    run = made.ended(waiting.id)
    assert run.state.is_completed(), run.state.message
    assert "stays candidate" in run.state.message
    assert not made.suspended(), "a run of the schedule asked again for what a person had resumed"
    assert made.aliases("micro-s") == {"candidate": champion + 1, "champion": champion}
