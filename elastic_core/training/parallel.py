"""The processes that train one model together: the only module that touches torch.distributed.

The model is wrapped from outside (FSDP2): every process holds its rows of every weight, and a layer is gathered whole
while it runs, so that a subnet's prefixes are views here as they are in one process. With hybrid sharding (HSDP) the
processes of one host divide the weights, and every host has a copy. A world of one process needs no torch.distributed,
and its model stays as it is.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import StoredTensor
from elastic_core.layers.moe import Mixture
from elastic_core.model import ElasticNemotronH, keeps_type
from elastic_core.recipe import Sharding
from elastic_core.training.offload import InputsOnHost

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# The longest that processes wait for one of them: it may be writing its part of a checkpoint to a slow disk. One that
# is gone is no matter of waiting, for torchrun ends the others.
TIMEOUT = timedelta(minutes=20)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The processes that train together, and this one's place among them; each has a device of its own.

    Those of `mesh` divide the weights among them. `replicas` are the processes that hold the same rows, one on every
    host; None where no two do. Each host has `on_a_host` processes, of consecutive ranks.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    on_a_host: int = 1
    mesh: DeviceMesh | None = None
    replicas: dist.ProcessGroup | None = None

    @property
    def shards(self) -> int:
        """The number of processes that divide the weights; the first so many hold all of them once."""
        return self.mesh.size() if self.mesh is not None else 1

    @property
    def here(self) -> range:
        """The ranks of this host's processes."""
        first = self.rank - self.rank % self.on_a_host
        return range(first, first + self.on_a_host)

    @property
    def is_first_here(self) -> bool:
        """Whether this process is the one of its host that makes and removes directories."""
        return self.rank == self.here[0]

    def divided(self, sharding: Sharding) -> "World":
        """This world with the weights divided among all its processes, or with `hybrid` among those of each host."""
        if self.size == 1:
            return self
        kind = self.device.type
        if sharding == "full" or self.on_a_host == self.size:
            return replace(self, mesh=init_device_mesh(kind, (self.size,)), replicas=None)
        if (first := self.from_first(self.on_a_host)) != self.on_a_host:  # torchrun then ends those that agree
            raise ValueError(
                f"sharding=hybrid needs as many processes on every host; one has {first}, another {self.on_a_host}. "
                "Start as many on each, or set sharding=full"
            )
        shape = (self.size // self.on_a_host, self.on_a_host)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        return replace(self, mesh=mesh["shard"], replicas=mesh.get_group("replicate"))

    def mean(self, values: Tensor) -> list[float]:
        """The mean of every value over the processes."""
        total = values.double()
        if self.size > 1:
            dist.all_reduce(total)
        means: list[float] = (total / self.size).tolist()
        return means

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make the gradients of those parameters that several processes hold their mean over these processes.

        All processes run the same budgets under the same noise, so that they have gradients of the same parameters.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.replicas is not None:
            for gradient in (g.to_local() for g in gradients if is_divided(g)):
                dist.all_reduce(gradient, group=self.replicas)
                gradient.div_(self.replicas.size())
        whole = [gradient for gradient in gradients if not is_divided(gradient)]
        if self.size == 1 or not whole:
            return
        together = torch.cat([gradient.flatten() for gradient in whole])
        dist.all_reduce(together)
        means = (together / self.size).split([gradient.numel() for gradient in whole])
        for gradient, mean in zip(whole, means, strict=True):
            gradient.copy_(mean.view_as(gradient))

    def from_first(self, value: int) -> int:
        """What the first process has for `value`, in every process."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)

    def gathered(self, values: Tensor) -> list[Tensor]:
        """The values of every process, in the order of the ranks."""
        if self.size == 1:
            return [values]
        shared = [torch.empty_like(values, device=self.device) for _ in range(self.size)]
        dist.all_gather(shared, values.to(self.device))
        return shared

    def all_agree(self, holds: bool) -> bool:
        """Whether something holds in every process."""
        return self.mean(torch.tensor([float(holds)], device=self.device)) == [1.0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun describes in the environment: gloo between CPUs, NCCL between CUDA devices."""
    has_cuda = torch.cuda.is_available()
    local_rank = dist.get_node_local_rank(fallback_rank=0)
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World(device=device)
        return
    dist.init_process_group("nccl" if has_cuda else "gloo", timeout=TIMEOUT, device_id=device if has_cuda else None)
    on_a_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    yield World(device=device, rank=dist.get_rank(), size=dist.get_world_size(), on_a_host=on_a_host)
    dist.destroy_process_group()  # not after an error: others may be waiting for this process, and would go on to


def recompute_layers(model: ElasticNemotronH, *, offload: bool = False) -> None:
    """Keep of each layer's forward pass only its input, and run the layer again in the backward pass.

    `offload` keeps the inputs in host memory.
    """
    inputs = InputsOnHost()

    def run_offloaded(layer: nn.Module, *given: Any, **settings: Any) -> Tensor:
        with inputs:
            hidden_BTD: Tensor = checkpoint(layer, *given, use_reentrant=False, **settings)
        return hidden_BTD

    run = run_offloaded if offload else None
    for index, layer in enumerate(model.layers):  # none of them is random
        model.layers[index] = checkpoint_wrapper(layer, checkpoint_fn=run, preserve_rng_state=False)


def shard(model: ElasticNemotronH, world: World, dtype: torch.dtype) -> None:
    """Leave each process its rows of every matrix; gather each layer in `dtype` while it runs.

    What is no matrix, and the router of experts, stays whole in every process, in its own type. Embeddings, last norm
    and head are one unit, which stays gathered after the forward pass, because the loss uses the head. Gradients of
    matrices are averaged in float32 over the processes that divide them, after every micro-step; over the hosts that
    have copies, and those of all else, by `World.average_gradients`, once a step.
    """
    if world.mesh is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # 0.6 s, which one process does without

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    others = {weight for name, weight in model.named_parameters() if keeps_type(name, weight.ndim)}
    for layer in model.layers:
        if isinstance(layer.mixer, Mixture):
            layer.mixer.runs_idle = True
        fully_shard(layer, mesh=world.mesh, mp_policy=policy, ignored_params=others)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, ignored_params=others, reshard_after_forward=False)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients so that their common norm, over all processes, is at most `max_norm`; the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [gradient for gradient in gradients if is_divided(gradient)]
    whole = [gradient for gradient in gradients if not is_divided(gradient)]
    norms = [torch.nn.utils.get_total_norm(kind) for kind in (sharded, whole) if kind]
    if not norms:
        return 0.0
    parts = [norm.full_tensor() if is_divided(norm) else norm for norm in norms]
    norm = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
    scale = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
    for gradient in gradients:
        gradient.mul_(scale)
    return float(norm)


def is_divided(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether processes divide the rows of a tensor among them."""
    if type(tensor) in (Tensor, nn.Parameter):  # as all are in one process, which does without the import
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of `tensor` that this process holds, sharing memory with it, and the number of the first."""
    tensor = tensor.detach()
    if not is_divided(tensor):
        return tensor, 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    in_each = -(-rows // mesh.size())  # as torch.chunk divides: all alike, the last ones short or empty
    return tensor.to_local(), min(mesh.get_local_rank() * in_each, rows)


def own_part(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What one of the first `World.shards` processes adds to a file of these tensors: its rows of each.

    Of what every process holds whole, the first adds all.
    """
    return {name: local_rows(tensor)[0] for name, tensor in tensors.items() if world.rank == 0 or is_divided(tensor)}


def with_whole(tensors: Mapping[str, Tensor], world: World, use: Callable[[Callable[[str], Tensor]], None]) -> None:
    """Call `use` in the first process, with what gives it all rows of a tensor by its name; the others add theirs."""
    names = [*tensors]

    def whole(index: int) -> Tensor:
        tensor = tensors[names[index]].detach()
        return tensor.full_tensor() if is_divided(tensor) else tensor

    if world.rank == 0:
        use(lambda name: whole(world.from_first(names.index(name))))
        world.from_first(len(names))
        return
    while (asked := world.from_first(0)) < len(names):
        whole(asked)


def read_rows(tensor: Tensor, pieces: Sequence[StoredTensor]) -> None:
    """Fill this process's rows of `tensor` from `pieces`, which hold all its rows in order."""
    local, first = local_rows(tensor)
    if not local.ndim:
        local.copy_(pieces[0].read())
        return
    position = 0
    for piece in pieces:
        start = max(first - position, 0)
        stop = min(first + len(local) - position, piece.shape[0])
        filled = max(position - first, 0)
        for block in piece.blocks(torch.arange(start, stop)) if start < stop else ():
            local[filled : filled + len(block)] = block
            filled += len(block)
        position += piece.shape[0]


@contextmanager
def staged_together(directory: Path, world: World) -> Iterator[Path]:
    """A new directory that a host's processes fill, one on each host; it becomes `directory` when all of them are done.

    Hosts share no disk: each has what its own processes write.
    """
    if world.is_first_here:
        with staged_directory(directory) as staging:
            world.barrier()
            yield staging
            world.barrier()
    else:
        world.barrier()
        yield directory.with_name(f".{directory.name}.partial")
        world.barrier()
