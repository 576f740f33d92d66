"""Laws of a stage on several nodes: on how many, where they meet, what one end means for all, and who is lost."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from trainee import STAGE, train_job

from elastic_core.schema import to_dict
from elastic_core.training.faults import Fault
from tasks.records import Artifact
from tasks.running import ray_nodes, training
from tasks.running.asked import Asked
from tasks.running.nodes import ALONE, End, Meeting, NodeLost, nodes_for, of_all
from tasks.running.ray_nodes import RayNodes, Storing
from tasks.running.ray_steps import count_of_nodes
from tasks.settings import HOME, ServiceError

ASKED = Asked(step="distill", module="tasks.distill", title="distil it", inputs={}, key="0" * 64, runs={}, device="")


@pytest.mark.parametrize(
    ("nodes", "gpus", "budget_rows", "trains_on"),
    [
        (1, 8, None, 1),
        (2, 8, None, 2),
        (5, 8, None, 3),  # of 48 micro-batches 32 processes run none alike
        (6, 8, None, 6),
        (6, 8, 8, 1),  # the rows that share a budget are those of one node
        (3, 0, None, 3),
        (3, 5, None, 1),
    ],
)
def test_a_stage_trains_on_as_many_nodes_as_its_batch_divides_among(
    nodes: int, gpus: int, budget_rows: int | None, trains_on: int
) -> None:
    stage = replace(STAGE, batch_size=96, micro_batch_size=2, budget_rows=budget_rows)
    assert nodes_for(stage, nodes, gpus) == trains_on


def test_a_stage_waits_for_the_nodes_that_it_needs_and_another_step_has_one() -> None:
    stage = to_dict(replace(STAGE, batch_size=32, micro_batch_size=1))
    assert count_of_nodes({"stage": stage, "least_nodes": 2}, nodes=4, gpus=8) == 4
    assert count_of_nodes({"stage": stage, "least_nodes": 2}, nodes=1, gpus=8) == 2
    assert count_of_nodes({"stage": stage}, nodes=4, gpus=8) == 1


def test_launchers_meet_at_the_first_node() -> None:
    assert ALONE.arguments == ["--standalone"]
    assert Meeting(nodes=3, number=1, address="10.0.0.1", port=20_001).arguments == [
        *("--nnodes=3", "--node-rank=1"),
        *("--master-addr=10.0.0.1", "--master-port=20001", "--rdzv-conf=timeout=86400"),
    ]


LOST_PEER = Fault(kind="collective", message="RuntimeError: gloo: connection closed by peer")
OWN = Fault(kind="own", message="the loss is not finite", checked=True)


def end(fault: Fault | None, exits: dict[str, int], last_step: int = -1) -> End:
    return End(fault=fault, exits=exits, code=1, last_step=last_step, said="")


@pytest.mark.parametrize(
    ("elsewhere", "may_pass", "text"),
    [
        (end(None, {"4": -9}), True, "process 4 was killed (SIGKILL)"),
        (end(OWN, {"4": 2}), False, "the loss is not finite"),
        (end(LOST_PEER, {"4": 2}), True, LOST_PEER.message),
    ],
    ids=["killed", "own", "collective"],
)
def test_the_cause_on_one_node_is_that_of_all(elsewhere: End, may_pass: bool, text: str) -> None:
    """The first node itself only lost a peer, after step 7."""
    whole = of_all([end(LOST_PEER, {"0": 2}, last_step=7), elsewhere])
    assert (whole.may_pass, whole.text(), whole.last_step) == (may_pass, text, 7)
    assert whole.exits == {"0": 2, **elsewhere.exits}


def test_a_job_has_the_paths_of_each_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    before = [Artifact(path=f"/first/{name}", digest=name, files={}) for name in ("family", "corpus")]
    after = [replace(artifact, path=f"/cache/{artifact.digest}") for artifact in before]
    first = train_job(Path("/first/family"), Path("/first/corpus/train.safetensors"), tmp_path / "stage1-0123")
    own = ray_nodes._on_this_node(first, before, after)
    assert (own.student, own.teacher, own.tokens) == (*["/cache/family"] * 2, "/cache/corpus/train.safetensors")
    assert own.work == str(tmp_path / "home/workspace/stage1-0123") and own.output == f"{own.work}/family"


class Ray:
    """A stand-in for the module: a run is what it ends with, or raises, and None while it goes on."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})

    def wait(self, runs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return [run for run in runs if run.ends], [run for run in runs if not run.ends]

    def get(self, run: Any, timeout: float = 0.0) -> Any:
        if isinstance(run, list):
            return [self.get(each) for each in run]
        if not run.ends:
            raise TimeoutError("it does not answer")
        if isinstance(run.result, Exception):
            raise run.result
        return run.result


def ended(result: Any) -> SimpleNamespace:
    return SimpleNamespace(ends=True, result=result)


GOES_ON = SimpleNamespace(ends=False, result=None)


def nodes_that(*runs: SimpleNamespace) -> tuple[RayNodes, list[Mock]]:
    nodes = RayNodes(Ray(), SimpleNamespace(bundle_specs=[{"CPU": 1.0}]), ASKED, None)
    nodes._runs, nodes._nodes = list(runs), [Mock() for _ in runs]
    return nodes, nodes._nodes


def test_a_failure_on_one_node_ends_all_when_they_have_had_time_to_end_by_themselves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(ray_nodes, "time", SimpleNamespace(monotonic=lambda: now[0]))
    nodes, _ = nodes_that(ended(None), GOES_ON)
    assert not nodes.ended(), "one has done its part"
    for failure in (end(OWN, {"1": 2}), Ray.exceptions.RayError("the node died")):
        nodes, _ = nodes_that(ended(failure), GOES_ON)
        assert not nodes.ended()
        now[0] += ray_nodes.LAST_SECONDS + 1
        assert nodes.ended()


def test_nodes_that_do_not_end_by_themselves_are_told_to_and_one_that_does_not_answer_is_lost() -> None:
    failed = end(OWN, {"1": 2})
    nodes, actors = nodes_that(ended(failed), GOES_ON)
    with pytest.raises(NodeLost, match=r"^distil it lost one of its 3 nodes: it does not answer$"):
        nodes.ends()
    assert [actor.stop.remote.called for actor in actors] == [False, True]
    nodes, _ = nodes_that(ended(failed), ended(None))
    assert nodes.ends() == [failed]


def test_a_node_that_is_gone_is_lost_and_what_a_node_could_not_do_is_said() -> None:
    nodes, _ = nodes_that(ended(Ray.exceptions.RayError("The node died.\nlong story")))
    with pytest.raises(NodeLost, match=r"^distil it lost one of its 2 nodes: The node died\.$"):
        nodes.ends()
    refused = Ray.exceptions.RayTaskError("ray::run()")
    refused.cause = ServiceError("h2 cannot train with the others: torch was 2.13.0 and is 2.11.0")  # type: ignore[attr-defined]
    nodes, _ = nodes_that(ended(refused))
    with pytest.raises(ServiceError, match=r"^h2 cannot train with the others: torch was"):
        nodes.ends()


@pytest.mark.parametrize(
    ("answers", "is_done"),
    [
        ([ended(True), ended(True)], True),
        ([ended(True), ended(False)], False),
        ([ended(True), GOES_ON], None),
        ([ended(Ray.exceptions.RayError("the node died"))], False),
    ],
    ids=["all", "gone", "not yet", "lost"],
)
def test_a_checkpoint_is_stored_when_every_node_has_stored_its_files(answers: list[Any], is_done: bool | None) -> None:
    assert Storing(Ray(), answers).done(0.0) is is_done


def test_what_a_node_was_told_reaches_its_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    process = SimpleNamespace(
        start=lambda command, **_: started.append(command),
        running=lambda: False,
        exit_code=lambda: 0,
        stop=lambda: None,
    )
    monkeypatch.setattr(training, "ChildProcess", lambda log: process)
    meeting = Meeting(nodes=2, number=1, address="10.0.0.1", port=20_001)
    job = train_job(tmp_path, tmp_path, tmp_path / "work")
    assert training.run_processes(job, 4, meeting, lambda: True) is None
    assert {*meeting.arguments, "--nproc-per-node=4"} <= {*started[0]}
