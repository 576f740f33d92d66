"""Laws of elastic_core.training.losses. The oracle is the plain formula, with every logit materialised."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_core.training.losses import COLUMNS, LossParts, distillation_loss

EXACT = 1e-12  # float64: both forms differ in the order of sums of at most a few hundred terms
SINGLE = 2e-5  # float32 beside float64: the same, at 2^-24 per rounding
HALF = 2e-2  # bfloat16 has 8 bits: logits and gradients carry a few roundings of 2^-9
MASK = -100


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    student_hidden_TD: Tensor
    student_head_VD: Tensor
    teacher_hidden_TD: Tensor
    teacher_head_VD: Tensor
    targets_T: Tensor

    def args(self) -> tuple[Tensor, ...]:
        return (
            self.student_hidden_TD,
            self.student_head_VD,
            self.teacher_hidden_TD,
            self.teacher_head_VD,
            self.targets_T,
        )

    def rows(self, rows: slice) -> "Batch":
        """The same model on some of the tokens; its hidden states are leaves of their own."""
        return replace(
            self,
            student_hidden_TD=self.student_hidden_TD[rows].detach().requires_grad_(),
            teacher_hidden_TD=self.teacher_hidden_TD[rows],
            targets_T=self.targets_T[rows],
        )

    def to(self, dtype: torch.dtype | None = None, device: str = "cpu") -> "Batch":
        student = [
            t.detach().to(device, dtype).requires_grad_() for t in (self.student_hidden_TD, self.student_head_VD)
        ]
        teacher = [t.to(device, dtype) for t in (self.teacher_hidden_TD, self.teacher_head_VD)]
        return Batch(
            student_hidden_TD=student[0],
            student_head_VD=student[1],
            teacher_hidden_TD=teacher[0],
            teacher_head_VD=teacher[1],
            targets_T=self.targets_T.to(device),
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD, head_VD = torch.autograd.grad(loss, (self.student_hidden_TD, self.student_head_VD))
        return hidden_TD, head_VD


def make_batch(tokens: int = 13, vocabulary: int = 37, hidden: int = 11, teacher: int = 17, masked: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    targets_T = torch.randint(vocabulary, (tokens,), generator=generator)
    targets_T[torch.randperm(tokens, generator=generator)[:masked]] = MASK
    return Batch(
        student_hidden_TD=normal(tokens, hidden).requires_grad_(),
        student_head_VD=normal(vocabulary, hidden).requires_grad_(),
        teacher_hidden_TD=normal(tokens, teacher),
        teacher_head_VD=normal(vocabulary, teacher),
        targets_T=targets_T,
    )


def plain_loss(batch: Batch, *, kl_weight: float, ce_weight: float, temperature: float = 1.0) -> LossParts:
    kept = batch.targets_T != MASK
    student_TV = (batch.student_hidden_TD @ batch.student_head_VD.t())[kept]
    teacher_TV = (batch.teacher_hidden_TD @ batch.teacher_head_VD.t())[kept]
    kl = temperature**2 * F.kl_div(
        F.log_softmax(student_TV / temperature, -1), F.softmax(teacher_TV / temperature, -1), reduction="batchmean"
    )
    cross_entropy = F.cross_entropy(student_TV, batch.targets_T[kept])
    total = kl_weight * kl + ce_weight * cross_entropy
    return LossParts(total=total, kl=kl, cross_entropy=cross_entropy, tokens=int(kept.sum()))


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference over largest value."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{difference} over {expected.abs().max()}"


def assert_same_loss(
    batch: Batch, expected_of: Batch, tolerance: float, chunk_tokens: int | None, **weights: Any
) -> None:
    """Values and gradients of the chunked loss on batch are those of the plain loss on expected_of."""
    found = distillation_loss(*batch.args(), chunk_tokens=chunk_tokens, **weights)
    expected = plain_loss(expected_of, **weights)
    assert found.tokens == expected.tokens
    assert_close(found.total, expected.total, tolerance)
    assert_close(found.cross_entropy, expected.cross_entropy, tolerance)
    if weights["kl_weight"] > 0:
        assert_close(found.kl, expected.kl, tolerance)
    # A scale of the loss, such as an outer weight, must reach the gradients that the forward pass has made.
    for ours, theirs in zip(
        batch.gradients(2.5 * found.total), expected_of.gradients(2.5 * expected.total), strict=True
    ):
        assert_close(ours, theirs, tolerance)


class Recorder(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, and how often each operation ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls: Counter[str] = Counter()

    @property
    def products(self) -> int:
        return self.calls["mm"] + self.calls["addmm_"]

    @property
    def exponentials(self) -> int:
        return self.calls["exp"] + self.calls["exp_"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else [result]
        self.largest = max(self.largest, *(out.numel() for out in outputs if isinstance(out, Tensor)), 0)
        self.calls[func.overloadpacket.__name__] += 1
        return result


WEIGHTS = {"kl": (1.0, 0.0), "ce": (0.0, 0.7), "both": (0.6, 0.4)}


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 10, 64, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize(("kl_weight", "ce_weight"), WEIGHTS.values(), ids=WEIGHTS)
def test_values_and_gradients_equal_the_plain_formula(
    kl_weight: float, ce_weight: float, temperature: float, chunk_tokens: int | None
) -> None:
    batch = make_batch()
    assert_same_loss(
        batch, batch, EXACT, chunk_tokens, kl_weight=kl_weight, ce_weight=ce_weight, temperature=temperature
    )


@pytest.mark.parametrize("masked", [0, 12])
def test_every_count_of_masked_tokens_equals_the_plain_formula(masked: int) -> None:
    batch = make_batch(masked=masked)
    assert_same_loss(batch, batch, EXACT, 4, kl_weight=0.6, ce_weight=0.4)


# What makes the host wait for a GPU: sizes that depend on the data, and values that the host reads.
WAITS = {"nonzero", "_local_scalar_dense", "masked_select", "_unique2"}


@pytest.mark.parametrize("masked", [0, 1, 5, 13])
def test_a_known_number_of_targets_changes_no_bit_and_waits_for_no_device(masked: int) -> None:
    batch, weights = make_batch(masked=masked), {"kl_weight": 0.7, "ce_weight": 0.3, "chunk_tokens": 4}
    counted = distillation_loss(*batch.args(), **weights)
    expected = batch.gradients(counted.total)
    with Recorder() as ran:
        known = distillation_loss(*batch.args(), learned=13 - masked, **weights)
        gradients = batch.gradients(known.total)
    assert not ran.calls.keys() & WAITS
    assert known.tokens == counted.tokens == 13 - masked
    assert torch.equal(known.total, counted.total)
    assert all(torch.equal(found, e) for found, e in zip(gradients, expected, strict=True))


def test_masked_rows_have_no_gradient_and_no_influence() -> None:
    batch = make_batch()
    masked_T = batch.targets_T == MASK
    loss = distillation_loss(*batch.args(), kl_weight=0.6, ce_weight=0.4)
    hidden_TD, _ = batch.gradients(loss.total)
    assert torch.equal(hidden_TD[masked_T], torch.zeros_like(hidden_TD[masked_T]))
    poisoned_TD = torch.where(masked_T.unsqueeze(1), torch.nan, batch.student_hidden_TD)
    again = distillation_loss(poisoned_TD, *batch.args()[1:], kl_weight=0.6, ce_weight=0.4)
    assert torch.equal(again.total, loss.total)


def test_gradient_through_a_prefix_view_reaches_only_the_prefix() -> None:
    batch = make_batch(hidden=17)
    weight_VD, kept = batch.student_head_VD, 6
    hidden_TD = batch.student_hidden_TD.detach()[:, :kept].requires_grad_()
    view = replace(batch, student_hidden_TD=hidden_TD, student_head_VD=weight_VD[:, :kept])
    found = distillation_loss(*view.args(), kl_weight=0.6, ce_weight=0.4, chunk_tokens=4)
    expected = plain_loss(view, kl_weight=0.6, ce_weight=0.4)
    (found_VD,) = torch.autograd.grad(found.total, weight_VD)
    (expected_VD,) = torch.autograd.grad(expected.total, weight_VD)
    assert_close(found_VD, expected_VD, EXACT)
    assert not found_VD[:, kept:].any()


def test_gradient_flows_through_flattened_hidden_states() -> None:
    batch = make_batch(tokens=12)
    hidden_BTD = batch.student_hidden_TD.detach().reshape(3, 4, -1).requires_grad_()
    found = distillation_loss(hidden_BTD.flatten(0, 1), *batch.args()[1:], kl_weight=0.6, ce_weight=0.4)
    (found_BTD,) = torch.autograd.grad(found.total, hidden_BTD)
    expected_TD, _ = batch.gradients(plain_loss(batch, kl_weight=0.6, ce_weight=0.4).total)
    assert_close(found_BTD.flatten(0, 1), expected_TD, EXACT)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(temperature: float) -> None:
    batch = make_batch()
    same = replace(batch, teacher_hidden_TD=batch.student_hidden_TD, teacher_head_VD=batch.student_head_VD)
    loss = distillation_loss(*same.args(), kl_weight=1.0, ce_weight=0.0, temperature=temperature, chunk_tokens=4)
    assert abs(loss.kl) <= EXACT
    for gradient in same.gradients(loss.total):
        assert gradient.abs().max() <= EXACT


def test_no_gradient_reaches_the_teacher() -> None:
    batch = make_batch()
    for tensor in (batch.teacher_hidden_TD, batch.teacher_head_VD):
        tensor.requires_grad_()
    distillation_loss(*batch.args(), kl_weight=1.0, ce_weight=0.0).total.backward()
    assert batch.student_head_VD.grad is not None
    assert batch.teacher_hidden_TD.grad is None
    assert batch.teacher_head_VD.grad is None


def test_all_tokens_masked_gives_zero_loss_and_zero_gradients() -> None:
    batch = make_batch(masked=13)
    loss = distillation_loss(*batch.args(), kl_weight=0.6, ce_weight=0.4)
    assert (loss.total.item(), loss.kl.item(), loss.cross_entropy.item(), loss.tokens) == (0.0, 0.0, 0.0, 0)
    for gradient in batch.gradients(loss.total):
        assert not gradient.any()


def test_without_a_teacher_the_loss_is_cross_entropy() -> None:
    batch = make_batch()
    found = distillation_loss(
        batch.student_hidden_TD, batch.student_head_VD, None, None, batch.targets_T, kl_weight=0.0, ce_weight=1.0
    )
    expected = F.cross_entropy(batch.student_hidden_TD @ batch.student_head_VD.t(), batch.targets_T, ignore_index=MASK)
    assert_close(found.total, expected, EXACT)
    assert found.kl.item() == 0.0


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
def test_micro_batches_over_a_shared_denominator_sum_to_one_batch(as_tensor: bool) -> None:
    batch, weights = make_batch(), {"kl_weight": 0.6, "ce_weight": 0.4, "chunk_tokens": 4}
    whole = distillation_loss(*batch.args(), **weights)
    hidden_TD, head_VD = batch.gradients(whole.total)
    denominator = torch.tensor(whole.tokens) if as_tensor else whole.tokens

    halves = [batch.rows(slice(None, 5)), batch.rows(slice(5, None))]
    losses = [distillation_loss(*half.args(), denominator=denominator, **weights) for half in halves]
    gradients = [half.gradients(loss.total) for half, loss in zip(halves, losses, strict=True)]
    assert losses[0].tokens + losses[1].tokens == whole.tokens
    assert_close(losses[0].total + losses[1].total, whole.total, EXACT)
    assert_close(losses[0].kl + losses[1].kl, whole.kl, EXACT)
    assert_close(torch.cat([gradients[0][0], gradients[1][0]]), hidden_TD, EXACT)
    assert_close(gradients[0][1] + gradients[1][1], head_VD, EXACT)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, SINGLE), (torch.bfloat16, HALF)], ids=["f32", "bf16"])
@pytest.mark.parametrize("chunk_tokens", [4, None])
def test_lower_precision_is_close_to_the_float64_formula(
    dtype: torch.dtype, tolerance: float, temperature: float, chunk_tokens: int | None
) -> None:
    low = make_batch().to(dtype)
    weights = {"kl_weight": 0.6, "ce_weight": 0.4, "temperature": temperature}
    assert_same_loss(low, low.to(torch.float64), tolerance, chunk_tokens, **weights)
    loss = distillation_loss(*low.args(), **weights, chunk_tokens=chunk_tokens)
    assert loss.total.dtype == loss.kl.dtype == loss.cross_entropy.dtype == torch.float32
    assert [gradient.dtype for gradient in low.gradients(loss.total)] == [dtype, dtype]


def test_a_small_divergence_in_bfloat16_is_what_it_is_of_these_inputs() -> None:
    """Logits of 27 that were rounded to bfloat16 would be 0.125 apart, and the divergence of 0.001 twice as much."""
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 48, generator=draw).bfloat16()
    student = (teacher.float() + 0.01 * torch.randn(64, 48, generator=draw)).bfloat16()
    head = torch.randn(COLUMNS + 100, 48, generator=draw).bfloat16()
    targets = torch.zeros(64, dtype=torch.long)

    def found(dtype: torch.dtype) -> tuple[float, torch.Tensor]:
        inputs = student.to(dtype, copy=True).requires_grad_()
        weight = head.to(dtype)
        parts = distillation_loss(inputs, weight, teacher.to(dtype), weight, targets, kl_weight=1.0, ce_weight=0.0)
        parts.total.backward()
        assert inputs.grad is not None
        return float(parts.kl), inputs.grad.double()

    kl, gradient = found(torch.bfloat16)
    exact, of_exact = found(torch.float64)
    assert 5e-4 < exact < 5e-3
    assert kl == pytest.approx(exact, rel=1e-3)  # sums in float32
    # A value rounded to bfloat16 is off by 2^-9 of itself at most; the products' addends cancel.
    assert float(torch.cosine_similarity(gradient.flatten(), of_exact.flatten(), dim=0)) > 0.9999


def test_bfloat16_head_gradient_does_not_lose_the_addends_of_many_chunks() -> None:
    batch = make_batch(tokens=1, masked=0).to(torch.bfloat16)
    repeats = 1024  # a running bfloat16 sum of equal addends stops growing after 256 of them
    many = batch.rows(torch.zeros(repeats, dtype=torch.long))
    weights = {"kl_weight": 0.6, "ce_weight": 0.4, "denominator": 1, "chunk_tokens": 1}
    _, one_VD = batch.gradients(distillation_loss(*batch.args(), **weights).total)
    _, sum_VD = many.gradients(distillation_loss(*many.args(), **weights).total)
    assert_close(sum_VD, repeats * one_VD.double(), HALF)


@pytest.mark.parametrize("chunk_tokens", [4, None])
def test_autocast_multiplies_in_its_dtype_and_returns_gradients_in_the_inputs(chunk_tokens: int | None) -> None:
    batch, weights = make_batch().to(torch.float32), {"kl_weight": 0.6, "ce_weight": 0.4, "chunk_tokens": chunk_tokens}
    cast = batch.to(torch.bfloat16)
    expected = distillation_loss(*cast.args(), **weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation_loss(*batch.args(), **weights)
    assert torch.equal(found.total, expected.total)
    gradients = zip(batch.gradients(found.total), cast.gradients(expected.total), strict=True)
    for ours, theirs in gradients:
        assert ours.dtype == torch.float32
        assert_close(ours, theirs, HALF)


def test_autocast_leaves_float64_exact() -> None:
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation_loss(*batch.args(), kl_weight=0.6, ce_weight=0.4)
    assert_close(found.total, plain_loss(batch, kl_weight=0.6, ce_weight=0.4).total, EXACT)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_tokens_by_vocabulary_exists_in_forward_or_backward(
    dtype: torch.dtype, temperature: float
) -> None:
    tokens, vocabulary, chunk_tokens = 96, 211, 8
    batch = make_batch(tokens, vocabulary, hidden=8, teacher=8).to(dtype)
    with Recorder() as recorder:
        loss = distillation_loss(
            *batch.args(), kl_weight=0.6, ce_weight=0.4, temperature=temperature, chunk_tokens=chunk_tokens
        )
        loss.total.backward()
    assert recorder.largest == chunk_tokens * vocabulary


@pytest.mark.parametrize(("tokens", "vocabulary"), [(20_000, 1024), (200, 131_072)])
def test_default_chunks_of_logits_fill_64_mib(tokens: int, vocabulary: int) -> None:
    batch = make_batch(tokens, vocabulary, hidden=4, teacher=4).to(torch.float32)
    with torch.no_grad(), Recorder() as recorder:
        distillation_loss(*batch.args(), kl_weight=1.0, ce_weight=0.0)
    assert recorder.largest * 4 == 64 * 2**20


def test_evaluation_equals_training_and_does_no_gradient_work() -> None:
    batch, weights = make_batch(), {"kl_weight": 0.6, "ce_weight": 0.4, "temperature": 2.0, "chunk_tokens": 4}
    trained = distillation_loss(*batch.args(), **weights)
    detached = replace(
        batch, student_hidden_TD=batch.student_hidden_TD.detach(), student_head_VD=batch.student_head_VD.detach()
    )
    chunks = 3
    for arguments, grad_enabled in ((batch, False), (detached, True)):
        with torch.set_grad_enabled(grad_enabled), Recorder() as recorder:
            evaluated = distillation_loss(*arguments.args(), **weights)
        assert recorder.products == 2 * chunks
        assert recorder.exponentials == chunks  # the teacher's probabilities; the gradient would need the student's
        assert not evaluated.total.requires_grad
        assert torch.equal(evaluated.total, trained.total)
        assert torch.equal(evaluated.kl, trained.kl)
        assert torch.equal(evaluated.cross_entropy, trained.cross_entropy)


@pytest.mark.parametrize(
    ("kl_weight", "learns_hidden", "learns_head", "products"),
    [(1.0, True, True, 4), (0.0, True, True, 3), (1.0, True, False, 3), (1.0, False, True, 3), (0.0, True, False, 2)],
)
def test_only_wanted_products_are_computed(
    kl_weight: float, learns_hidden: bool, learns_head: bool, products: int
) -> None:
    batch = make_batch()
    batch.student_hidden_TD.requires_grad_(learns_hidden)
    batch.student_head_VD.requires_grad_(learns_head)
    with Recorder() as recorder:
        distillation_loss(*batch.args(), kl_weight=kl_weight, ce_weight=1.0).total.backward()
    assert recorder.products == products
    assert (batch.student_hidden_TD.grad is not None) == learns_hidden
    assert (batch.student_head_VD.grad is not None) == learns_head


@pytest.mark.parametrize(("ce_weight", "exponentials"), [(0.0, 2), (0.4, 3)])
def test_only_a_weighted_cross_entropy_costs_a_second_softmax(ce_weight: float, exponentials: int) -> None:
    with Recorder() as recorder:
        distillation_loss(*make_batch().args(), kl_weight=1.0, ce_weight=ce_weight, temperature=2.0)
    assert recorder.exponentials == exponentials


def test_only_the_total_has_a_gradient() -> None:
    loss = distillation_loss(*make_batch().args(), kl_weight=0.6, ce_weight=0.4)
    assert loss.total.requires_grad
    assert not loss.kl.requires_grad
    assert not loss.cross_entropy.requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    loss = distillation_loss(*make_batch().args(), kl_weight=0.6, ce_weight=0.4)
    loss.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total.backward()


@pytest.mark.parametrize("target", [-1, 37])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    batch = make_batch()
    batch.targets_T[0] = target
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        distillation_loss(*batch.args(), kl_weight=0.6, ce_weight=0.4)


BAD_ARGUMENTS = {
    "student rows": ({"student_hidden_TD": torch.zeros(12, 11)}, {}, r"student's hidden states are \(12, 11\)"),
    "student width": ({"student_hidden_TD": torch.zeros(13, 10)}, {}, r"head of \(37, 11\) need \(13, 11\)"),
    "teacher rows": ({"teacher_hidden_TD": torch.zeros(12, 17)}, {}, "teacher's hidden states"),
    "vocabularies": ({"teacher_head_VD": torch.zeros(38, 17)}, {}, "vocabulary is 38 and student's 37"),
    "no teacher": ({"teacher_hidden_TD": None}, {}, "kl_weight=0.6 needs a teacher"),
    "negative weight": ({}, {"kl_weight": -0.1}, "none may be negative"),
    "no weight": ({}, {"kl_weight": 0.0, "ce_weight": 0.0}, "one must be positive"),
    "nan weight": ({}, {"ce_weight": float("nan")}, "ce_weight=nan"),
    "temperature": ({}, {"temperature": 0.0}, "temperature=0.0 must be positive"),
    "chunk": ({}, {"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
}


@pytest.mark.parametrize(("tensors", "options", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_arguments_that_do_not_fit_are_refused(tensors: dict[str, Any], options: dict[str, Any], message: str) -> None:
    batch = replace(make_batch(), **tensors)
    with pytest.raises(ValueError, match=message):
        distillation_loss(*batch.args(), **{"kl_weight": 0.6, "ce_weight": 0.4} | options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [37, 1025, 50_000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE), (torch.bfloat16, HALF)]
)
def test_cuda_equals_the_plain_formula(
    dtype: torch.dtype, tolerance: float, vocabulary: int, temperature: float
) -> None:
    batch = make_batch(tokens=40, vocabulary=vocabulary).to(dtype, "cuda")
    expected = batch.to(torch.float64, "cuda")
    assert_same_loss(batch, expected, tolerance, 16, kl_weight=0.6, ce_weight=0.4, temperature=temperature)
