"""Laws of what a step runs: all of its code and nothing else, by what it does and not by how it looks."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tasks import data, distill, evaluate, rank, register, slice, teacher
from tasks.running import code, steps

STEPS = {
    step.name: step.fn
    for step in (
        teacher.fetch_teacher,
        teacher.train_tokenizer,
        teacher.pretrain_teacher,
        data.prepare_data,
        rank.rotate_teacher,
        rank.rank_importance,
        rank.reorder_teacher,
        distill.distill,
        slice.slice_budget,
        evaluate.measure_loss,
        evaluate.measure_answers,
        register.register,
    )
}
TRAIN = "elastic_core.training.train"
FINITE = "def _check_finite(metrics: StepMetrics) -> None:\n"


@pytest.fixture
def edit(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], None]]:
    """Changes the source of a module as `code` reads it."""
    read, edited = code._source, dict[str, str]()
    monkeypatch.setattr(code, "_source", lambda name: edited.get(name) or read(name))

    def change(module: str, old: str, new: str) -> None:
        source = edited.get(module) or read(module)
        assert old in source, old
        edited[module] = source.replace(old, new)
        forget()

    def forget() -> None:
        for known in (code._parsed, code.code_of, code.runs):
            known.cache_clear()

    yield change
    forget()


def test_a_changed_line_changes_the_way_of_every_step_that_runs_it_and_of_no_other(
    edit: Callable[[str, str, str], None],
) -> None:
    before = {name: steps.WAYS[name]() for name in STEPS}
    running = {name for name, function in STEPS.items() if TRAIN in code.code_of(function).modules}
    assert {"pretrain_teacher", "distill"} <= running < STEPS.keys()
    edit(TRAIN, FINITE, f"{FINITE}    assert metrics\n")
    assert {name for name in STEPS if steps.WAYS[name]() != before[name]} == running


def test_all_that_a_training_process_imports_of_ours_is_code_of_distill() -> None:
    program = "import elastic_core.training.job, json, sys; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(subprocess.check_output([sys.executable, "-c", program], text=True, cwd=Path.cwd()))
    ours = {name for name in loaded if name.partition(".")[0] in code.PACKAGES} - {*code.PLUMBING}
    assert TRAIN in ours
    assert ours <= code.code_of(STEPS["distill"]).modules.keys()


@pytest.mark.parametrize(
    ("step", "runs", "does_not"),
    [
        ("distill", ["elastic_core.model", "elastic_core.layers.ssm", TRAIN], ["tasks.corpus.build", "tasks.register"]),
        ("pretrain_teacher", [TRAIN], ["tasks.corpus.build", "elastic_core.importance"]),
        ("fetch_teacher", ["elastic_core.files.checkpoint"], [TRAIN, "elastic_core.model"]),
        ("train_tokenizer", ["tasks.corpus.tokenizer", "tasks.corpus.build"], ["elastic_core.model"]),
        ("prepare_data", ["tasks.corpus.build", "tasks.corpus.documents"], ["elastic_core.model"]),
        ("rotate_teacher", ["elastic_core.rotation"], ["elastic_core.importance"]),
        ("rank_importance", ["elastic_core.importance", "elastic_core.model"], ["elastic_core.files.slicing"]),
        ("slice_budget", ["elastic_core.files.slicing"], ["elastic_core.resolve", TRAIN]),
        ("measure_loss", ["elastic_core.layers.kernels"], ["elastic_core.generate", "tasks.corpus.problems"]),
        ("measure_answers", ["elastic_core.generate", "tasks.corpus.problems"], ["tasks.corpus.build", "tasks.rank"]),
        ("register", ["tasks.reporting.report", "tasks.reporting.plots"], ["elastic_core.importance"]),
    ],
)
def test_a_step_depends_on_the_modules_that_it_runs(step: str, runs: list[str], does_not: list[str]) -> None:
    modules = code.code_of(STEPS[step]).modules.keys()
    assert {*runs, f"{STEPS[step].__module__}.{step}"} <= modules
    assert not modules & {*does_not}
    assert not [name for name in modules if name.startswith(code.PLUMBING)]


@pytest.mark.parametrize("name", STEPS)
def test_the_libraries_that_a_step_imports_have_versions(name: str) -> None:
    versions = code.libraries(code.code_of(STEPS[name]).packages)
    assert "torch" in versions and all(versions.values())
    assert not versions.keys() & {"prefect", "mlflow", "boto3", "pytest", "rich"}


def test_comments_docstrings_and_layout_are_not_code(edit: Callable[[str, str, str], None]) -> None:
    before = code.code_of(STEPS["distill"])
    edit(TRAIN, "class _Tally:\n", "class _Tally:  # of a step\n\n\n")
    edit(TRAIN, '"""What a stage trains with.', '"""With what a stage trains.')
    edit(TRAIN, FINITE, f'{FINITE}    """New."""\n')
    assert code.code_of(STEPS["distill"]) == before


def test_one_changed_operator_is_another_step_for_those_that_run_it_alone(
    edit: Callable[[str, str, str], None],
) -> None:
    before = {name: code.runs(function) for name, function in STEPS.items()}
    edit(TRAIN, "loss.backward()", "(-loss).backward()")
    changed = {name for name, function in STEPS.items() if code.runs(function) != before[name]}
    assert {"distill", "pretrain_teacher"} <= changed
    assert not changed & {"fetch_teacher", "train_tokenizer", "prepare_data", "slice_budget"}
    assert code.differences(before["distill"], code.runs(STEPS["distill"])) == f"{TRAIN} changed"


def test_a_neighbour_of_a_step_in_its_module_is_not_its_code(edit: Callable[[str, str, str], None]) -> None:
    before = {name: code.code_of(STEPS[name]) for name in ("fetch_teacher", "pretrain_teacher")}
    edit("tasks.teacher", "kl_weight=0.0", "kl_weight=0.5")
    assert code.code_of(STEPS["fetch_teacher"]) == before["fetch_teacher"]
    assert code.code_of(STEPS["pretrain_teacher"]) != before["pretrain_teacher"]


def test_what_is_imported_for_type_checkers_alone_is_not_run(edit: Callable[[str, str, str], None]) -> None:
    before = code.code_of(STEPS["distill"]).modules.keys()
    edit(TRAIN, "class _Tally:", "if TYPE_CHECKING:\n    import tasks.promote\n\n\nclass _Tally:")
    assert code.code_of(STEPS["distill"]).modules.keys() == before
    edit(TRAIN, "if TYPE_CHECKING:\n", "if True:\n")
    assert "tasks.promote" in code.code_of(STEPS["distill"]).modules


def test_what_a_function_imports_when_it_is_called_is_run(edit: Callable[[str, str, str], None]) -> None:
    edit(TRAIN, FINITE, f"{FINITE}    import tasks.promote\n    from math_verify import parse\n")
    found = code.code_of(STEPS["distill"])
    assert "tasks.promote" in found.modules and "math_verify" in found.packages
    edit("tasks.distill", "    work = ", "    import tasks.race\n    work = ")
    assert "tasks.race" in code.code_of(STEPS["distill"]).modules
    for name, package in (("prepare_data", "datasets"), ("measure_answers", "transformers"), ("distill", "scipy")):
        assert package in code.libraries(code.code_of(STEPS[name]).packages)


def test_differences_are_one_line() -> None:
    before = {"torch": "2.13.0", "elastic_core.model": "a" * 64, "numpy": "1", "scipy": "1", "tasks.rank": "x"}
    now = {"torch": "2.14.0", "elastic_core.model": "b" * 64, "numpy": "2", "tasks.rank": "x", "datasets": "5"}
    assert code.differences(before, before) == ""
    assert code.differences(before, now) == (
        "datasets was not used and is 5, numpy was 1 and is 2, scipy was 1 and is not used and 2 more"
    )


def test_the_version_of_the_project_names_the_commit() -> None:
    commit = subprocess.check_output(["git", "rev-parse", "--short=12", "HEAD"], text=True).strip()
    assert code.project_version().removesuffix(".dirty").endswith(f"+g{commit}")


def test_a_commit_is_dirty_where_a_package_differs_and_not_where_results_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe, rows = (
        tmp_path / name for name in ("tasks/race.py", "flows/recipes/tiny.yaml", "infra/race.jsonl")
    )
    for path in (source, recipe, rows):
        path.parent.mkdir(parents=True)
        path.write_text("")
    as_somebody = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    for asked in (("init", "--quiet"), ("add", "."), (*as_somebody, "commit", "--quiet", "--message", "all")):
        subprocess.run(["git", *asked], cwd=tmp_path, check=True)
    monkeypatch.setattr(code, "__file__", str(tmp_path / "tasks/running/code.py"))
    commit = code._checked_out()
    assert len(commit) == 12
    rows.write_text("{}")
    assert code._checked_out() == commit
    for path in (source, recipe, tmp_path / "tasks/new.py"):
        path.write_text("changed")
        assert code._checked_out() == f"{commit}.dirty"
        subprocess.run(["git", "checkout", "--quiet", "."], cwd=tmp_path, check=True)


def test_without_a_checkout_the_commit_is_the_images_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_checked_out", lambda: "")
    for commit, version in (("ab" * 20, "+gabababababab"), ("", "")):
        code.project_version.cache_clear()
        monkeypatch.setenv(code.COMMIT, commit)
        assert code.project_version() == f"{metadata.version(code.PROJECT)}{version}"
    code.project_version.cache_clear()
