"""What one CUDA device makes of the library: kernels, a distillation step, its cost by budget, and decoding.

`make bench-gpu`; `make check-gpu` where there is no network and no compiler.

Needs mamba-ssm's kernels, and nothing from the network: weights and tokens are random. The student is the largest with
Nano's proportions that elastic_core/planning/memory.py fits on the device beside its frozen teacher.
"""

import dataclasses
import functools
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench import BOUND, interleaved, record
from nano import NANO_12B
from safetensors.torch import save_file
from torch import Tensor
from transformers import NemotronHConfig, NemotronHForCausalLM

from elastic_core.budget import Budget
from elastic_core.generate import decode
from elastic_core.geometry import ModelConfig
from elastic_core.layers import kernels, ssm
from elastic_core.model import ElasticNemotronH
from elastic_core.planning.flops import backward_flops, forward_flops
from elastic_core.planning.machine import USABLE_SHARE
from elastic_core.planning.memory import MicroStep, training_memory
from elastic_core.recipe import Distillation, Optimizer, Stage
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training import resume
from elastic_core.training.parallel import World, recompute_layers
from elastic_core.training.tokens import TokenRows
from elastic_core.training.train import StageRun, make_optimizer, train_stage

pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# FLOP/s of dense bfloat16 products by the data sheet, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
BFLOAT16 = 5e-2  # 8 bits of mantissa; the kernels round between their products, the plain scan does not
SAME_LOGITS = 0.1  # the same over all layers of a model
OVERHEAD = 0.08  # what the issue allows above the ratio of FLOPs
STEPS = 100  # more than are run: a stage is left when its step has been measured


def nano_like(hidden: int) -> ModelConfig:
    """Nano 12B's layers, proportions, groups, state and vocabulary at another hidden size, a multiple of 256."""
    return dataclasses.replace(
        NANO_12B,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_attention_heads=16,
        head_dim=hidden // 16,
        mamba_num_heads=hidden // 32,
        mamba_head_dim=64,
    )


def largest_that_fits(tokens: int, device_bytes: int) -> ModelConfig:
    """The largest student that trains on one sequence of so many tokens beside its teacher, layers recomputed."""
    for hidden in range(NANO_12B.hidden_size, 0, -256):
        config = nano_like(hidden)
        step = MicroStep(
            subnet=full_subnet(config),
            masked=False,
            sequences=1,
            sequence_length=tokens,
            recompute=True,
            distillation=Distillation(),
            dtype="bfloat16",
        )
        if training_memory(config, step, gpus=1).total <= USABLE_SHARE * device_bytes:
            return config
    raise ValueError(f"no student fits into {device_bytes} bytes beside its teacher at {tokens} tokens")


def small_subnet(config: ModelConfig) -> Subnet:
    """What Nano's 6B keeps, about: three quarters of the widths and half of the FFN."""
    full = full_subnet(config)
    return dataclasses.replace(
        full,
        hidden=config.hidden_size * 3 // 4,
        ffn=tuple(width // 2 for width in full.ffn),
        mamba_heads=tuple(heads // config.n_groups * 3 // 4 * config.n_groups for heads in full.mamba_heads),
    )


def fresh_model(config: ModelConfig, dtype: torch.dtype) -> ElasticNemotronH:
    with DEVICE:
        model = ElasticNemotronH(config)
    model.initialise(torch.Generator(DEVICE).manual_seed(0))
    return model.to(dtype)


def distillation_runs(
    config: ModelConfig, subnets: dict[str, Subnet], tokens: int, sequences: int, directory: Path
) -> dict[str, StageRun]:
    """For each subnet a stage that distils it alone, all into the same student."""
    random = torch.Generator().manual_seed(0)
    stream = torch.randint(config.vocab_size, (sequences * tokens * 2 + 1,), dtype=torch.int32, generator=random)
    save_file({"tokens": stream}, directory / "tokens.safetensors")
    student, teacher = fresh_model(config, torch.float32), fresh_model(config, torch.bfloat16)
    recompute_layers(student)
    stage = Stage(
        name="bench",
        sequence_length=tokens,
        batch_size=sequences,
        steps=STEPS,
        budgets={"l": 1},
        optimizer=Optimizer(learning_rate=1e-5),
        recompute=True,
    )
    optimizer = make_optimizer(student, None, stage)
    return {
        name: StageRun(
            student=student,
            teacher=teacher.requires_grad_(False).eval(),
            router=None,
            optimizer=optimizer,
            stage=dataclasses.replace(stage, budgets={name: 1}),
            distillation=Distillation(),
            budgets=(Budget(name=name),),
            subnets={name: subnet},
            data=TokenRows(directory / "tokens.safetensors", tokens),
            seed=0,
            world=World(device=DEVICE),
            autocast=torch.bfloat16,
        )
        for name, subnet in subnets.items()
    }


def step_flops(config: ModelConfig, subnet: Subnet, tokens: int, sequences: int) -> int:
    """What the model needs: the student forward and backward, the teacher forward; not what is computed again."""
    student = forward_flops(config, subnet, tokens) + backward_flops(config, subnet, tokens)
    return sequences * (student + forward_flops(config, full_subnet(config), tokens)).total


def title(config: ModelConfig, tokens: int, sequences: int) -> str:
    parameters = sum(weight.numel() for weight in meta_model(config).parameters())
    return f"{parameters / 1e9:.2f}B parameters, {sequences} x {tokens} tokens{convolution()}"


def meta_model(config: ModelConfig) -> ElasticNemotronH:
    with torch.device("meta"):
        return ElasticNemotronH(config)


def scan_inputs(config: ModelConfig, tokens: int) -> list[Tensor]:
    """x, dt, A, B, C, D in the dtypes that a model in bfloat16 hands to the scan."""
    random = torch.Generator(DEVICE).manual_seed(0)
    heads, groups, state = config.mamba_num_heads, config.n_groups, config.ssm_state_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=DEVICE)

    inputs = [
        normal(1, tokens, heads, config.mamba_head_dim).bfloat16(),
        F.softplus(normal(1, tokens, heads) - 2),
        -normal(heads).exp(),
        (normal(1, tokens, groups, state) / state**0.5).bfloat16(),
        normal(1, tokens, groups, state).bfloat16(),
        normal(heads),
    ]
    return [t.requires_grad_() for t in inputs]


def compare_scans(
    fused: Callable[..., tuple[Tensor, Tensor]], config: ModelConfig, tokens: int
) -> tuple[float, dict[str, float]]:
    """The largest difference of an output or gradient over its largest value; median seconds forward and backward."""
    inputs = scan_inputs(config, tokens)
    weight_BTHP = torch.randn(inputs[0].shape, device=DEVICE).bfloat16()

    def step(scan: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        y_BTHP, _ = scan(*inputs, chunk_size=config.chunk_size)
        return [y_BTHP.detach(), *torch.autograd.grad(y_BTHP, inputs, weight_BTHP)]

    pairs = zip(step(fused), step(ssm.ssd_scan), strict=True)
    off = max(float((one.float() - other.float()).abs().max() / other.abs().max()) for one, other in pairs)
    return off, interleaved({"fused": lambda: step(fused), "plain": lambda: step(ssm.ssd_scan)})


def decoders(config: ModelConfig, prompt_BT: Tensor, new_tokens: int) -> tuple[float, dict[str, Callable[[], object]]]:
    """How far the logits are apart after the prompt, and the forms that write `new_tokens` greedily in bfloat16."""
    names = {field.name for field in dataclasses.fields(config)}
    ours = fresh_model(config, torch.bfloat16).eval()
    with DEVICE:
        stock = NemotronHConfig(**{name: getattr(config, name) for name in names})
        theirs = NemotronHForCausalLM(stock).to(torch.bfloat16).eval()
    roots = ("embeddings.", "layers.", "norm_f.")
    renamed = {f"model.{k}" if k.startswith(roots) else k: weight for k, weight in ours.state_dict().items()}
    theirs.load_state_dict(renamed)
    full = full_subnet(config)
    with torch.inference_mode():
        our_logits, their_logits = ours.logits(ours(prompt_BT, full)), theirs(prompt_BT).logits.float()
    off = float((our_logits - their_logits).abs().max() / their_logits.abs().max())
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    return off, {
        "ours": lambda: list(decode(ours, prompt_BT, full, max_new_tokens=new_tokens)),
        "transformers": lambda: theirs.generate(prompt_BT, attention_mask=torch.ones_like(prompt_BT), **settings),
    }


def matrix_product(size: int) -> Callable[[], Tensor]:
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in "ab")
    return lambda: left @ right


def require_kernels() -> None:
    pytest.importorskip("mamba_ssm")


def convolution() -> str:
    """What a row says where causal-conv1d is missing."""
    return "" if kernels.has_causal_conv1d() else ", plain convolution"


def test_fused_scan_beside_the_plain_one() -> None:
    require_kernels()
    tokens = 8192
    off, seconds = compare_scans(kernels.ssd_scan, NANO_12B, tokens)
    assert off <= BFLOAT16
    record(
        benchmark="fused scan, forward and backward",
        shape=f"{tokens} tokens, Nano 12B's heads, bfloat16",
        unit="s",
        ours=seconds["fused"],
        theirs=seconds["plain"],
        alternative="plain scan of ssm.py",
        target="less",
    )


@pytest.mark.parametrize(("tokens", "sequences"), [(8192, 4), (49152, 1)])
def test_utilisation_of_the_distillation_step(tokens: int, sequences: int, tmp_path: Path) -> None:
    require_kernels()
    config = largest_that_fits(tokens, torch.cuda.get_device_properties(DEVICE).total_memory)
    full, size = full_subnet(config), 8192
    (run,) = distillation_runs(config, {"l": full}, tokens, sequences, tmp_path).values()
    seconds = interleaved({"step": functools.partial(next, train_stage(run)), "product": matrix_product(size)})
    reached = step_flops(config, full, tokens, sequences) / seconds["step"]
    alternatives = {f"a product of {size} x {size} bfloat16 matrices": 2 * size**3 / seconds["product"]}
    name = torch.cuda.get_device_name()
    alternatives |= {f"peak by the data sheet ({part})": peak for part, peak in PEAKS.items() if part in name}
    for alternative, flops in list(alternatives.items())[:2]:
        record(
            benchmark="distillation step, model FLOPs utilisation",
            shape=f"{title(config, tokens, sequences)}, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at peak",
            unit="TFLOP/s",
            ours=reached / 1e12,
            theirs=flops / 1e12,
            alternative=alternative,
            target=BOUND,
        )


def test_a_distillation_step_costs_what_its_budget_costs(tmp_path: Path) -> None:
    require_kernels()
    tokens, sequences = 8192, 4
    config = largest_that_fits(tokens, torch.cuda.get_device_properties(DEVICE).total_memory)
    subnets = {"s": small_subnet(config), "l": full_subnet(config)}
    runs = distillation_runs(config, subnets, tokens, sequences, tmp_path)
    seconds = interleaved({name: functools.partial(next, train_stage(run)) for name, run in runs.items()})
    flops = {name: step_flops(config, subnet, tokens, sequences) for name, subnet in subnets.items()}
    record(
        benchmark="distillation step, s / l",
        shape=title(config, tokens, sequences),
        unit="s",
        ours=seconds["s"],
        theirs=seconds["l"],
        alternative="full budget",
        target=f"at most FLOPs {flops['s'] / flops['l']:.3f} + {OVERHEAD}",
    )


@pytest.mark.parametrize("batch", [1, 32])
def test_decoding_beside_transformers(batch: int) -> None:
    require_kernels()
    config, new_tokens = nano_like(2048), 128
    prompt_BT = torch.randint(config.vocab_size, (batch, 512), device=DEVICE)
    off, forms = decoders(config, prompt_BT, new_tokens)
    assert off <= SAME_LOGITS
    rates = {name: batch * new_tokens / seconds for name, seconds in interleaved(forms).items()}
    record(
        benchmark="decoding, more is better",
        shape=f"{title(config, 512, batch)} read, {new_tokens} written",
        unit="tokens/s",
        ours=rates["ours"],
        theirs=rates["transformers"],
        alternative="transformers with the same kernels"
        if kernels.has_causal_conv1d()
        else "transformers without kernels",
        target="at least 1",
    )


def test_a_stage_that_was_killed_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernels()
    monkeypatch.setenv("MAMBA_DETERMINISTIC", "1")
    config = dataclasses.replace(nano_like(512), hybrid_override_pattern="M-M*-M-", vocab_size=1024)
    runs = [distillation_runs(config, {"s": small_subnet(config)}, 512, 2, tmp_path)["s"] for _ in range(3)]
    whole, killed, resumed = runs
    list(islice(train_stage(whole), 4))
    list(islice(train_stage(killed), 2))
    resume.save_checkpoint(tmp_path / "work", killed, 2, [])
    start, _ = resume.resume(tmp_path / "work", resumed)
    list(islice(train_stage(resumed, start), 2))
    weights = resumed.student.state_dict()
    for name, weight in whole.student.state_dict().items():
        assert torch.equal(weight, weights[name]), name
