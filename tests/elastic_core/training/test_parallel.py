"""Laws of training in several processes: it is the training of one process, and so is a pass that runs layers twice."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from trainee import (
    ALONE,
    AXES,
    CONFIG,
    STAGE,
    documents_and_mask,
    launch,
    metrics_of,
    train_job,
    write_family,
    write_tokens,
)

from elastic_core.files.shards import read_header
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Distillation, RouterSchedule
from elastic_core.router import ElasticModel, Router, gumbel_softmax, soft_subnet
from elastic_core.subnet import full_subnet
from elastic_core.training import job
from elastic_core.training.curriculum import generator
from elastic_core.training.job import TrainJob
from elastic_core.training.parallel import read_rows, recompute_layers

# The gradient of a batch is a sum over its rows, in another order where they lie in two processes. Adam divides it by
# its own size, so that float32's rounding, 1e-7, grows over the steps, but by far less than this.
SUM_ORDER = 1e-5
# Where two experts are all but tied for a token, that rounding decides: 1.2e-5 of a gradient norm in one step of eight.
TIED_EXPERTS = 1e-4
# A bfloat16 has 8 bits; the two sides also round at different places, for FSDP2 gathers weights in bfloat16.
BFLOAT16 = 2e-2


@dataclass(frozen=True)
class Case:
    mode: str
    teacher: str
    recompute: bool = False
    dtype: str = "float32"
    packed: bool = False
    shift: float | None = None


CASES = [Case(mode, teacher) for mode in ("soft", "hard", "frozen") for teacher in ("frozen", "trainable")]
CASES += [Case("soft", "frozen", recompute=True), Case("soft", "frozen", packed=True)]
# A_log and dt_bias of 1, and of what 8 bits round to 1.
SHIFTED = [Case("frozen", "frozen", dtype="bfloat16", shift=shift) for shift in (0.0, 1.5e-3)]
CASES += [Case("soft", "trainable", dtype="bfloat16"), *SHIFTED]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[Case, tuple[TrainJob, TrainJob]]:
    """The same training by two processes and by one, which runs in a micro-step what the two run together."""
    directory = tmp_path_factory.mktemp("pairs")
    family, tokens = write_family(directory / "family"), write_tokens(directory / "tokens.safetensors")
    packed = write_tokens(directory / "packed.safetensors", **documents_and_mask())

    def start(case: Case) -> Path:
        shifted = directory / f"shifted by {case.shift}"
        if case.shift is None or shifted.exists():
            return family if case.shift is None else shifted
        shutil.copytree(family, shifted)
        weights = load_file(shifted / "model.safetensors")
        for name in weights:
            if name.endswith(("A_log", "dt_bias")):
                weights[name] = torch.full_like(weights[name], 1 + case.shift)
        save_file(weights, shifted / "model.safetensors")
        return shifted

    def distilled(case: Case, processes: int) -> TrainJob:
        """Cross-entropy beside the distillation, so that every budget has a gradient far from zero."""
        stage = replace(STAGE, micro_batch_size=2 // processes, budget_rows=2, router=RouterSchedule(mode=case.mode))
        return train_job(
            start(case),
            packed if case.packed else tokens,
            directory / f"{CASES.index(case)}-{processes}",
            stage=replace(stage, recompute=case.recompute and processes == 2),
            distillation=Distillation(teacher=case.teacher, ce_weight=1.0),
            teacher=str(start(case)) if case.teacher == "frozen" else None,
            dtype=case.dtype,
        )

    made = {case: (distilled(case, 2), distilled(case, 1)) for case in CASES}
    launch(2, *(two for two, _ in made.values()))
    for _, one in made.values():
        job.run_job(one, ALONE)
    return made


@pytest.mark.services
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_have_the_losses_of_one_at_the_same_global_batch(case, pairs):
    near = partial(pytest.approx, abs=SUM_ORDER) if case.dtype == "float32" else partial(pytest.approx, rel=BFLOAT16)
    assert_same_losses(*pairs[case], near)


def assert_same_losses(many: TrainJob, one: TrainJob, near: Callable[[Any], Any]) -> None:
    found, expected = (metrics_of(Path(each.work)) for each in (many, one))
    assert found.keys() == expected.keys() == set(range(STAGE.steps))
    for step in expected:
        assert found[step]["loss"] == near(expected[step]["loss"]), step
        assert found[step]["gradient_norm"] == near(expected[step]["gradient_norm"]), step
        for name, budget in expected[step]["budgets"].items():
            assert found[step]["budgets"][name]["loss"] == near(budget["loss"]), (step, name)
            assert found[step]["budgets"][name]["choices"] == near(budget["choices"]), (step, name)


@pytest.mark.services
def test_hosts_that_have_a_copy_of_the_weights_each_train_as_one_process_does(tmp_path):
    family, tokens = write_family(tmp_path / "family"), write_tokens(tmp_path / "tokens.safetensors")

    def distilled(processes: int) -> TrainJob:
        stage = replace(STAGE, batch_size=12, micro_batch_size=4 // processes, budget_rows=4, sharding="hybrid")
        return train_job(family, tokens, tmp_path / str(processes), stage=stage)

    four, one = distilled(4), distilled(1)
    launch(2, four, hosts=2)
    job.run_job(one, ALONE)
    assert_same_losses(four, one, partial(pytest.approx, abs=SUM_ORDER))
    found, expected = (read_header(Path(each.output) / "model.safetensors") for each in (four, one))
    assert {name: weight.shape for name, weight in found.items()} == {name: w.shape for name, w in expected.items()}


@pytest.mark.services
def test_processes_whose_tokens_choose_different_experts_train_as_one_process_does(tmp_path):
    """A row of four tokens chooses two experts a token of six, so that one process often lacks some of the other's.

    Two experts a token are no choice here: between one and two, a mask weighs a token's best expert above its second,
    and which of two tied ones is the best, rounding decides. The mean choice then differed by 4e-3 in step 6 of 8.
    """
    axes = replace(experts.AXES, top_k=())
    family = write_family(tmp_path / "family", experts.CONFIG, axes, experts.BUDGETS, experts.RANKING)
    tokens = write_tokens(tmp_path / "tokens.safetensors")
    modes: dict[str, tuple[TrainJob, TrainJob]] = {}
    for mode in ("soft", "frozen"):
        router = RouterSchedule(mode=mode)
        stage = replace(STAGE, sequence_length=4, budget_rows=2, router=router, recompute=mode == "soft")
        stage = replace(stage, expert_balance=0.01 if mode == "frozen" else 0.0)
        two, one = (
            train_job(family, tokens, tmp_path / f"{mode}-{n}", stage=replace(stage, micro_batch_size=2 // n))
            for n in (2, 1)
        )
        modes[mode] = two, one
    launch(2, *(two for two, _ in modes.values()))
    for mode, (two, one) in modes.items():
        job.run_job(one, ALONE)
        near = TIED_EXPERTS if mode == "soft" else SUM_ORDER
        assert_same_losses(two, one, partial(pytest.approx, abs=near))


@pytest.mark.services
def test_in_bfloat16_two_processes_see_what_a_bfloat16_would_round_away_of_A_log_and_dt_bias(pairs):
    """And so does one process: the loss moves with them."""
    for processes in range(2):
        at_one, beside_one = (metrics_of(Path(pairs[case][processes].work))[0]["loss"] for case in SHIFTED)
        assert at_one != beside_one


def test_a_batch_that_does_not_divide_among_the_processes_is_refused():
    with pytest.raises(ValueError, match="batch_size=6 is not a multiple of micro_batch_size x processes=8; nearest"):
        STAGE.micro_steps(4)


def test_rows_are_read_across_the_pieces_that_hold_them(tmp_path):
    whole = torch.randn(7, 3, generator=generator("rows"))
    for number, piece in enumerate(torch.split(whole, [3, 0, 4])):
        save_file({"weight": piece.contiguous()}, tmp_path / f"{number}.safetensors")
    pieces = [read_header(tmp_path / f"{number}.safetensors")["weight"] for number in range(3)]
    target = torch.zeros(7, 3)
    read_rows(target, pieces)
    assert torch.equal(target, whole)


# Recomputation


@pytest.fixture
def model() -> ElasticNemotronH:
    fresh = ElasticNemotronH(CONFIG)
    fresh.initialise(generator("model"))
    return fresh


def forward(model: ElasticNemotronH, *, masked: bool, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch at soft masks or at the full subnet, and the gradients of the model and the router."""
    router = Router(ElasticModel(CONFIG, AXES.bind(CONFIG), (0, 2, 1, 3)), 3, 8)
    router.initialise(generator("router"))
    probabilities = gumbel_softmax(router(router.one_hot(1)), temperature=1.0, scale=1.0, generator=None)
    subnet, masks = soft_subnet(router.elastic, probabilities)
    tokens = torch.randint(CONFIG.vocab_size, (2, 12), generator=generator("batch"))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        hidden = model(tokens, subnet, masks) if masked else model(tokens, full_subnet(CONFIG))
        loss = model.logits(hidden).log_softmax(-1)[..., 0].mean()
    loss.backward()
    named = [*model.state_dict(keep_vars=True).items(), *router.named_parameters()]
    return loss.detach(), {name: weight.grad for name, weight in named if weight.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_running_layers_again_changes_neither_loss_nor_gradient(masked, dtype, model):
    loss, gradients = forward(model, masked=masked, dtype=dtype)
    model.zero_grad()
    recompute_layers(model)
    again, again_gradients = forward(model, masked=masked, dtype=dtype)
    assert torch.equal(loss, again)
    assert gradients.keys() == again_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again_gradients[name]), name


def saved_bytes(model: ElasticNemotronH) -> int:
    """Bytes that autograd keeps of a forward pass, but for the weights themselves."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(torch.zeros(2, 64, dtype=torch.long), full_subnet(CONFIG))
    assert hidden.requires_grad  # the graph, and with it what it keeps, lives until here
    return sum(kept.values())


def test_running_layers_again_keeps_only_their_inputs(model):
    inputs = CONFIG.num_layers * 2 * 64 * CONFIG.hidden_size * torch.float32.itemsize
    before = saved_bytes(model)
    recompute_layers(model)
    assert inputs < before / 4  # else this model would show nothing
    assert saved_bytes(model) + inputs < before / 4


def test_running_layers_again_keeps_the_names_of_the_weights(model):
    names = list(model.state_dict())
    recompute_layers(model)
    assert list(model.state_dict()) == names
