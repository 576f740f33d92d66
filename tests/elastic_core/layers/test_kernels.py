"""The fused kernels against ssm.py, and the choice between them.

Triton's interpreter runs the kernels of mamba-ssm on a CPU. It takes triton, einops and a build of mamba-ssm without
CUDA, in a folder of their own, for transformers too uses a mamba-ssm that it finds:

    pip install --no-deps --target FOLDER triton einops
    MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
        pip install --no-deps --no-build-isolation --target FOLDER mamba-ssm
    TRITON_KERNELS=FOLDER pytest tests/elastic_core/layers/test_kernels.py

These tests run this file as a child process, for TRITON_INTERPRET must be set before a kernel is defined.
"""

import contextlib
import importlib.machinery
import inspect
import json
import logging
import math
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.layers import kernels, ssm
from elastic_core.layers.kernels import TORCH, TRITON, has_causal_conv1d, has_mamba_ssm, select_backend
from elastic_core.layers.packing import Packing, pack

FLOAT32 = 1e-5  # sums of at most a few hundred float32 terms in another order, relative to the largest value
TF32 = 1e-2  # on a GPU Triton multiplies float32 matrices with 10 bits of mantissa; results go through three products
BFLOAT16 = 5e-2  # the same with 7 bits; ssm.py does not round between its products, the kernels do

Inputs = dict[str, Tensor | None]
Case = tuple[str, Inputs, dict[str, Any]]  # function, tensors, other arguments

# The model computes these in float32 whatever the dtype of the others.
WIDE = {"dt_BTH", "dt_BH", "A_H", "D_H", "initial_state_BHPN", "state_BHPN"}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def documents(*rows: list[int]) -> Packing:
    """Rows of documents of these lengths."""
    packing = pack(torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]))
    assert packing is not None
    return packing


def scan_case(tokens: int, *, from_zeros: bool = False, packing: Packing | None = None) -> Case:
    inputs = {
        "x_BTHP": normal(2, tokens, 4, 16),
        "dt_BTH": F.softplus(normal(2, tokens, 4, seed=1) - 1),
        "A_H": -normal(4, seed=2).exp(),
        "B_BTGN": normal(2, tokens, 2, 16, seed=3, scale=0.5),
        "C_BTGN": normal(2, tokens, 2, 16, seed=4, scale=0.5),
        "D_H": normal(4, seed=5),
        "initial_state_BHPN": None if from_zeros else normal(2, 4, 16, 16, seed=6),
    }
    return "ssd_scan", inputs, {"chunk_size": 16, "packing": packing}


def step_case() -> Case:
    inputs = {
        "x_BHP": normal(2, 4, 16),
        "dt_BH": F.softplus(normal(2, 4, seed=1) - 1),
        "A_H": -normal(4, seed=2).exp(),
        "B_BGN": normal(2, 2, 16, seed=3),
        "C_BGN": normal(2, 2, 16, seed=4),
        "D_H": normal(4, seed=5),
        "state_BHPN": normal(2, 4, 16, 16, seed=6),
    }
    return "ssd_step", inputs, {}


def conv_case(
    tokens: int,
    width: int = 4,
    *,
    start: int = 8,
    step: int = 48,
    bare: bool = False,
    packing: Packing | None = None,
) -> Case:
    """x is a view of 32 channels into rows of `step` values, as a projection's output gives it."""
    inputs = {
        "x_BTC": normal(2, tokens, step)[..., start : start + 32],
        "weight_CK": normal(32, width, seed=1),
        "bias_C": None if bare else normal(32, seed=2),
        "initial_BKC": None if bare else normal(2, width - 1, 32, seed=3),
    }
    return "causal_conv", inputs, {"packing": packing}


def norm_case(*, masked: bool = False) -> Case:
    inputs = {
        "y_BTI": normal(2, 9, 48),
        "gate_BTI": normal(2, 9, 48, seed=1),
        "weight_I": normal(48, seed=2),
        "mask": normal(48, seed=3).sigmoid() if masked else None,
    }
    return "gated_rms_norm", inputs, {"n_groups": 3, "eps": 1e-5}


PACKED = [7, 1, 20, 12], [16, 3, 21]
TRITON_CASES = {
    "scan": scan_case(tokens=40),
    "scan of whole chunks from zeros": scan_case(tokens=32, from_zeros=True),
    "scan of less than a chunk": scan_case(tokens=5),
    "scan of packed documents": scan_case(tokens=40, from_zeros=True, packing=documents(*PACKED)),
    "step": step_case(),
    "norm": norm_case(),
}
CONV_CASES = {
    "conv": conv_case(tokens=40),
    "conv of fewer tokens than taps": conv_case(tokens=2),
    "conv of one token": conv_case(tokens=1),
    "conv from zeros without bias": conv_case(tokens=9, width=3, bare=True),
    "conv of packed documents": conv_case(tokens=40, bare=True, packing=documents(*PACKED)),
    "conv of a view that starts off a vector": conv_case(tokens=9, start=3),
    "conv of a view that steps off a vector": conv_case(tokens=9, step=45),
}
# Of time steps: NVIDIA's own, and one with both ends.
LIMITS: list[tuple[float, float | None]] = [(0.0, None), (1e-3, 0.5)]
# Cases without a kernel: float32 ones that need neither package, besides everything in float64.
PLAIN_CASES = {"norm under a mask": norm_case(masked=True), "conv of more taps": conv_case(tokens=9, width=6)}


def run(module: types.ModuleType, case: Case, *, grad: bool, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The outputs, and the gradients of a fixed weighting of them, by name."""
    function, given, options = case
    inputs = {name: t for name, t in given.items() if t is not None}
    for name, t in inputs.items():
        # Copies that keep the strides and the start of a view.
        storage = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype).set_(t.untyped_storage())
        moved = storage.to(device, torch.promote_types(dtype, torch.float32) if name in WIDE else dtype)
        inputs[name] = moved.as_strided(t.shape, t.stride(), t.storage_offset()).requires_grad_(grad)
    moved_options = {name: v.to(torch.device(device)) if isinstance(v, Packing) else v for name, v in options.items()}
    outputs = getattr(module, function)(**{name: inputs.get(name) for name in given}, **moved_options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    if grad:
        weights = [normal(*t.shape, seed=9).to(t) for t in outputs]
        gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
        named |= {f"gradient of {name}": t for name, t in zip(inputs, gradients, strict=True)}
    return named


def differences(case: Case, *, grad: bool, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """The largest difference between kernels.py and ssm.py in each result, over the result's largest value."""
    fused, plain = (run(module, case, grad=grad, device=device, dtype=dtype) for module in (kernels, ssm))
    assert {name: t.dtype for name, t in fused.items()} == {name: t.dtype for name, t in plain.items()}
    return {name: ((fused[name] - t).abs().max() / t.abs().max()).item() for name, t in plain.items()}


# In Triton's interpreter


def interpret() -> dict[str, dict[str, float]]:
    """Run the cases on a CPU, where mamba-ssm expects a GPU. In the child process."""
    compiled = types.ModuleType("selective_scan_cuda")  # Mamba-1's extension, which `import mamba_ssm` imports too
    compiled.__spec__ = importlib.machinery.ModuleSpec(compiled.__name__, None)
    sys.modules[compiled.__name__] = compiled
    torch.cuda.device = lambda _: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda _: types.SimpleNamespace(multi_processor_count=2)
    found = {name: differences(case, grad=name != "step") for name, case in TRITON_CASES.items()}
    found |= {f"limit {limit}": time_step_differences(limit) for limit in LIMITS}
    return found | {"later documents": later_document_differences()}


def later_document_differences(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """What another first document changes in the others of its row, and in the gradients of a loss on them."""
    name, inputs, options = scan_case(tokens=40, from_zeros=True, packing=documents(*PACKED).to(torch.device(device)))
    found = []
    for scale in (1, -3):
        given = {
            key: t.to(device, torch.promote_types(dtype, torch.float32) if key in WIDE else dtype).clone()
            for key, t in inputs.items()
            if t is not None
        }
        for key in ("x_BTHP", "B_BTGN", "C_BTGN"):
            given[key][1, : PACKED[1][0]] *= scale
        given["dt_BTH"][1, : PACKED[1][0]] *= abs(scale)
        given = {key: t.requires_grad_() for key, t in given.items()}
        later = kernels.ssd_scan(**given, **options)[0][1, PACKED[1][0] :]
        gradients = torch.autograd.grad(later, list(given.values()), normal(*later.shape, seed=9).to(later))
        found.append({name: later, **dict(zip(given, gradients, strict=True))})
    return {key: (found[0][key] - found[1][key]).abs().max().item() for key in found[0]}


def time_step_differences(limit: tuple[float, float | None]) -> dict[str, float]:
    """`ssm.time_steps` and both scans against mamba-ssm's function, which makes its own steps from the projection."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    _, inputs, options = scan_case(tokens=40, from_zeros=True)
    x, _, A, B, C, D, _ = inputs.values()
    projection_BTH, bias_H = normal(2, 40, 4, seed=7, scale=4), torch.linspace(-14, 0, 4)
    stock = mamba_chunk_scan_combined(
        x,
        projection_BTH,
        A,
        B,
        C,
        options["chunk_size"],
        D=D,
        dt_bias=bias_H,
        dt_softplus=True,
        dt_limit=(limit[0], math.inf if limit[1] is None else limit[1]),
    )
    dt_BTH = ssm.time_steps(projection_BTH, bias_H, limit)
    assert dt_BTH.min() < 1e-6 or limit[0] > 0, dt_BTH.min()
    scans = {module.__name__: module.ssd_scan(x, dt_BTH, A, B, C, D, **options)[0] for module in (ssm, kernels)}
    return {name: ((y_BTHP - stock).abs().max() / stock.abs().max()).item() for name, y_BTHP in scans.items()}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    folder = os.environ.get("TRITON_KERNELS")
    if folder is None:
        pytest.skip("TRITON_KERNELS is not set; this file's docstring says how to install the kernels")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([folder, str(Path(kernels.__file__).parents[2])]),
        "TRITON_INTERPRET": "1",
        "MAMBA_DETERMINISTIC": "1",  # otherwise the kernels are tuned first, on a GPU
    }
    child = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_no_bit_of_a_packed_document_depends_on_the_one_before(interpreted: dict[str, dict[str, float]]) -> None:
    assert not any(interpreted["later documents"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_of_a_packed_document_depends_on_the_one_before_on_a_gpu(dtype: torch.dtype) -> None:
    pytest.importorskip("mamba_ssm")
    assert not any(later_document_differences("cuda", dtype).values())


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_time_steps_and_their_limits_are_those_of_mamba_ssm(
    interpreted: dict[str, dict[str, float]], limit: tuple[float, float | None]
) -> None:
    assert max(interpreted[f"limit {limit}"].values()) <= FLOAT32


@pytest.mark.parametrize("name", TRITON_CASES)
def test_interpreted_kernels_equal_plain_pytorch(interpreted: dict[str, dict[str, float]], name: str) -> None:
    assert any(interpreted[name].values())  # else nothing but ssm.py ran
    assert {result: value for result, value in interpreted[name].items() if not value <= FLOAT32} == {}


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TF32), (torch.bfloat16, BFLOAT16)], ids=str)
@pytest.mark.parametrize("name", TRITON_CASES | CONV_CASES | PLAIN_CASES)
def test_cuda_kernels_equal_plain_pytorch(name: str, dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("mamba_ssm")
    if name in CONV_CASES:
        pytest.importorskip("causal_conv1d")
    case = (TRITON_CASES | CONV_CASES | PLAIN_CASES)[name]
    found = differences(case, grad=name != "step", device="cuda", dtype=dtype)
    assert {result: value for result, value in found.items() if not value <= tolerance} == {}


# Without the packages


@pytest.fixture
def stand_in_for_causal_conv1d(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the conditions of causal-conv1d 1.7 on its inputs, computed by PyTorch."""

    def causal_conv1d_fn(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        seq_idx: Tensor | None,
        initial_states: Tensor | None,
        activation: str,
    ) -> Tensor:
        assert x.stride(1) == 1
        assert not any(n % 8 for n in (x.storage_offset(), x.stride(0), x.stride(2), x.shape[1]))
        assert bias is None or bias.dtype == weight.dtype
        assert 2 <= weight.shape[1] <= 4
        assert activation == "silu"
        zeros = x.new_zeros(x.shape[0], x.shape[1], weight.shape[1] - 1)

        def convolved(t: Tensor, before: Tensor) -> Tensor:
            return F.silu(F.conv1d(torch.cat([before, t], dim=-1), weight.unsqueeze(1), bias, groups=len(weight)))

        if seq_idx is not None:
            assert initial_states is None
            assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
            rows = [
                torch.cat([convolved(row_CT[:, of == n], zeros[0]) for n in of.unique()], dim=1)
                for row_CT, of in zip(x, seq_idx, strict=True)
            ]
            return torch.stack(rows)
        assert initial_states.stride(1) == 1
        assert initial_states.dtype == x.dtype
        return convolved(x, initial_states)

    package = types.ModuleType("causal_conv1d")
    package.causal_conv1d_fn = causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)


@pytest.mark.usefixtures("stand_in_for_causal_conv1d")
@pytest.mark.parametrize("name", CONV_CASES)
def test_conv_meets_the_conditions_of_the_kernel(name: str) -> None:
    assert max(differences(CONV_CASES[name], grad=True).values()) <= FLOAT32


@pytest.mark.parametrize("name", TRITON_CASES | CONV_CASES)
def test_float64_is_left_to_plain_pytorch(name: str) -> None:
    case = (TRITON_CASES | CONV_CASES)[name]
    assert not any(differences(case, grad=True, dtype=torch.float64).values())


@pytest.mark.parametrize("name", PLAIN_CASES)
def test_cases_that_no_kernel_serves_are_left_to_plain_pytorch(name: str) -> None:
    assert not any(differences(PLAIN_CASES[name], grad=True).values())


def test_step_with_gradients_is_left_to_plain_pytorch() -> None:
    assert not any(differences(step_case(), grad=True).values())


@pytest.mark.parametrize("name", ["ssd_scan", "ssd_step", "causal_conv", "gated_rms_norm"])
def test_signatures_are_those_of_plain_pytorch(name: str) -> None:
    assert inspect.signature(getattr(kernels, name)) == inspect.signature(getattr(ssm, name))


# The choice


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    """The choice is made once per process; here once per test."""
    kernels._select.cache_clear()
    yield
    kernels._select.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, **errors: str | None) -> None:
    """Let the packages be importable, or fail with an error."""
    monkeypatch.setattr(kernels, "_import_error", lambda module: errors[module.partition(".")[0]])


def test_torch_is_what_was_asked_for_on_every_device() -> None:
    assert select_backend("torch", "cpu") is select_backend("torch", torch.device("cuda")) is TORCH


def test_triton_is_what_was_asked_for_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, mamba_ssm=None, causal_conv1d=None)
    assert select_backend("triton", "cuda:1") is TRITON


def test_triton_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"need a CUDA device, not 'cpu'; choose backend='torch' there$"):
        select_backend("triton", "cpu")


def test_triton_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, mamba_ssm="No module named 'mamba_ssm'", causal_conv1d=None)
    with pytest.raises(ValueError, match=r"need mamba-ssm \(No module named 'mamba_ssm'\); pip install '.*\[cuda\]'$"):
        select_backend("triton", "cuda")


def test_triton_without_causal_conv1d_has_all_but_its_convolution(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, mamba_ssm=None, causal_conv1d="No module named 'causal_conv1d'")
    alone = select_backend("auto", "cuda")
    assert alone.conv is ssm.causal_conv
    assert (alone.name, alone.scan, alone.gated_norm) == ("triton", kernels.ssd_scan, kernels.gated_rms_norm)
    assert "their convolution on plain PyTorch" in caplog.text
    assert select_backend("triton", "cuda") is alone


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend='cuda' is unknown; choose 'auto', 'torch' or 'triton'"):
        select_backend("cuda", "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "mamba_error", "backend", "messages"),
    [
        ("cuda", None, TRITON, ["Mamba layers run on the fused kernels of mamba-ssm and causal-conv1d"]),
        (
            "cuda",
            "broken",
            TORCH,
            [
                "Mamba layers run on plain PyTorch, which is slower; the fused kernels need mamba-ssm (broken); "
                "pip install 'elastic-family[cuda]'"
            ],
        ),
        ("cpu", None, TORCH, []),
    ],
)
def test_auto_takes_triton_only_on_cuda_and_says_so_once(
    device: str,
    mamba_error: str | None,
    backend: kernels.Backend,
    messages: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pretend(monkeypatch, mamba_ssm=mamba_error, causal_conv1d=None)
    with caplog.at_level(logging.INFO, logger="elastic_core.layers.kernels"):
        assert select_backend("auto", device) is select_backend("auto", torch.device(device)) is backend
    assert [record.getMessage() for record in caplog.records] == messages


def test_package_that_cannot_be_imported_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packages = {"mamba_ssm", "causal_conv1d"}
    for package in packages:
        (tmp_path / f"{package}.py").write_text("raise ImportError('undefined symbol')")
    for module in [name for name in sys.modules if name.partition(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    assert not has_mamba_ssm()
    assert not has_causal_conv1d()
    with pytest.raises(ValueError, match="undefined symbol"):
        select_backend("triton", "cuda")


if __name__ == "__main__":
    json.dump(interpret(), sys.stdout)
