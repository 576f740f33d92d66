"""The stage loop: what it teaches to whom, that it is a function of its inputs, and that a job resumes to the bit."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainee import (
    ALONE,
    BUDGETS,
    STAGE,
    documents_and_mask,
    token_stream,
    train_job,
    write_family,
    write_tokens,
)

from elastic_core.files import checkpoint
from elastic_core.recipe import Distillation, Optimizer, RouterSchedule, Stage
from elastic_core.schema import build, to_dict
from elastic_core.training import curriculum, job
from elastic_core.training.job import TrainJob
from elastic_core.training.tokens import IGNORED, TokenRows
from elastic_core.training.train import StageRun, StepMetrics, make_optimizer, train_stage

# A gradient is a sum over the batch's rows, in another order in other micro-batches.
SUM_ORDER = 1e-5


def run_job(settings: TrainJob) -> None:
    job.run_job(settings, ALONE)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "train.safetensors")


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    return write_family(tmp_path_factory.mktemp("family") / "start")


def stage_run(family: Path, tokens: Path, stage: Stage, distillation: Distillation | None = None) -> StageRun:
    student, router, described = job.load_family(family, torch.device("cpu"))
    return StageRun(
        student=student,
        teacher=job.load_model(family, torch.device("cpu"), torch.float32),
        router=router,
        optimizer=make_optimizer(student, router, stage),
        stage=stage,
        distillation=distillation or Distillation(),
        budgets=BUDGETS,
        subnets={budget.name: budget.subnet for budget in described.budgets},
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
    first, last = (mean(m.budgets["m"].router_loss for m in part) for part in (metrics[:10], metrics[-10:]))
    assert last < first, "of a few draws of the noise each"
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


def gradients_of_a_step(family: Path, tokens: Path, stage: Stage) -> tuple[dict[str, torch.Tensor], StepMetrics]:
    run, gradients = stage_run(family, tokens, stage, Distillation(ce_weight=1.0)), {}

    def keep(*_: object) -> None:
        weights = run.student.named_parameters()
        gradients.update({name: weight.grad.clone() for name, weight in weights if weight.grad is not None})

    run.optimizer.register_step_pre_hook(keep)
    metrics = next(train_stage(run))
    return gradients, metrics


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_every_learned_token_of_a_global_batch_weighs_the_same(micro_batch_size, family, tmp_path):
    """However the rows, of which some learn nothing, fall on micro-batches."""
    tokens = write_tokens(tmp_path / "tokens.safetensors", **documents_and_mask())
    whole = replace(STAGE, micro_batch_size=6, budgets={"s": 1}, router=RouterSchedule(mode="frozen"))
    expected, all_at_once = gradients_of_a_step(family, tokens, whole)
    found, metrics = gradients_of_a_step(family, tokens, replace(whole, micro_batch_size=micro_batch_size))
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], rtol=1e-4, atol=SUM_ORDER * float(gradient.abs().max())), name
    assert metrics.loss == pytest.approx(all_at_once.loss, rel=SUM_ORDER)
    for field in ("loss", "kl", "cross_entropy"):
        one, other = (getattr(m.budgets["s"], field) for m in (metrics, all_at_once))
        assert one == pytest.approx(other, rel=SUM_ORDER, abs=1e-9), field


def test_a_budgets_losses_are_means_over_what_it_learned(family, tmp_path):
    """Against the plain mean over the rows of its micro-steps, at weights that no step has changed yet."""
    tokens = write_tokens(tmp_path / "tokens.safetensors", **documents_and_mask())
    stage = replace(STAGE, micro_batch_size=1, router=RouterSchedule(mode="frozen"))
    run = stage_run(family, tokens, stage, Distillation(ce_weight=1.0))
    rows = curriculum.DataOrder(run.data.num_rows, stage, 0).rows(0)
    names = curriculum.place_budgets(stage, stage.budgets, 0, 0, stage.batch_size)
    nats: dict[str, list[torch.Tensor]] = {}
    for row, name in zip(rows, names, strict=True):
        batch = run.data.batch([row])
        with torch.no_grad():
            hidden = run.student(batch.inputs_BT, run.subnets[name], packing=batch.packing)
            log_probs = run.student.logits(hidden).log_softmax(-1)[0]
        kept = (batch.targets_BT[0] != IGNORED).nonzero()[:, 0]
        nats.setdefault(name, []).append(-log_probs[kept, batch.targets_BT[0, kept]])
    metrics = next(train_stage(run))
    assert len({len(of) for each in nats.values() for of in each}) > 2  # uneven rows, else any mean would do
    for name, each in nats.items():
        assert metrics.budgets[name].cross_entropy == pytest.approx(float(torch.cat(each).mean()), rel=SUM_ORDER)


def test_what_is_not_learned_of_another_document_leaves_training_alone_to_the_bit(family, tmp_path):
    """Every second document is learned; what the others say changes no weight and no metric."""
    starts = torch.arange(0, 500, 5)
    learned = (torch.arange(500) // 5 % 2).to(torch.uint8)
    results = []
    for stream in (token_stream(), torch.where(learned.bool(), token_stream(), token_stream().flip(0))):
        path = tmp_path / f"{len(results)}.safetensors"
        save_file({"tokens": stream, "document_starts": starts, "learned": learned}, path)
        run = stage_run(family, path, STAGE, Distillation(ce_weight=1.0))
        metrics = [replace(m, seconds=0.0) for m in train_stage(run)]
        results.append((metrics, run.student.state_dict()))
    (one, ours), (other, theirs) = results
    assert one == other
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("mode", ["soft", "frozen"])
def test_a_job_stopped_after_any_step_and_started_again_ends_in_the_same_bits(
    mode, family, tokens, tmp_path, monkeypatch
):
    stage = replace(STAGE, router=RouterSchedule(mode=mode))
    run_job(train_job(family, tokens, tmp_path / "whole", stage=stage))

    class Stopped(Exception):
        pass

    def stop_after(steps: int):
        def generate(run: StageRun, *since: Any):
            for count, metrics in enumerate(train_stage(run, *since)):
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


def test_bfloat16_trains_in_mixed_precision_and_exports_what_is_no_matrix_in_the_type_it_came_in(
    family, tokens, tmp_path
):
    """The types of NVIDIA's checkpoints: A_log and D in float32, all else in bfloat16."""
    shutil.copytree(family, tmp_path / "start")
    file = tmp_path / "start/model.safetensors"
    stored = {
        name: weight if name.endswith(("A_log", ".D")) else weight.bfloat16()
        for name, weight in load_file(file).items()
    }
    save_file(stored, file)
    run_job(train_job(tmp_path / "start", tokens, tmp_path / "work", dtype="bfloat16"))
    trained = load_file(tmp_path / "work/family/model.safetensors")
    assert {name: weight.dtype for name, weight in trained.items()} == {name: w.dtype for name, w in stored.items()}
    loaded = job.load_model(tmp_path / "start", torch.device("cpu"), torch.bfloat16)
    for name, weight in loaded.named_parameters():
        assert weight.dtype == stored[checkpoint.disk_name(name)].dtype
        assert torch.equal(weight, stored[checkpoint.disk_name(name)])
    wide = job.load_model(tmp_path / "start", torch.device("cpu"), torch.float32)
    assert {weight.dtype for weight in wide.parameters()} == {torch.float32}


def test_weights_decay_where_they_are_matrices(family, tokens):
    trained = []
    for decay in (0.0, 0.5):
        run = stage_run(
            family, tokens, replace(STAGE, optimizer=Optimizer(learning_rate=1e-2, warmup_steps=0, weight_decay=decay))
        )
        next(train_stage(run))
        trained.append(run.student.state_dict())
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]) == (weight.ndim != 2), name


def test_a_loss_that_is_not_finite_ends_the_stage_and_says_where(family, tokens, tmp_path):
    wild = replace(STAGE, optimizer=Optimizer(learning_rate=1e30, warmup_steps=0))
    with pytest.raises(FloatingPointError, match=r"stage stage1, step \d: loss .* lower optimizer.learning_rate"):
        run_job(train_job(family, tokens, tmp_path / "work", stage=wild))
    assert not (tmp_path / "work/family").exists()


def test_a_routers_gradient_that_is_not_finite_ends_the_stage_before_its_weights_are_spoilt(family, tokens, tmp_path):
    run = job.prepare(train_job(family, tokens, tmp_path, stage=STAGE), ALONE)[0]
    weights = list(run.router.parameters())
    weights[0].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="gradient norm nan"):
        next(train_stage(run))
    assert all(bool(weight.isfinite().all()) for weight in weights)


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
