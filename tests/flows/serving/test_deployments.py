"""Deployments as their users have them: forms, runs on workers, what a run's page shows, and runs that are killed."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from micro import LIMIT_SECONDS, Run
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.exceptions import PrefectHTTPStatusError
from progress import steps_in
from served import Elastified, Served, assert_made, eventually, kill

from flows.commands.recipes import load_recipe
from flows.serving import serve
from flows.serving.deployments import deployments
from flows.serving.schedule import Schedule

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[3]
RATE = "stages.1.optimizer.learning_rate"


def stored(client: SyncPrefectClient) -> dict[str, Any]:
    """What the server holds of each deployment and automation, without what differs each time it is written."""
    flows = {flow.id: flow.name for flow in client.read_flows()}
    wanted = {
        "entrypoint",
        "parameters",
        "work_pool_name",
        "job_variables",
        "description",
        "parameter_openapi_schema",
        "enforce_parameter_schema",
        "global_concurrency_limit",
        "concurrency_options",
        "pull_steps",
        "tags",
    }
    found = {}
    for deployment in client.read_deployments():
        held = json.loads(deployment.model_dump_json(include=wanted))
        limit = held.pop("global_concurrency_limit")
        schedules = [schedule.schedule.cron for schedule in deployment.schedules]
        held |= {"limit": limit["limit"] if limit else None, "schedules": schedules}
        held["pull_steps"] = held["pull_steps"] or []
        form = held["parameter_openapi_schema"]  # `elastic up` knows the recipes at hand and the budgets of its own
        form["properties"].get("recipe", {}).pop("enum", None)
        form.get("definitions", {}).get("Stage", {"properties": {"budgets": {}}})["properties"]["budgets"].pop(
            "properties", None
        )
        found[f"{flows[deployment.flow_id]}/{deployment.name}"] = held
    for automation in client.read_automations():
        held = json.loads(automation.model_dump_json(include={"trigger", "actions"}))
        held["trigger"].pop("id", None)
        for action in held["actions"]:
            action.pop("deployment_id", None)
        found[automation.name] = held
    return found


def prefect(served: Served, *arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    environment = os.environ | served.environment()
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prefect_yaml_says_what_elastic_up_applies(served: Served):
    recipe = load_recipe(Path("tiny"))
    apply = [sys.executable, "-m", "flows.serving.deployments", "tiny"]
    subprocess.run(apply, env=os.environ | served.environment(), cwd=ROOT, check=True, timeout=LIMIT_SECONDS)
    with served.prefect() as client:
        before = stored(client)
        assert before["retrain/tiny"]["schedules"] == []  # nothing is retrained that nobody asked for
        for deployment in deployments(recipe):
            client.delete_deployment(client.read_deployment_by_name(full_name(before, deployment.entrypoint)).id)
        prefect(served, "deploy", "--all", "--prefect-file", "infra/prefect.yaml")
        after = stored(client)
    assert after == before


@pytest.mark.slow
def test_a_schedule_of_before_stays_and_is_told_of_until_it_is_taken_away(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for variable, value in served.environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(ROOT)

    def after(schedule: str | None) -> tuple[list[str], str]:
        """The schedules of the family then, and what the user was told of it."""
        plan = Schedule(cron=schedule, max_gpu_hours=None if schedule in (None, "none") else 0.5)
        serve.deploy(tmp_path, Path("tiny"), plan, fresh=False)
        told = [line for line in capsys.readouterr().out.splitlines() if "retrain/tiny" in line]
        with served.prefect() as client:
            return stored(client)["retrain/tiny"]["schedules"], "\n".join(told)

    nightly = "0 3 * * *"
    assert after(nightly) == ([nightly], "")
    with served.prefect() as client:
        retrain = client.read_deployment_by_name("retrain/tiny").id
        client.pause_deployment(retrain)
        assert after(None) == ([nightly], "")  # it trains no more, so nobody is told that it does
        assert client.read_deployment(retrain).paused
        client.resume_deployment(retrain)
    kept, told = after(None)
    assert kept == [nightly] and nightly in told and "`elastic up RECIPE --schedule none`" in told
    assert "up to 0.5 GPU-hours" in told  # as does its ceiling
    assert after("none") == ([], "")
    assert after(None) == ([], "")


def full_name(held: dict[str, Any], entrypoint: str) -> str:
    (name,) = [name for name, one in held.items() if one.get("entrypoint") == entrypoint and "/micro" not in name]
    return name


@pytest.mark.parametrize(
    "name",
    [
        "elastify/micro",
        "elastify/micro-whole-recipe",
        "retrain/micro",
        "export/any-family",
        "evaluate/any-model",
        "gpu-step/gpu",
    ],
)
def test_a_form_says_what_each_parameter_is_and_has_settings_by_the_names_and_in_the_order_of_recipes(
    served: Served, name: str
):
    with served.prefect() as client:
        schema = client.read_deployment_by_name(name).parameter_openapi_schema
    definitions = schema.get("definitions", {})
    with_null = re.findall(r'"anyOf": \[[^]]*"null"[^]]*\], "default": (\w+)', json.dumps(schema))
    assert "null" not in with_null, "what may be unset is left empty"
    assert all(definition["description"] for definition in definitions.values())
    for parameter in schema["properties"].values():
        assert "description" in parameter or parameter["$ref"].rpartition("/")[2] in definitions
    for definition in definitions.values():
        for position, (key, shown) in enumerate(definition["properties"].items()):
            assert (shown["title"], shown["position"]) == (key, position)


@pytest.mark.parametrize("name", ["elastify/micro-whole-recipe", "retrain/micro"])
def test_a_form_has_a_box_for_the_share_of_each_budget_and_takes_others(served: Served, name: str):
    with served.prefect() as client:
        schema = client.read_deployment_by_name(name).parameter_openapi_schema
    shares = schema["definitions"]["Stage"]["properties"]["budgets"]
    boxes = sorted(shares["properties"].values(), key=lambda box: box["position"])
    assert [(box["title"], box["type"]) for box in boxes] == [("l", "number"), ("m", "number"), ("s", "number")]
    assert shares["additionalProperties"] == {"type": "number"}


def test_the_first_form_offers_the_recipes_at_hand_and_asks_for_changes(served: Served):
    with served.prefect() as client:
        found = client.read_deployment_by_name("elastify/micro")
    assert found.parameters == {"recipe": "micro", "changes": []}
    assert {"micro", "tiny", "nano-12b"} <= set(found.parameter_openapi_schema["properties"]["recipe"]["enum"])
    with pytest.raises(PrefectHTTPStatusError, match="409"):
        served.start("elastify/micro", recipe="nobodys")


def test_what_invites_nobody_says_so(served: Served):
    with served.prefect() as client:
        assert client.read_deployment_by_name("gpu-step/gpu").description.startswith("Not to be run by hand")


def with_value(recipe: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    inner: Any = recipe
    for part in parents:
        inner = inner[int(part)] if part.isdigit() else inner[part]
    inner[last] = value
    return recipe


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("seed", True, "True is not of type 'integer'"),
        ("stages.0.steps", "many", "is not of type 'integer'"),
        ("stages.0.stps", 3, "'stps' was unexpected"),
        ("dtype", "float8", "'float8' is not one of"),
    ],
    ids=["bool", "text", "unknown", "choice"],
)
def test_a_value_of_the_wrong_kind_is_refused_before_a_run_exists(served: Served, path: str, value: Any, text: str):
    with pytest.raises(PrefectHTTPStatusError, match="409") as refusal:
        served.start("elastify/micro-whole-recipe", recipe=with_value(served.recipe(), path, value))
    assert text in str(refusal.value)


def test_a_value_that_the_recipe_refuses_fails_the_run_with_its_line(served: Served):
    run = served.ended(
        served.start("elastify/micro-whole-recipe", recipe=with_value(served.recipe(), "stages.0.micro_batch_size", 4))
    )
    assert run.state.is_failed()
    assert "batch_size=6 is not a multiple of micro_batch_size=4" in run.state.message


def test_a_failed_runs_page_says_which_step_why_and_what_to_do(served: Served):
    identity = served.start("elastify/micro", changes=["data.sources.0.path=/nowhere/stories.jsonl"])
    run = served.ended(identity)
    assert run.state.is_failed() and "/nowhere/stories.jsonl" in run.state.message
    text = served.artifacts(identity)["failure"].data
    assert "before the first step" in text and "/nowhere/stories.jsonl" in text and "Correct what is named" in text


def test_a_run_whose_process_is_killed_is_run_again_and_ends_in_the_weights_of_elastic_run(
    served: Served, elastified: Elastified, finished: Run
):
    assert served.run(elastified.killed).state.is_crashed()
    assert_made(served, elastified.run, finished)


def test_progress_moves_on_the_page_while_a_worker_distils(elastified: Elastified):
    shares = elastified.progress
    assert shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 100


def test_the_page_has_the_table_and_the_plots(served: Served, elastified: Elastified):
    shown = served.artifacts(elastified.run)
    assert "| budget | parameters |" in shown["family-micro"].data
    for plot in ("quality", "loss", "router", "storage"):
        artifact = shown[f"family-micro-{plot}"]
        assert artifact.type == "image" and str(artifact.data).startswith("data:image/png;base64,")


def test_names_and_tags_tell_families_versions_and_steps_apart(served: Served, elastified: Elastified):
    run = served.run(elastified.run)
    assert re.fullmatch(r"micro \d{4}-\d\d-\d\d v1", run.name) and {"micro", "v1"} <= set(run.tags)
    assert re.fullmatch(r"micro \d{4}-\d\d-\d\d \d\d:\d\d", served.run(elastified.killed).name)
    said = run.state.message
    assert said.startswith("micro v1 is champion, there was no champion yet; held-out loss l ")
    with served.prefect() as client:
        own = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
        steps = [task.name for task in client.read_task_runs(flow_run_filter=own)]
    assert {"distil stage1", "distil stage2", "slice m", "rank importance", "register"} <= set(steps)
    tags = {step.name: set(step.tags) for step in served.runs("gpu-step")}
    assert {"micro", "stage2"} <= tags["distil stage2"] and "micro" in tags["evaluate"]
    mlflow = served.mlflow("runs/get", run_id=served.mlflow_run("micro-s"))["run"]
    assert mlflow["info"]["run_name"] == run.name


def test_the_page_has_the_lines_of_our_steps(served: Served, elastified: Elastified):
    said = "\n".join(served.log(elastified.run))
    for step in (
        f"{'train tokenizer':<26}  cached",
        "distil stage2  ",
        "register  ",
        "evaluate waits for a worker, as run ",
    ):
        assert step in said


def test_prefect_and_mlflow_lead_to_each_other_and_to_the_registered_versions(served: Served, elastified: Elastified):
    page = f"{served.services()['Prefect'].where}/runs/flow-run/{elastified.run}"
    version = served.mlflow("model-versions/get", name="micro-s", version="1")["model_version"]
    assert {"key": "elastic.prefect_run", "value": page} in version["tags"]
    run = served.mlflow("runs/get", run_id=version["run_id"])["run"]
    assert run["info"]["status"] == "FINISHED"
    tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
    assert tags["elastic.prefect_run"] == page
    assert page in tags["mlflow.note.content"] and "micro-s:1" in tags["mlflow.note.content"]
    shown = served.artifacts(elastified.run)
    address = f"{served.services()['MLflow'].where}/#/experiments/{run['info']['experiment_id']}/runs/"
    assert f"{address}{version['run_id']}" in shown["mlflow-run"].data
    assert f"{address}{version['run_id']}" in shown["family-micro"].data
    assert "/#/models/micro-s/versions/1" in shown["family-micro"].data


def test_a_run_beside_elastic_up_uses_its_servers_and_its_cache(served: Served, elastified: Elastified):
    before = len(served.runs("elastify"))
    done = served.command.run()
    assert done.returncode == 0, done.stderr
    assert "micro-s:1" in done.stdout and ("distil stage2", True) in steps_in(done.stderr)
    assert len(served.runs("elastify")) == before + 1


@pytest.mark.slow
def test_a_registered_family_is_exported_to_another_size(served: Served, elastified: Elastified):
    run = served.ended(served.start("export/any-family", model="micro-l", budget={"name": "xs", "params": 18000}))
    assert run.state.is_completed(), run.state.message
    version = served.mlflow("model-versions/get", name="micro-xs", version="1")["model_version"]
    tags = {tag["key"]: tag["value"] for tag in version["tags"]}
    assert 14000 < int(tags["elastic.params"]) <= 18000
    assert served.aliases("micro-xs") == {"candidate": 1}
    pulled = served.command("pull", "micro-xs@candidate", "-o", str(served.home / "pulled"))
    assert pulled.returncode == 0 and f"{int(tags['elastic.params']):,} parameters" in pulled.stdout


@pytest.mark.slow
def test_a_registered_model_is_measured_as_it_was_after_training(served: Served, elastified: Elastified):
    recipe = served.recipe()
    identity = served.start("evaluate/any-model", model="micro-s", data=recipe["data"], settings=recipe["evaluation"])
    run = served.ended(identity)
    assert run.state.is_completed(), run.state.message
    version = served.mlflow("model-versions/get", name="micro-s", version="1")["model_version"]
    registered = {tag["key"]: tag["value"] for tag in version["tags"]}["metric.cross_entropy"]
    assert f"{float(registered):.4f}" in served.artifacts(identity)["evaluation-micro-s"].data


@pytest.mark.slow
def test_two_runs_at_once_never_train_together_though_the_server_is_killed(served: Served, elastified: Elastified):
    rates = (0.002, 0.003)  # what comes before the second stage is in the cache; its steps outlast a slow start
    with most_trainers(served) as most:
        both = [served.start("elastify/micro", changes=["stages.1.steps=100", f"{RATE}={rate}"]) for rate in rates]
        eventually(lambda: served.step("distil stage2"), "distillation does not begin")
        eventually(lambda: len(served.waiting("gpu")) > 0, "the other run does not wait for the GPU")
        assert served.step("distil stage2"), "too short to be interrupted"
        kill(served.services()["Prefect"].pid)
        eventually(lambda: served.command("status").returncode == 0)
        for identity in both:
            run = served.ended(identity)
            assert run.state.is_completed(), run.state.message
    assert most == [1]


@contextmanager
def most_trainers(served: Served) -> Iterator[list[int]]:
    """The greatest number of trainings that ran at once during the block; nothing where there was none."""
    most: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            count = len(served.trainers())
            if count and (not most or count > most[0]):
                most[:] = [count]
            time.sleep(0.1)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()
