"""Documents packed into a row are to the scan and the convolution what each of them is alone, to the last bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.layers.packing import Packing, pack
from elastic_core.layers.ssm import causal_conv, ssd_scan

EXACT = 1e-12  # two orders of summation of a few hundred float64 terms

# The lengths of the documents of two rows of 41 tokens: within a chunk of 8, across some, of one token, at its edges.
LENGTHS = [[7, 1, 1, 15, 17], [8, 16, 3, 14]]
TOKENS = 41
CHUNKS = [1, 8, 64]

Inputs = list[Tensor]


def numbers(lengths: list[list[int]]) -> Tensor:
    rows = [torch.arange(len(of_row)).repeat_interleave(torch.tensor(of_row)) for of_row in lengths]
    return torch.stack(rows).int()


def packed(lengths: list[list[int]]) -> Packing:
    packing = pack(numbers(lengths))
    assert packing is not None
    return packing


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scan_inputs(dtype: torch.dtype = torch.float64) -> Inputs:
    """x, dt, A, B, C, D of 6 heads in 2 groups, and a state to start from."""
    inputs = [
        normal(2, TOKENS, 6, 5, seed=0),
        F.softplus(normal(2, TOKENS, 6, seed=1)),
        -normal(6, seed=2).exp(),
        normal(2, TOKENS, 2, 4, seed=3),
        normal(2, TOKENS, 2, 4, seed=4),
        normal(6, seed=5),
        normal(2, 6, 5, 4, seed=6),
    ]
    return [t.to(dtype).requires_grad_() for t in inputs]


def scan(inputs: Inputs, chunk: int, packing: Packing | None) -> tuple[Tensor, Tensor]:
    *sequence, state = inputs
    return ssd_scan(*sequence, chunk_size=chunk, initial_state_BHPN=state, packing=packing)


def conv_inputs(dtype: torch.dtype = torch.float64) -> Inputs:
    """x, weight, bias and the inputs before the first token, of 6 channels and 4 taps."""
    shapes = [(2, TOKENS, 6), (6, 4), (6,), (2, 3, 6)]
    return [normal(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= EXACT * expected.abs().max().item()


def gradients(outputs: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, normal(*outputs.shape, seed=9).to(outputs.dtype), retain_graph=True)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_packed_document_is_scanned_as_it_is_alone(chunk: int) -> None:
    inputs, packing = scan_inputs(), packed(LENGTHS)
    y_BTHP, state_BHPN = scan(inputs, chunk, packing)
    x, dt, A, B, C, D, start = inputs
    alone, states = [], [torch.empty(0)] * 2
    for row, first, end in packing.spans:
        of = (slice(row, row + 1), slice(first, end))
        before = start[row : row + 1] if first == 0 else torch.zeros_like(start[:1])
        y, states[row] = scan([x[of], dt[of], A, B[of], C[of], D, before], chunk, None)
        alone.append(y[0])
    expected = torch.cat(alone).view_as(y_BTHP)
    assert_close(y_BTHP, expected)
    assert_close(state_BHPN, torch.cat(states))
    for ours, theirs in zip(gradients(y_BTHP, inputs), gradients(expected, inputs), strict=True):
        assert_close(ours, theirs)


def test_a_packed_document_is_convolved_as_it_is_alone() -> None:
    inputs, packing = conv_inputs(), packed(LENGTHS)
    x, weight, bias, start = inputs
    y_BTC, recent = causal_conv(*inputs, packing)
    alone = []
    for row, first, end in packing.spans:
        before = start[row : row + 1] if first == 0 else None
        alone.append(causal_conv(x[row : row + 1, first:end], weight, bias, before)[0][0])
    expected = torch.cat(alone).view_as(y_BTC)
    assert_close(y_BTC, expected)
    assert torch.equal(recent, x[:, -3:])
    for ours, theirs in zip(gradients(y_BTC, inputs), gradients(expected, inputs), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_bit_of_a_document_or_its_gradients_depends_on_the_documents_before(chunk: int, dtype: torch.dtype) -> None:
    """Every gradient of a loss on the second row's third document, for two contents of what stands before."""
    packing, first, end = packed(LENGTHS), 24, 27
    functions = {
        "scan": (scan_inputs(dtype), lambda inputs: scan(inputs, chunk, packing)[0]),
        "conv": (conv_inputs(dtype), lambda inputs: causal_conv(*inputs, packing)[0]),
    }
    for name, (inputs, function) in functions.items():
        changed = [t.detach().clone() for t in inputs]
        for i in (0, 1, 3, 4) if name == "scan" else (0,):
            changed[i][1, :first] = changed[i][1, :first].flip(0) * 3
        changed[-1].add_(1.0)  # what was before the row, too
        found = []
        for given in (inputs, [t.requires_grad_() for t in changed]):
            document = function(given)[1, first:end]
            found.append((document, *gradients(document, given)))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other), name


@pytest.mark.parametrize("chunk", CHUNKS)
def test_alignment_gives_every_document_chunks_of_its_own(chunk: int) -> None:
    packing = packed(LENGTHS)
    alignment = packing.aligned(chunk)
    x_BT = torch.arange(1, 2 * TOKENS + 1).view(2, TOKENS)
    spread_BL = alignment.spread(x_BT)
    assert torch.equal(alignment.gather(spread_BL), x_BT)
    assert int((spread_BL == 0).sum()) == spread_BL.numel() - x_BT.numel()
    for row, of_row in enumerate(LENGTHS):
        at, x = 0, 0
        for number, length in enumerate(of_row):
            assert at % chunk == 0
            assert torch.equal(spread_BL[row, at : at + length], x_BT[row, x : x + length])
            assert alignment.seq_idx_BL[row, at] == number
            at, x = at + -(-length // chunk) * chunk, x + length
    chunks = alignment.seq_idx_BL.unflatten(1, (-1, chunk))
    assert bool((chunks == chunks[..., :1]).all())


def test_rows_of_one_document_each_need_no_packing() -> None:
    assert pack(torch.tensor([[0, 0, 0], [2, 2, 2]])) is None


def test_numbers_that_fall_along_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_idx falls along a row"):
        pack(torch.tensor([[0, 1, 0]]))
