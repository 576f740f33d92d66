"""One training step of a model of any size on one of many GPUs, with neither: fake tensors, a fake process group.

The step is the real one: FSDP2's sharding, recomputation, the loss, AdamW. Only the fused kernels are stood in for.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fused import FUSED, rms_norm
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_core import model as model_module
from elastic_core.geometry import ModelConfig
from elastic_core.layers import ssm, tiles
from elastic_core.model import ElasticNemotronH
from elastic_core.recipe import Distillation, Sharding, Stage
from elastic_core.subnet import Masks, Subnet
from elastic_core.training import offload, train
from elastic_core.training.parallel import World, recompute_layers, shard
from elastic_core.training.tokens import TokenBatch


@dataclasses.dataclass
class Trace:
    """Bytes on one GPU: what the states take, the most that was there at once, what a micro-step gathered and reduced.

    `averaged` are the gradients that all GPUs, or those of several hosts, average at the end of the step.
    """

    states: int = 0
    peak: int = 0
    gathered: int = 0
    reduced: int = 0
    averaged: int = 0


class Watch(TorchDispatchMode):
    """Follows the storages of all tensors, as `LiveBytes` does, through FSDP2's resizing; counts what is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.trace = Trace()
        self._sizes: dict[int, int] = {}
        self._elsewhere: set[int] = set()

    def __enter__(self) -> "Watch":
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            done = self._resize(storage, size)
            self._sized(storage._cdata, size)
            return done

        torch.UntypedStorage.resize_ = resize
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(
        self, operation: Any, types: Any, inputs: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations come here
        outputs = operation(*inputs, **(named or {}))
        self._count_sent(operation, inputs)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.trace.peak = max(self.trace.peak, self.live)
        return outputs

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            weakref.finalize(storage, self._gone, storage._cdata)
        self._sized(storage._cdata, storage.nbytes())

    def forget(self, tensor: Tensor) -> None:
        """Count this tensor no more."""
        self._sized(tensor.untyped_storage()._cdata, 0)
        self._elsewhere.add(tensor.untyped_storage()._cdata)

    def _sized(self, key: int, size: int) -> None:
        if key in self._elsewhere:
            return
        if key in self._sizes:
            self.live += size - self._sizes[key]
            self._sizes[key] = size
            self.trace.peak = max(self.trace.peak, self.live)

    def _gone(self, key: int) -> None:
        self._elsewhere.discard(key)
        self.live -= self._sizes.pop(key)

    def _count_sent(self, operation: Any, inputs: tuple[Any, ...]) -> None:
        name = operation.name()
        if name.startswith("c10d::_allgather_base_"):
            self.trace.gathered += inputs[0].nbytes
        elif name.startswith("c10d::_reduce_scatter_base_"):
            self.trace.reduced += inputs[1].nbytes
        elif name.startswith("c10d::allreduce_"):
            self.trace.averaged += sum(tensor.nbytes for tensor in inputs[0])


@contextlib.contextmanager
def world_of(ranks: int, sharding: Sharding = "full") -> Iterator[World]:
    """The first of so many processes, eight on a host, whose messages reach nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield World(device=torch.device("cpu"), size=ranks, on_a_host=8).divided(sharding)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """The code as it runs on a CUDA device: fused kernels, and no walk over short runs of tokens."""
    kept = model_module.select_backend, F.rms_norm, ssm.SEGMENT_VALUES, tiles.CPU_VALUES
    model_module.select_backend, F.rms_norm = (lambda *_: FUSED), rms_norm
    ssm.SEGMENT_VALUES, tiles.CPU_VALUES = 2**62, tiles.GPU_VALUES
    try:
        yield
    finally:
        model_module.select_backend, F.rms_norm, ssm.SEGMENT_VALUES, tiles.CPU_VALUES = kept


@contextlib.contextmanager
def host_of(watch: Watch) -> Iterator[None]:
    """What is moved to the host is no longer on the device, though both are this machine's memory."""
    kept = offload.empty_on_host

    def elsewhere(like: Tensor) -> Tensor:
        room = kept(like)
        watch.forget(room)
        return room

    offload.empty_on_host = elsewhere
    try:
        yield
    finally:
        offload.empty_on_host = kept


def soft_masks(config: ModelConfig, subnet: Subnet) -> Masks:
    """Masks over the widths of a subnet, which ask for gradients as the router's do."""

    def ones(size: int) -> Tensor:
        return torch.ones(size, requires_grad=True)

    return Masks(
        hidden=ones(subnet.hidden),
        ffn=tuple(map(ones, subnet.ffn)),
        mamba_heads=tuple(ones(heads // config.n_groups) for heads in subnet.mamba_heads),
        mamba_head_dim=ones(subnet.mamba_head_dim),
        attention_heads=tuple(ones(heads // config.num_key_value_heads) for heads in subnet.attention_heads),
        layers=ones(config.num_layers),
    )


def _unfilled(config: ModelConfig, dtype: torch.dtype = torch.float32) -> ElasticNemotronH:
    """A model whose weights are made, and never given values."""
    with torch.device("meta"):
        shapes = ElasticNemotronH(config)
    for module in shapes.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(weight.shape, dtype=dtype)))
    return shapes


def traced_step(
    config: ModelConfig, stage: Stage, distillation: Distillation, subnet: Subnet, *, masked: bool, world: World
) -> Trace:
    """A step of two micro-batches at one subnet, the second of which finds gradients there; all in bfloat16."""
    with as_on_cuda(), FakeTensorMode(), Watch() as watch, host_of(watch):
        student = _unfilled(config)
        if stage.recompute:
            recompute_layers(student, offload=stage.offload)
        shard(student, world, torch.bfloat16)
        teacher = None
        if distillation.kl_weight > 0 and distillation.teacher == "frozen":
            teacher = _unfilled(config, torch.bfloat16).requires_grad_(False)
            shard(teacher, world, torch.bfloat16)
        run = train.StageRun(
            student=student,
            teacher=teacher,
            router=None,
            optimizer=train.make_optimizer(student, None, stage),
            stage=stage,
            distillation=distillation,
            budgets=(),
            subnets={},
            data=None,  # type: ignore[arg-type]
            seed=0,
            world=world,
            autocast=torch.bfloat16,
        )
        for weight in student.parameters():
            for _ in range(2):
                run.optimizer.state[weight].setdefault("moments", []).append(torch.zeros_like(weight))
        tokens_BT = torch.zeros(stage.micro_batch_size, stage.sequence_length, dtype=torch.long)
        batch = TokenBatch(inputs_BT=tokens_BT, targets_BT=tokens_BT, packing=None, learned=tokens_BT.numel() - 1)
        watch.trace.states = watch.live
        watch.trace.peak = 0
        for _ in range(2):
            watch.trace.gathered = watch.trace.reduced = 0
            choice = train._Choice(subnet=subnet, masks=soft_masks(config, subnet) if masked else None)
            loss, *_ = train._micro_step(run, choice, batch, float(batch.learned), 1.0)
            loss.backward()
            del loss, _
        world.average_gradients(student.parameters())
        return watch.trace
