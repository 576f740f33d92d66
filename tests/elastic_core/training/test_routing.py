"""The load of experts: its curves are counts, and the selection bias follows it in every way that training goes."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from trainee import ALONE, STAGE, train_job, write_family, write_tokens

from elastic_core.budget import Budget
from elastic_core.files import checkpoint
from elastic_core.layers.moe import Mixture
from elastic_core.recipe import RouterSchedule, Stage
from elastic_core.training import job
from elastic_core.training.curriculum import generator
from elastic_core.training.parallel import recompute_layers
from elastic_core.training.routing import Routing, balance, give_idle_gradients, watched
from elastic_core.training.train import StageRun, StepMetrics, train_stage

RATE = 0.0625  # a power of two: steps of it add up without rounding
BIAS = "layers.1.mixer.gate.e_score_correction_bias"
STEPS = replace(STAGE, router=RouterSchedule(mode="frozen"), expert_balance=RATE)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("routing") / "family"
    return write_family(directory, experts.CONFIG, experts.AXES, experts.BUDGETS, experts.RANKING)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("routing") / "tokens.safetensors")


def stage_run(family: Path, tokens: Path, work: Path, stage: Stage) -> StageRun:
    return job.prepare(train_job(family, tokens, work, stage=stage), ALONE)[0]


def test_a_layer_of_experts_that_only_some_micro_steps_have_is_reported_of_those(tokens: Path, tmp_path: Path) -> None:
    """A router that draws the depth may leave out all layers of experts in one micro-step, and not in the next."""
    config, axes = replace(experts.CONFIG, hybrid_override_pattern="M*EM"), replace(experts.AXES, depth=(4, 3))
    budgets = (Budget(name="l"), Budget(name="m", params=11000))
    family = write_family(tmp_path / "family", config, axes, budgets, (0, 1, 3, 2))
    stage = replace(STAGE, steps=8, budgets={"l": 1, "m": 2}, micro_batch_size=1, router=RouterSchedule(mode="hard"))
    loads = [
        metrics.budgets["m"].experts.get("expert_load")
        for metrics in train_stage(stage_run(family, tokens, tmp_path, stage))
        if "m" in metrics.budgets
    ]
    assert any(loads) and all(load is None or 1 <= load <= experts.CONFIG.n_routed_experts for load in loads)


def test_an_expert_that_no_token_chose_has_a_gradient_of_zeros_where_its_subnet_keeps_it(family: Path) -> None:
    model = job.load_model(family, torch.device("cpu"), torch.float32).requires_grad_(True)
    small = next(b.subnet for b in checkpoint.read_family(family).budgets if b.name == "s")
    with watched(model) as routing:
        model(torch.zeros(1, 1, dtype=torch.long), replace(small, experts=4)).sum().backward()
    (layer, kept), *_ = routing.kept.items()
    mixer = model.layers[layer].mixer
    idle = [expert for expert in kept if mixer.experts[expert].up_proj.weight.grad is None]
    assert idle and len(kept) < experts.CONFIG.n_routed_experts
    give_idle_gradients(model, [routing])
    for number, expert in enumerate(mixer.experts):
        for weight in expert.parameters():
            assert (weight.grad is not None) == (number in kept)
            assert number not in idle or not weight.grad.any()


def test_loads_of_subnets_that_keep_other_numbers_of_experts_count_alike(family: Path) -> None:
    """Of six experts the first has 5 tokens less than the mean; of four it has 6 more: one more over all."""
    model = job.load_model(family, torch.device("cpu"), torch.float32)
    layer, bias = 1, model.get_parameter(BIAS)
    before, seen = bias.clone(), []
    for kept, counts in (([0, 1, 2, 3, 4, 5], [0, 6, 6, 6, 6, 6]), ([0, 1, 2, 3], [12, 4, 4, 4])):
        routing = Routing()
        chosen = torch.tensor([[expert] for expert, count in enumerate(counts) for _ in range(count)])
        routing.see(layer, 6, kept, chosen, torch.ones(len(chosen), len(kept)))
        seen.append(routing)
    balance(model, seen, RATE, ALONE)
    assert (bias - before).tolist() == [-RATE, RATE, RATE, RATE, -RATE, -RATE]


@pytest.mark.parametrize("budget", ["l", "s"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_seen_is_a_count_of_what_every_layer_chose(
    budget: str, recompute: bool, family: Path, monkeypatch
) -> None:
    model = job.load_model(family, torch.device("cpu"), torch.float32).requires_grad_(True)
    subnet = next(b.subnet for b in checkpoint.read_family(family).budgets if b.name == budget)
    if recompute:
        recompute_layers(model)
    chosen: dict[int, torch.Tensor] = {}
    route = Mixture.route

    def noted(mixture: Mixture, *given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = route(mixture, *given, **named)
        chosen.setdefault(mixture.layer, found[0])
        return found

    monkeypatch.setattr(Mixture, "route", noted)
    tokens_BT = torch.randint(experts.CONFIG.vocab_size, (3, 14), generator=generator("seen"))
    with watched(model) as routing:
        hidden = model(tokens_BT, subnet)
    chosen_in_all, loads = dict(chosen), []
    hidden.sum().backward()  # a second forward pass, where layers are recomputed
    assert routing.excess.keys() == chosen_in_all.keys() and len(routing.loads) == len(chosen_in_all)
    for layer, chosen_NS in chosen_in_all.items():
        counts = [int((chosen_NS == i).sum()) for i in range(subnet.experts)]
        loads.append(max(counts) / (sum(counts) / len(counts)))
        excess = [len(counts) * count - sum(counts) for count in counts]
        assert routing.excess[layer].tolist() == excess + [0] * (experts.CONFIG.n_routed_experts - len(counts))
    curves = routing.curves()
    assert float(curves["expert_load"]) == pytest.approx(sum(loads) / len(loads))
    assert 0 < float(curves["expert_entropy"]) <= math.log(subnet.experts)


def test_a_bias_falls_where_an_expert_has_more_than_the_mean_and_else_rises(family, tokens, tmp_path) -> None:
    stage = replace(STEPS, steps=1, budgets={"l": 1})
    run = stage_run(family, tokens, tmp_path, stage)
    before = run.student.get_parameter(BIAS).detach().clone()
    with watched(run.student) as routing:
        run.student(run.data.batch(range(run.data.num_rows)).inputs_BT, run.subnets["l"])
    list(train_stage(run))
    moved = run.student.get_parameter(BIAS).detach() - before
    assert set(moved.tolist()) <= {-RATE, 0.0, RATE} and -RATE in moved and RATE in moved
    assert routing.excess[1][moved < 0].min() > routing.excess[1][moved > 0].max()


def test_an_expert_that_all_tokens_choose_loses_some_of_them_if_balanced(family, tokens, tmp_path) -> None:
    loads = {}
    for rate in (0.0, RATE):
        run = stage_run(family, tokens, tmp_path, replace(STEPS, steps=12, expert_balance=rate))
        bias = run.student.get_parameter(BIAS).detach()
        bias[0] += 0.5  # eight steps of the rate; a fresh router's scores are all near a half
        before = bias.clone()
        loads[rate] = list(train_stage(run))[-1].budgets["m"].experts["expert_load"]
        assert torch.equal(bias, before) == (rate == 0.0)
    assert loads[RATE] < loads[0.0]


def test_a_stopped_stage_goes_on_with_the_bias_that_it_had(family, tokens, tmp_path, monkeypatch) -> None:
    whole, stopped = (train_job(family, tokens, tmp_path / name, stage=STEPS) for name in ("whole", "stopped"))
    job.run_job(whole, ALONE)

    def three_steps(run: StageRun, *since: Any) -> Iterator[StepMetrics]:
        yield from islice(train_stage(run, *since), 3)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(job, "train_stage", three_steps)
        job.run_job(stopped, ALONE)
    job.run_job(stopped, ALONE)
    files = [Path(each.output) / "model.safetensors" for each in (whole, stopped)]
    assert files[0].read_bytes() == files[1].read_bytes()
