"""The stage loop: what it teaches to whom, that it is a function of its inputs, and that a job resumes to the bit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainee import ALONE, BUDGETS, CONFIG, STAGE, train_job, write_family, write_tokens

from elastic_core.files import checkpoint
from elastic_core.recipe import Distillation, Optimizer, RouterSchedule, Stage
from elastic_core.schema import build, to_dict
from elastic_core.training import job
from elastic_core.training.job import TrainJob
from elastic_core.training.tokens import TokenRows
from elastic_core.training.train import StageRun, make_optimizer, resolved_subnets, train_stage


def run_job(settings: TrainJob) -> None:
    job.run_job(settings, ALONE)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train.safetensors")


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    return write_family(tmp_path_factory.mktemp("family") / "start")


def stage_run(family: Path, tokens: Path, stage: Stage, distillation: Distillation | None = None) -> StageRun:
    student, router, _ = job.load_family(family, torch.device("cpu"))
    return StageRun(
        student=student,
        teacher=job.load_model(family, torch.device("cpu"), torch.float32),
        router=router,
        optimizer=make_optimizer(student, router, stage),
        stage=stage,
        distillation=distillation or Distillation(),
        budgets=BUDGETS,
        subnets=resolved_subnets(CONFIG, router, BUDGETS),
        data=TokenRows(tokens, stage.sequence_length),
        seed=0,
        world=ALONE,
    )


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize("mode", ["soft", "hard", "frozen"])
def test_distillation_brings_every_budget_nearer_to_its_teacher(mode, family, tokens):
    stage = replace(STAGE, steps=40, router=RouterSchedule(mode=mode))
    metrics = list(train_stage(stage_run(family, tokens, stage, Distillation(ce_weight=1.0, kl_weight=0.0))))
    for name in ("l", "m", "s"):
        first = sum(m.budgets[name].cross_entropy for m in metrics[:4])
        last = sum(m.budgets[name].cross_entropy for m in metrics[-4:])
        assert last < first, name


def test_the_full_budget_of_a_fresh_student_has_no_kl_to_its_frozen_teacher(family, tokens):
    first = next(train_stage(stage_run(family, tokens, STAGE)))
    assert first.budgets["l"].kl == pytest.approx(0.0, abs=1e-6)  # float32 rounding of a sum over the vocabulary
    assert first.budgets["s"].kl > 1e-5


def test_a_trainable_teacher_teaches_the_smaller_budgets_and_learns_from_the_data(family, tokens):
    run = stage_run(family, tokens, STAGE, Distillation(teacher="trainable", ce_weight=1.0))
    run.teacher = None
    before = run.student.lm_head.weight.clone()
    first = next(train_stage(run))
    assert first.budgets["l"].kl == 0.0
    assert first.budgets["l"].loss == pytest.approx(first.budgets["l"].cross_entropy)
    assert first.budgets["s"].kl > 0
    assert not torch.equal(before, run.student.lm_head.weight)


def test_the_router_moves_towards_its_budgets_while_it_trains_and_not_while_it_is_frozen(family, tokens):
    stage = replace(STAGE, steps=60)
    metrics = list(train_stage(stage_run(family, tokens, stage)))
    assert metrics[-1].budgets["s"].router_loss < metrics[0].budgets["s"].router_loss
    assert metrics[-1].budgets["s"].expected_params < metrics[-1].budgets["m"].expected_params
    frozen = stage_run(family, tokens, replace(STAGE, router=RouterSchedule(mode="frozen")))
    before = {name: weight.clone() for name, weight in frozen.router.state_dict().items()}
    list(train_stage(frozen))
    assert all(torch.equal(before[name], weight) for name, weight in frozen.router.state_dict().items())


def test_the_same_seed_gives_the_same_metrics(family, tokens):
    first, second = (list(train_stage(stage_run(family, tokens, STAGE))) for _ in range(2))
    assert [replace(m, seconds=0.0) for m in first] == [replace(m, seconds=0.0) for m in second]


def test_accumulating_micro_batches_equals_one_large_batch(family, tokens):
    one = replace(STAGE, steps=1, budgets={"s": 1}, micro_batch_size=6, router=RouterSchedule(mode="frozen"))
    many = replace(one, micro_batch_size=2)
    results = []
    for stage in (one, many):
        run = stage_run(family, tokens, stage)
        list(train_stage(run))
        results.append(run.student.state_dict())
    for name, weight in results[0].items():
        # Adam's first step is the sign of the gradient, so that only a gradient at rounding level may differ.
        assert torch.isclose(weight, results[1][name], atol=1e-5).float().mean() > 0.99, name


@pytest.mark.parametrize("mode", ["soft", "frozen"])
def test_a_job_stopped_after_any_step_and_started_again_ends_in_the_same_bits(
    mode, family, tokens, tmp_path, monkeypatch
):
    stage = replace(STAGE, router=RouterSchedule(mode=mode))
    run_job(train_job(family, tokens, tmp_path / "whole", stage=stage))

    class Stopped(Exception):
        pass

    def stop_after(steps: int):
        def generate(run: StageRun, start: int = 0):
            for count, metrics in enumerate(train_stage(run, start)):
                if count == steps:
                    raise Stopped
                yield metrics

        return generate

    broken = train_job(family, tokens, tmp_path / "broken", stage=stage)
    for steps in (3, 0, 2):
        monkeypatch.setattr(job, "train_stage", stop_after(steps))
        with pytest.raises(Stopped):
            run_job(broken)
    monkeypatch.undo()
    run_job(broken)
    assert weights(tmp_path / "broken/family") == weights(tmp_path / "whole/family")
    lines = (tmp_path / "broken" / job.METRICS).read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} == set(range(STAGE.steps))


def test_a_finished_job_is_not_done_again(family, tokens, tmp_path):
    finished = train_job(family, tokens, tmp_path / "work")
    run_job(finished)
    before = (tmp_path / "work/family").stat().st_mtime_ns
    run_job(finished)
    assert (tmp_path / "work/family").stat().st_mtime_ns == before


def test_a_trained_family_resolves_to_nested_subnets_and_holds_the_trained_weights(family, tokens, tmp_path):
    run_job(train_job(family, tokens, tmp_path / "work"))
    trained = checkpoint.read_family(tmp_path / "work/family")
    assert [b.name for b in trained.budgets] == ["l", "m", "s"]
    assert all(b.budget.params is None or b.params <= b.budget.params for b in trained.budgets)
    old = load_file(family / "model.safetensors")
    new = load_file(tmp_path / "work/family/model.safetensors")
    assert old.keys() == new.keys()
    assert not torch.equal(old["lm_head.weight"], new["lm_head.weight"])


def test_bfloat16_trains_in_mixed_precision_and_exports_bfloat16(family, tokens, tmp_path):
    run_job(train_job(family, tokens, tmp_path / "work", dtype="bfloat16"))
    assert load_file(tmp_path / "work/family/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_a_loss_that_is_not_finite_ends_the_stage_and_says_where(family, tokens, tmp_path):
    wild = replace(STAGE, optimizer=Optimizer(learning_rate=1e30, warmup_steps=0))
    with pytest.raises(FloatingPointError, match=r"stage stage1, step \d: loss .* lower optimizer.learning_rate"):
        run_job(train_job(family, tokens, tmp_path / "work", stage=wild))
    assert not (tmp_path / "work/family").exists()


def test_two_jobs_never_share_a_work_directory(tmp_path):
    second = job.exclusive(tmp_path, patience=0.0)
    with job.exclusive(tmp_path), pytest.raises(RuntimeError, match="another process is training this stage"):
        second.__enter__()


def test_a_job_survives_its_json(family, tokens, tmp_path):
    original = train_job(family, tokens, tmp_path / "work")
    assert build(TrainJob, json.loads(json.dumps(to_dict(original)))) == original


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(2)}, "is not a router"),
        ({"heads.hidden.0.weight": torch.zeros(8, 3)}, "the axes in elastic.json need"),
    ],
)
def test_a_router_of_another_model_is_refused(tensors, message, family, tmp_path):
    other = tmp_path / "family"
    other.mkdir()
    for path in family.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    save_file(tensors, other / checkpoint.ROUTER_FILE)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        job.load_family(other, torch.device("cpu"))
