"""The scan against the recurrence that defines it; the convolution and the norm against PyTorch's and transformers'."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.nemotron_h import modeling_nemotron_h as stock

from elastic_core.layers import ssm
from elastic_core.layers.ssm import causal_conv, gated_rms_norm, ssd_scan, ssd_step

EXACT = 1e-12  # two orders of summation of a few hundred float64 terms
FLOAT32 = 1e-5  # the same in float32
FORGETFUL = 1e-4  # sums of logarithms of decays reach -200 in float32: the exponents after that are exact to 2e-5
BFLOAT16 = 2**-7  # inputs are the same; one rounding of the output to 8 bits, relative to the largest output

Inputs = list[Tensor]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The largest difference is at most `tolerance` of the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = (actual - expected).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item()


def scan_inputs(tokens: int, dtype: torch.dtype = torch.float64, *, batch: int = 2, heads: int = 6) -> Inputs:
    """Random x, dt, A, B, C, D of a scan with 2 groups of heads, and a state to start from."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    head_dim, groups, state = 5, 2, 4
    inputs = [
        normal(batch, tokens, heads, head_dim),
        F.softplus(normal(batch, tokens, heads)),
        -normal(heads).exp(),
        normal(batch, tokens, groups, state),
        normal(batch, tokens, groups, state),
        normal(heads),
        normal(batch, heads, head_dim, state),
    ]
    return [t.to(dtype).requires_grad_() for t in inputs]


def scan(inputs: Inputs, chunk_size: int) -> tuple[Tensor, Tensor]:
    *sequence, state = inputs
    return ssd_scan(*sequence, chunk_size=chunk_size, initial_state_BHPN=state)


def recurrence(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other."""
    x_BTHP, dt_BTH, A_H, B_BTGN, C_BTGN, D_H, state_BHPN = inputs
    heads_in_group = x_BTHP.shape[2] // B_BTGN.shape[2]
    B_BTHN, C_BTHN = (t.repeat_interleave(heads_in_group, dim=2) for t in (B_BTGN, C_BTGN))
    outputs = []
    for t in range(x_BTHP.shape[1]):
        decay_BH = torch.exp(dt_BTH[:, t] * A_H)
        added_BHPN = torch.einsum("bh,bhp,bhn->bhpn", dt_BTH[:, t], x_BTHP[:, t], B_BTHN[:, t])
        state_BHPN = decay_BH[..., None, None] * state_BHPN + added_BHPN
        outputs.append(torch.einsum("bhpn,bhn->bhp", state_BHPN, C_BTHN[:, t]) + D_H[:, None] * x_BTHP[:, t])
    return torch.stack(outputs, dim=1), state_BHPN


def gradients(outputs: tuple[Tensor, ...], inputs: Inputs) -> tuple[Tensor, ...]:
    """Gradients of a fixed random weighting of the outputs."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in outputs]
    return torch.autograd.grad(outputs, inputs, weights)


def slices(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The inputs of the tokens in [start, stop)."""
    x, dt, A, B, C, D, state = inputs
    return [x[:, start:stop], dt[:, start:stop], A, B[:, start:stop], C[:, start:stop], D, state]


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64, 256])
@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 70])
def test_chunked_scan_equals_recurrence(tokens: int, chunk_size: int) -> None:
    inputs = scan_inputs(tokens)
    for actual, expected in zip(scan(inputs, chunk_size), recurrence(inputs), strict=True):
        assert_close(actual, expected, EXACT)


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_gradients_of_the_chunked_scan_equal_those_of_the_recurrence(chunk_size: int) -> None:
    inputs = scan_inputs(tokens=20)
    actual, expected = gradients(scan(inputs, chunk_size), inputs), gradients(recurrence(inputs), inputs)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, EXACT)


def test_no_initial_state_is_a_zero_state() -> None:
    *sequence, state = scan_inputs(tokens=10)
    actual = ssd_scan(*sequence, chunk_size=4)
    for one, other in zip(actual, scan([*sequence, torch.zeros_like(state)], 4), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("split", [1, 8, 12])
def test_two_scans_with_the_state_carried_equal_one(split: int) -> None:
    inputs = scan_inputs(tokens=21)
    y, state = scan(inputs, 8)
    first, carried = scan(slices(inputs, 0, split), 8)
    second, last = scan([*slices(inputs, split, 21)[:-1], carried], 8)
    assert_close(torch.cat([first, second], dim=1), y, EXACT)
    assert_close(last, state, EXACT)


def test_steps_go_on_from_a_scan() -> None:
    inputs = scan_inputs(tokens=13)
    y, last = recurrence(inputs)
    outputs, state = scan(slices(inputs, 0, 9), 4)
    for t in range(9, 13):
        x, dt, A, B, C, D, _ = inputs
        given = state.clone()
        step, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, given)
        assert not torch.equal(state, given)
        outputs = torch.cat([outputs, step.unsqueeze(1)], dim=1)
    assert_close(outputs, y, EXACT)
    assert_close(state, last, EXACT)


def test_gradients_of_a_step_equal_those_of_the_recurrence() -> None:
    inputs = scan_inputs(tokens=1)
    x, dt, A, B, C, D, state = inputs
    y, new_state = ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)
    actual = gradients((y.unsqueeze(1), new_state), inputs)
    for one, other in zip(actual, gradients(recurrence(inputs), inputs), strict=True):
        assert_close(one, other, EXACT)


def test_later_tokens_do_not_change_earlier_outputs() -> None:
    inputs = [t.detach() for t in scan_inputs(tokens=20)]
    changed = [t.clone() for t in inputs]
    for sequence in (changed[i] for i in (0, 1, 3, 4)):
        sequence[:, 11:] += 10.0
    assert_close(scan(changed, 8)[0][:, :11], scan(inputs, 8)[0][:, :11], EXACT)


def test_rows_of_a_batch_do_not_mix() -> None:
    inputs = scan_inputs(tokens=12)
    y, state = scan(inputs, 8)
    for row in range(2):
        alone = [t if t.dim() == 1 else t[row : row + 1] for t in inputs]
        assert_close(scan(alone, 8)[0], y[row : row + 1], EXACT)
        assert_close(scan(alone, 8)[1], state[row : row + 1], EXACT)


@pytest.mark.parametrize("chunk_size", [16, 64])
def test_scan_equals_transformers_in_float32(chunk_size: int) -> None:
    inputs = scan_inputs(tokens=50, dtype=torch.float32)
    x, dt, A, B, C, D, state = inputs
    expected = stock.mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D=D, initial_states=state, return_final_states=True)
    for actual, other in zip(scan(inputs, 32), expected, strict=True):
        assert_close(actual, other, FLOAT32)
    for actual, other in zip(gradients(scan(inputs, 32), inputs), gradients(expected, inputs), strict=True):
        assert_close(actual, other, FLOAT32)


@pytest.mark.parametrize("forgetful", [slice(0, 16), slice(3, 4), slice(7, 9)], ids=["all", "one", "across"])
@pytest.mark.parametrize("log_decay", [-2e2, -1e4, -1e8])
def test_strong_decay_forgets_and_leaves_the_other_tokens_exact(log_decay: float, forgetful: slice) -> None:
    inputs = scan_inputs(tokens=16, dtype=torch.float32)
    dt_BTH = inputs[1].detach().clone()
    dt_BTH[:, forgetful] = log_decay / inputs[2].detach()
    inputs[1] = dt_BTH.requires_grad_()
    actual, expected = scan(inputs, 8), recurrence(inputs)
    for one, other in zip(
        (*actual, *gradients(actual, inputs)), (*expected, *gradients(expected, inputs)), strict=True
    ):
        assert one.isfinite().all()
        assert_close(one, other, FORGETFUL)


def test_tokens_with_zero_dt_leave_the_state_alone() -> None:
    inputs = scan_inputs(tokens=10)
    inputs[1] = torch.zeros_like(inputs[1])
    y, state = scan(inputs, 4)
    assert torch.equal(state, inputs[-1])
    assert_close(y, recurrence(inputs)[0], EXACT)


def test_scan_is_deterministic() -> None:
    inputs = scan_inputs(tokens=100, dtype=torch.float32)
    runs = [(*scan(inputs, 32), *gradients(scan(inputs, 32), inputs)) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_bfloat16_is_float32_rounded_once() -> None:
    inputs = scan_inputs(tokens=40, dtype=torch.bfloat16)
    wide = [t.float() for t in inputs]
    y, state = scan(inputs, 16)
    expected_y, expected_state = scan(wide, 16)
    assert torch.equal(y, expected_y.bfloat16())
    assert torch.equal(state, expected_state)
    for one, other in zip(gradients((y, state), inputs), gradients((expected_y, expected_state), wide), strict=True):
        assert_close(one.float(), other, BFLOAT16)


def test_autocast_narrows_neither_scan_nor_step() -> None:
    inputs = scan_inputs(tokens=9, dtype=torch.float32)
    x, dt, A, B, C, D, state = inputs

    def outputs() -> tuple[Tensor, ...]:
        return *scan(inputs, 4), *ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state)

    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs()
    wide = outputs()
    for one, other in zip((*cast, *gradients(cast, inputs)), (*wide, *gradients(wide, inputs)), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_step_is_float32_rounded_once() -> None:
    x, dt, A, B, C, D, state = (t.detach() for t in scan_inputs(tokens=1, dtype=torch.bfloat16))
    narrow = [x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state]
    y, new_state = ssd_step(*narrow)
    expected_y, expected_state = ssd_step(*(t.float() for t in narrow))
    assert torch.equal(y, expected_y.bfloat16())
    assert torch.equal(new_state, expected_state)


# The convolution


def conv_inputs(tokens: int, width: int, dtype: torch.dtype = torch.float64) -> Inputs:
    """Random x, weight, bias and the inputs before the first token."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, tokens, 6), (6, width), (6,), (2, width - 1, 6)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def plain_conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, initial_BKC: Tensor) -> Tensor:
    inputs_BCT = torch.cat([initial_BKC, x_BTC], dim=1).transpose(1, 2)
    return F.silu(F.conv1d(inputs_BCT, weight_CK.unsqueeze(1), bias_C, groups=len(weight_CK))).transpose(1, 2)


@pytest.fixture(params=[1, 60, 2**18], ids="segment_values={}".format)
def segment_values(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Segments of one token, of a few, and of all."""
    monkeypatch.setattr(ssm, "SEGMENT_VALUES", request.param)
    return request.param


@pytest.mark.usefixtures("segment_values")
@pytest.mark.parametrize(("tokens", "width"), [(1, 4), (2, 4), (17, 4), (9, 2), (5, 1)])
def test_conv_equals_conv1d_with_gradients(tokens: int, width: int) -> None:
    inputs = conv_inputs(tokens, width)
    y, recent = causal_conv(*inputs)
    expected_y, expected_recent = plain_conv(*inputs), torch.cat([inputs[3], inputs[0]], dim=1)[:, tokens:]
    assert_close(y, expected_y, EXACT)
    assert torch.equal(recent, expected_recent)
    expected = gradients((expected_y, expected_recent), inputs)
    for one, other in zip(gradients((y, recent), inputs), expected, strict=True):
        assert one.numel() == 0 or assert_close(one, other, EXACT) is None


def test_conv_starts_from_zeros_and_works_without_bias() -> None:
    x, weight, _, initial = conv_inputs(tokens=7, width=4)
    y, _ = causal_conv(x, weight, None)
    assert_close(y, plain_conv(x, weight, None, torch.zeros_like(initial)), EXACT)


@pytest.mark.parametrize("splits", [[1] * 11, [2, 1, 8], [10, 1]])
def test_conv_goes_on_from_the_recent_inputs(splits: list[int]) -> None:
    x, weight, bias, recent = conv_inputs(tokens=11, width=4)
    expected_y, expected_recent = causal_conv(x, weight, bias, recent)
    outputs = []
    for start, stop in itertools.pairwise([0, *itertools.accumulate(splits)]):
        y, recent = causal_conv(x[:, start:stop], weight, bias, recent)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), expected_y, EXACT)
    assert torch.equal(recent, expected_recent)


def test_recent_inputs_do_not_hold_the_sequence_in_memory() -> None:
    x, weight, bias, _ = (t.detach() for t in conv_inputs(tokens=100, width=4))
    _, recent = causal_conv(x, weight, bias)
    assert recent.untyped_storage().nbytes() == recent.numel() * recent.element_size()


def test_bfloat16_conv_is_float32_rounded_once() -> None:
    inputs = conv_inputs(tokens=20, width=4, dtype=torch.bfloat16)
    y, recent = causal_conv(*inputs)
    assert torch.equal(y, causal_conv(*(t.float() for t in inputs))[0].bfloat16())
    assert recent.dtype == torch.bfloat16


# The gated norm

GROUPS, EPS = 3, 1e-5


def norm_inputs(dtype: torch.dtype = torch.float64, channels: int = 24) -> Inputs:
    """Random y, gate and weight."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 10, channels), (2, 10, channels), (channels,)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.usefixtures("segment_values")
def test_norm_equals_transformers_with_gradients() -> None:
    inputs = norm_inputs(torch.float32)
    y, gate, weight = inputs
    norm = stock.NemotronHRMSNormGated(24, group_size=8, eps=EPS)
    norm.weight = torch.nn.Parameter(weight.detach())
    actual, expected = gated_rms_norm(*inputs, GROUPS, EPS), norm(y, gate)
    assert_close(actual, expected, FLOAT32)
    wanted = gradients((expected,), [y, gate, norm.weight])
    for one, other in zip(gradients((actual,), inputs), wanted, strict=True):
        assert_close(one, other, FLOAT32)


@pytest.mark.usefixtures("segment_values")
def test_norm_under_a_zero_one_mask_is_the_norm_of_the_kept_channels() -> None:
    inputs = norm_inputs()
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0], [1] * 5 + [0] * 3]).flatten().double()
    kept = mask.nonzero().squeeze(1)
    masked = gated_rms_norm(*inputs, GROUPS, EPS, mask)
    sliced = gated_rms_norm(*(t[..., kept] for t in inputs), GROUPS, EPS)
    assert_close(masked[..., kept], sliced, EXACT)
    assert not masked[..., mask == 0].any()
    actual = gradients((masked[..., kept],), inputs)
    for one, other in zip(actual, gradients((sliced,), inputs), strict=True):
        assert_close(one, other, EXACT)


def test_mask_of_ones_changes_nothing() -> None:
    inputs = norm_inputs()
    assert_close(
        gated_rms_norm(*inputs, GROUPS, EPS, torch.ones(24).double()), gated_rms_norm(*inputs, GROUPS, EPS), EXACT
    )


@pytest.mark.usefixtures("segment_values")
def test_soft_mask_gives_every_group_its_weighted_root_mean_square() -> None:
    y, gate, weight = norm_inputs()
    mask = torch.tensor([1, 0.9, 0.6, 0.25]).double().repeat(2 * GROUPS)
    expected = []
    for group in range(GROUPS):
        of = slice(8 * group, 8 * group + 8)
        v = y[..., of] * F.silu(gate[..., of]) * mask[of]
        expected.append(v / torch.sqrt((v**2).sum(-1, keepdim=True) / mask[of].sum() + EPS) * weight[of])
    assert_close(gated_rms_norm(y, gate, weight, GROUPS, EPS, mask), torch.cat(expected, dim=-1), EXACT)


def test_each_row_may_have_its_own_mask() -> None:
    inputs = norm_inputs()
    y, gate, weight = inputs
    masks = torch.rand(2, 1, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    actual = gated_rms_norm(*inputs, GROUPS, EPS, masks)
    for row in range(2):
        of = slice(row, row + 1)
        assert_close(actual[of], gated_rms_norm(y[of], gate[of], weight, GROUPS, EPS, masks[row, 0]), EXACT)


def test_mask_has_exact_gradients() -> None:
    y, gate, weight = norm_inputs()
    mask = torch.rand(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()

    def norm(mask: Tensor) -> Tensor:
        return gated_rms_norm(y.detach(), gate.detach(), weight.detach(), GROUPS, EPS, mask)

    assert torch.autograd.gradcheck(norm, mask)


def test_bfloat16_norm_is_float32_rounded_once() -> None:
    inputs = norm_inputs(torch.bfloat16)
    expected = gated_rms_norm(*(t.float() for t in inputs), GROUPS, EPS).bfloat16()
    assert torch.equal(gated_rms_norm(*inputs, GROUPS, EPS), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda: scan(scan_inputs(tokens=9), 4),
        lambda: causal_conv(*conv_inputs(tokens=9, width=4)),
        lambda: (gated_rms_norm(*norm_inputs(), GROUPS, EPS),),
    ],
    ids=["scan", "conv", "norm"],
)
def test_float64_never_passes_through_a_narrower_type(function: Callable[[], tuple[Tensor, ...]]) -> None:
    seen: set[torch.dtype] = set()

    def pack(saved: Tensor) -> Tensor:
        seen.add(saved.dtype)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        outputs = function()
    assert {t.dtype for t in outputs} | seen == {torch.float64}
