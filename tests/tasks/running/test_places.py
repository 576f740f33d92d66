"""Laws of steps that need a GPU: who does them, under which key, what is refused before, and how the wait may end."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from elastic_core.files.locks import is_held
from elastic_core.recipe import Recipe
from flows.commands.recipes import load_recipe, recipe_file
from tasks.running import gpu_pool, places, ray_cluster, ray_steps, steps
from tasks.running.asked import Asked, device_of_run
from tasks.running.gpu_pool import GpuPool
from tasks.running.preflight import check_cluster
from tasks.running.ray_cluster import Host, RayCluster
from tasks.running.ray_steps import Doing
from tasks.settings import BUCKET, EMBEDDED, HOME, PREFECT_API, TRACKING_URI, WORKSPACE, ServiceError

ADDRESS = "10.77.0.11:6379"
SHARED = {
    BUCKET: "models",
    WORKSPACE: "s3://models/workspace",
    TRACKING_URI: "http://mlflow:5000",
    PREFECT_API: "http://prefect:4200/api",
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, Asked]]:
    """Who was asked for a step, and how; each says that it failed."""
    found: list[tuple[Any, Asked]] = []

    def refuse(place: Any, step: Asked) -> None:
        found.append((place, step))
        raise ServiceError("the step failed on the worker")

    monkeypatch.setenv(HOME, str(tmp_path))
    for place in (GpuPool, RayCluster):
        monkeypatch.setattr(place, "do", refuse)
    monkeypatch.setattr(RayCluster, "device", lambda cluster: "workers of Ray: GPU")
    monkeypatch.setattr(steps, "_known", lambda *arguments, **named: None)
    return found


@steps.step("learn from {seed}", on_gpu=True)
def learn_on_gpu(seed: int) -> int:
    return seed


@steps.step()
def count_here(seed: int) -> int:
    return seed


def ask() -> None:
    with pytest.raises(ServiceError, match="failed on the worker"), steps._turn(learn_on_gpu, {"seed": 1}):
        pass


def test_a_step_is_done_where_the_environment_says_and_a_cluster_counts_before_a_pool(
    asked: list[tuple[Any, Asked]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with steps._turn(learn_on_gpu, {"seed": 1}) as done_elsewhere:
        assert not done_elsewhere and not asked
    monkeypatch.setenv(gpu_pool.DEPLOYMENT_VARIABLE, "gpu-step/gpu")
    ask()
    monkeypatch.setenv(ray_cluster.ADDRESS_VARIABLE, ADDRESS)
    ask()
    assert [place for place, _ in asked] == [GpuPool("gpu-step/gpu"), RayCluster(ADDRESS)]
    assert {step.title for _, step in asked} == {"learn from 1"}
    assert [step.device for _, step in asked] == ["workers of gpu-step/gpu", "workers of Ray: GPU"]
    assert len({step.key for _, step in asked}) == 2, "the device is a part of the key"


def test_a_step_that_needs_no_gpu_is_done_here(asked: list[tuple[Any, Asked]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ray_cluster.ADDRESS_VARIABLE, ADDRESS)
    with steps._turn(count_here, {"seed": 1}) as done_elsewhere:
        assert not done_elsewhere
    assert not asked


@pytest.mark.parametrize("variable", [gpu_pool.DEPLOYMENT_VARIABLE, ray_cluster.ADDRESS_VARIABLE])
def test_a_step_that_is_done_for_another_run_is_done_here_under_the_key_that_the_other_looks_for(
    variable: str, asked: list[tuple[Any, Asked]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "there")
    wanted = steps.MAKINGS["learn_on_gpu"]({"seed": 1})
    token = device_of_run.set(wanted.device)
    try:
        with steps._turn(learn_on_gpu, {"seed": 1}) as done_elsewhere:
            assert not done_elsewhere
        assert steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key == wanted.key
    finally:
        device_of_run.reset(token)
    assert not asked


def test_workers_that_elastic_up_started_share_results_with_runs_of_their_machine(monkeypatch, asked) -> None:
    monkeypatch.setenv(gpu_pool.DEPLOYMENT_VARIABLE, "gpu-step/gpu")
    by_name = steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key
    monkeypatch.setenv(gpu_pool.DEVICE_VARIABLE, places.this_device())
    on_workers = steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key
    monkeypatch.delenv(gpu_pool.DEPLOYMENT_VARIABLE)
    assert steps.MAKINGS["learn_on_gpu"]({"seed": 1}).key == on_workers != by_name


def test_a_step_inside_a_step_that_has_the_devices_has_them_too(tmp_path: Path) -> None:
    with places.device_to_oneself(tmp_path), places.device_to_oneself(tmp_path):
        (lock,) = (tmp_path / "locks").iterdir()
        assert is_held(lock)
    assert not is_held(lock)
    with places.device_to_oneself(tmp_path):
        assert is_held(lock), "once more, for the next step"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({WORKSPACE: ""}, rf"{WORKSPACE} is not set, and with RAY_ADDRESS .*; set {WORKSPACE}=s3://bucket/prefix"),
        ({PREFECT_API: ""}, rf"set {PREFECT_API} to a server that all hosts reach"),
        ({TRACKING_URI: "sqlite:////x/mlflow.db"}, rf"set {TRACKING_URI} to a server that all hosts reach"),
        ({EMBEDDED: f'{{"{PREFECT_API}": "prefect.log"}}'}, rf"set {PREFECT_API} to a server that all hosts reach"),
        ({BUCKET: ""}, rf"{BUCKET} is not set"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_that_could_not_share_with_a_clusters_hosts_is_refused_before_ray_is_asked(
    changed: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**SHARED, ray_cluster.ADDRESS_VARIABLE: ADDRESS, **changed}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=says):
        check_cluster(load_recipe(recipe_file(Path("tiny")), ()))


@pytest.mark.parametrize(
    ("address", "fault", "says"),
    [
        ("ray://head:10001", ValueError, r"RAY_ADDRESS='ray://head:10001' is not HOST:PORT"),
        ("127.0.0.1:1", ServiceError, r"no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 \(.*refused"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, fault: type[Exception], says: str) -> None:
    with pytest.raises(fault, match=says):
        ray_cluster._check_address(address)


@pytest.mark.parametrize(
    ("nodes", "wanted", "device"),
    [
        (
            [
                {"CPU": 8.0},
                {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H100": 1.0},
                {"GPU": 8.0, "accelerator_type:B200": 1.0},
                {"GPU": 4.0, "accelerator_type:A100": 1.0},
            ],
            {"GPU": 8.0},
            "workers of Ray: GPU",
        ),
        ([{}, {"CPU": 2.0}, {"CPU": 4.0}], {"CPU": 4.0}, "workers of Ray: CPU"),
    ],
    ids=["GPUs", "CPUs"],
)
def test_a_step_has_a_node_of_the_largest_kind_to_itself(
    nodes: list[dict[str, float]], wanted: dict[str, float], device: str
) -> None:
    found = ray_cluster._nodes_for_steps([{"Resources": there} for there in nodes])
    assert (found.node, found.device) == (wanted, device)
    with pytest.raises(ServiceError, match="neither GPUs nor CPUs for tasks"):
        ray_cluster._nodes_for_steps([{"Resources": {}}])


def test_a_step_waits_for_a_node_like_those_that_were_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray()
    monkeypatch.setattr(ray_cluster, "connected", lambda address: ray)
    ray_cluster.first_seen.cache_clear()
    assert ray_cluster.first_seen(ADDRESS).node == {"CPU": 4.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    assert ray_cluster.first_seen(ADDRESS).node == {"CPU": 4.0}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the cluster of the environment have these hosts."""
    monkeypatch.setenv(ray_cluster.ADDRESS_VARIABLE, ADDRESS)

    def has(*hosts: Host) -> None:
        monkeypatch.setattr(RayCluster, "hosts", lambda cluster, steps, files: [*hosts])

    return has


def host(gpus: int = 8, memory: int = 80 * 10**9, fault: str = "") -> Host:
    return Host(name="h1", gpus=gpus, gpu="H100", gpu_memory=memory, fault=fault)


def nano(*changes: str) -> Recipe:
    return load_recipe(recipe_file(Path("nano-12b")), changes)


def test_a_host_that_could_not_do_the_steps_is_named_before_the_first(cluster: Callable[[Host], None]) -> None:
    cluster(host(fault="torch was 2.13.0 and is 2.11.0"))
    with pytest.raises(ValueError, match=rf"^h1, a host of the Ray cluster at {ADDRESS}, cannot work: torch was"):
        check_cluster(nano())


def test_hosts_without_a_gpu_are_left_what_they_can_do(cluster: Callable[[Host], None]) -> None:
    cluster(host(gpus=0))
    assert check_cluster(load_recipe(recipe_file(Path("tiny")), ())).words.endswith("has 1 host without a GPU")
    with pytest.raises(ValueError, match=r"no host of .* has a GPU, and by its plan nano takes [\d,]{4,} hours of one"):
        check_cluster(nano())


def test_a_host_whose_pytorch_does_not_see_the_gpus_that_ray_has_is_at_fault() -> None:
    assert ray_cluster._with_its_gpus(host(gpus=8), 8) == host(gpus=8)
    assert ray_cluster._with_its_gpus(host(gpus=0), 0).fault == ""
    assert ray_cluster._with_its_gpus(host(gpus=0), 8).fault.startswith("PyTorch sees 0 of its 8 GPUs")
    assert ray_cluster._with_its_gpus(host(gpus=0, fault="torch was 2.13.0"), 8).fault == "torch was 2.13.0"


def test_a_host_without_a_file_of_the_users_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in SHARED.items():
        monkeypatch.setenv(name, value)
    assert ray_cluster.fault_of_host({}, [str(tmp_path)], SHARED[WORKSPACE]) == ""
    fault = ray_cluster.fault_of_host({}, [str(tmp_path), str(tmp_path / "problems.jsonl")], SHARED[WORKSPACE])
    assert fault.startswith(f"it has no {tmp_path}/problems.jsonl; put it there")
    fault = ray_cluster.fault_of_host({}, [], "s3://models/another")
    assert (
        fault == f"its {WORKSPACE} is s3://models/workspace, and that of the run is s3://models/another; set the same"
    )


def test_a_stage_that_does_not_fit_on_the_cluster_is_refused_before_the_first_step_in_words_on_what_would_fit(
    cluster: Callable[..., None],
) -> None:
    cluster(host())
    assert "8 x H100 of 74.506 GiB, on which every stage fits" in check_cluster(nano()).words
    with pytest.raises(ValueError, match=r"on 8 GPUs: 8\d\.\d GB are needed and 75\.2 GB are there\. It fits with "):
        check_cluster(nano("stages.1.offload=false"))
    cluster(host(gpus=1))
    with pytest.raises(ValueError, match=r"on 1 GPU: .* are needed .* The cluster has 1 host of 1 GPU\."):
        check_cluster(nano())


def test_a_stage_that_does_not_fit_on_one_host_has_as_many_as_it_needs(cluster: Callable[..., None]) -> None:
    recipe = nano("stages.1.offload=false", "stages.1.sharding=full")
    cluster(host(), host())
    assert check_cluster(recipe).least_nodes == {"stage1": 1, "stage2": 2}
    cluster(host(), host(), host(), host())
    assert check_cluster(recipe).least_nodes == {"stage1": 1, "stage2": 2}
    assert check_cluster(nano()).least_nodes == {"stage1": 1, "stage2": 1}


class Ray:
    """A stand-in for the module: its tasks end as the `ends` say in turn, those that are exceptions by raising them."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})
        TaskCancelledError = type("TaskCancelledError", (RayError,), {})
        OutOfMemoryError = type("OutOfMemoryError", (RayError,), {})

    def __init__(self, *ends: BaseException | None) -> None:
        self.ends = list(ends)
        self.asked: list[Any] = []
        self.cancelled: list[str] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 4.0}}]

    def remote(self, function: Any) -> Any:
        return SimpleNamespace(
            options=lambda **options: self.asked.append(options) or SimpleNamespace(remote=self._begin)
        )

    def _begin(self, *arguments: object) -> str:
        return "task"

    def get(self, task: str) -> None:
        if (end := self.ends.pop(0)) is not None:
            raise end

    def cancel(self, task: str) -> None:
        self.cancelled.append(task)


ASKED = Asked(
    step="distill", module="tasks.distill", title="distil stage1", inputs={}, key="0" * 64, runs={}, device=""
)


def on_a_cluster(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> Doing:
    """The actor that has the step done, once it did."""
    monkeypatch.setattr(ray_steps, "connected", lambda address: ray)
    doing = Doing(ADDRESS, {"CPU": 4.0})
    doing._have_done(ASKED)
    return doing


def test_the_step_of_a_lost_host_is_asked_for_again_and_said_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost = Ray.exceptions.RayError("The node died.\nlong story")
    ray = Ray(lost, lost, None)
    on_a_cluster(ray, monkeypatch)
    assert not ray.ends
    assert ray.asked[0]["name"] == "distil stage1" and ray.asked[0]["num_cpus"] == 4.0
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [f"distil stage1: its host was lost (attempt {n} of 5): The node died." for n in (1, 2)]
    with pytest.raises(ServiceError, match="distil stage1 lost its host 5 times"):
        on_a_cluster(Ray(*[lost] * 5), monkeypatch)


def test_a_step_that_fails_is_not_asked_for_again_and_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Ray.exceptions.RayTaskError("ray::distil()\n  File x.py, line 3")
    failed.cause = ServiceError("distill failed on h2: the loss is not finite")  # type: ignore[attr-defined]
    with pytest.raises(ServiceError, match=r"^distill failed on h2: the loss is not finite$"):
        on_a_cluster(Ray(failed), monkeypatch)
    failed.cause = RuntimeError("long story\nModuleNotFoundError: No module named 'tasks'")  # type: ignore[attr-defined]
    with pytest.raises(
        ServiceError, match=rf"^distil stage1 cannot be done on the Ray cluster at {ADDRESS}: ModuleNotFound"
    ):
        on_a_cluster(Ray(failed), monkeypatch)


def test_the_last_one_who_leaves_a_step_cancels_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(None)
    doing, first, second = on_a_cluster(ray, monkeypatch), uuid4(), uuid4()
    assert doing.ask("a run", first) == doing.ask("another", second) == first, "whose page has the progress"
    assert not doing.leave("a run") and not ray.cancelled
    assert doing.leave("another") and ray.cancelled == ["task"]


def test_one_who_was_killed_does_not_keep_a_step_going(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(None)
    doing = on_a_cluster(ray, monkeypatch)
    doing.ask("killed", None)
    monkeypatch.setattr(ray_steps, "GONE_SECONDS", 0.0)
    doing.ask("another", None)
    assert doing.leave("another") and ray.cancelled == ["task"]


def test_who_joins_a_step_sees_all_that_was_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    doing = on_a_cluster(Ray(Ray.exceptions.RayError("The node died."), None), monkeypatch)
    lines = [line for _, line in doing.look("late", 0)]
    assert lines[0].startswith("distil stage1 waits for a node") and lines[1].startswith(
        "distil stage1: its host was lost"
    )
    assert doing.look("late", len(lines)) == []


def test_a_step_that_takes_all_the_memory_of_its_host_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(Ray.exceptions.OutOfMemoryError("Task was killed: 95 % of 80 GB is used.\nlong story"), None)
    with pytest.raises(
        ServiceError, match=r"^distil stage1 took all the memory of its host, .*: Task was killed: 95 % of"
    ):
        on_a_cluster(ray, monkeypatch)
    assert len(ray.ends) == 1
