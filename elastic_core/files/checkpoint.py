"""Stock Nemotron-H checkpoints and elastic.json: what a directory must hold, read and written with every field checked.

`tensor_places` lists a model's tensors with their layouts: expected shapes, the reorder and the slices follow from it.
In memory a tensor is called `layers.0.norm.weight`; on disk `backbone.layers.0.norm.weight`, or `model.layers...`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from elastic_core.budget import Budget
from elastic_core.cost import LatencyTable, budget_cost, subnet_params
from elastic_core.files.card import family_card
from elastic_core.files.directories import staged_directory
from elastic_core.files.shards import CheckpointError as CheckpointError
from elastic_core.files.shards import (
    Progress,
    StoredTensor,
    TensorInfo,
    is_finite,
    read_header,
    read_json,
    regular_file,
    write_json,
    write_shards,
)
from elastic_core.files.side_files import CARD_FILE, copy_side_files, write_generation_config
from elastic_core.files.stock_config import read_config as read_config
from elastic_core.files.stock_config import write_config as write_config
from elastic_core.geometry import Axes, ModelConfig
from elastic_core.layers.kinds import KINDS
from elastic_core.layout import Layout, grid
from elastic_core.schema import build, to_dict
from elastic_core.subnet import Subnet, check_subnet, is_nested, keep_layers

ORDER_FILE = "order.safetensors"
ENERGY = "hidden_energy"  # a tensor in it, where the norms of subnets are scaled
ROUTER_FILE = "router.safetensors"
FAMILY_FILE = "elastic.json"
SHAPES_FILE = "shapes.json"  # beside a family whose shapes were measured


# The table of tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where a tensor stands in the model: its layer, if it is in one, and how it is laid out.

    A `stream_norm` is a norm of the residual stream: a slice has it times the gain of its hidden size (norm.py).
    """

    layer: int | None
    layout: Layout
    stream_norm: bool = False


def tensor_places(config: ModelConfig) -> dict[str, TensorPlace]:
    """Every tensor of the model, in model order, by its name in memory."""
    vocab, hidden = (grid(vocab=config.vocab_size),), (grid(hidden=config.hidden_size),)
    places = {"embeddings.weight": TensorPlace(layer=None, layout=Layout(vocab, hidden))}
    for layer, kind in enumerate(config.hybrid_override_pattern):
        places[f"layers.{layer}.norm.weight"] = TensorPlace(layer=layer, layout=Layout(hidden), stream_norm=True)
        for name, layout in KINDS[kind].mixer.lay_out(config, layer).items():
            places[f"layers.{layer}.mixer.{name}"] = TensorPlace(layer=layer, layout=layout)
    places["norm_f.weight"] = TensorPlace(layer=None, layout=Layout(hidden), stream_norm=True)
    places["lm_head.weight"] = TensorPlace(layer=None, layout=Layout(vocab, hidden))
    return places


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model, in model order, by its name in memory."""
    return {name: place.layout.shape() for name, place in tensor_places(config).items()}


def disk_name(name: str) -> str:
    """The name on disk of the tensor called `name` in memory."""
    return name if name == "lm_head.weight" else f"backbone.{name}"


def memory_name(key: str) -> str:
    """The name in memory of the tensor called `key` on disk, in either spelling."""
    return key.removeprefix("backbone.").removeprefix("model.")


# Checkpoints

MULTI_TOKEN_PREDICTION = "mtp."


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: its geometry and where each tensor lies, by name in memory, in model order.

    `left_out` are the names of its tensors that are no part of the model: those of multi-token prediction. They read
    hidden states that every subnet and all training change, and through a norm of their own the model's lm_head, which
    a rotated teacher has merged with the weights of the last norm.
    """

    directory: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    left_out: tuple[str, ...] = ()


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a stock checkpoint, reading headers only, all of which are checked against config.json and the files."""
    config, stored = read_config(directory), _stored(directory)
    left_out = tuple(key for key in stored if key.startswith(MULTI_TOKEN_PREDICTION))
    tensors = _check_tensors(directory, config, {key: stored[key] for key in stored if key not in left_out})
    return Checkpoint(directory=directory, config=config, tensors=tensors, left_out=left_out)


def _stored(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or else of the shards in its index, by their names on disk."""
    index_path = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        if index_path.exists():
            raise CheckpointError(
                f"{directory}: holds model.safetensors and {index_path.name}, and some engines read the one, some the "
                "other; remove one of them"
            )
        return read_header(regular_file(directory, "model.safetensors"))
    if not index_path.exists():
        raise CheckpointError(f"{directory}: holds no model.safetensors and no index of shards; only safetensors load")
    regular_file(directory, index_path.name)
    shard_of = read_json(index_path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{index_path}: weight_map is not an object of file names by tensor")
    stored = {}
    for shard in sorted(set(shard_of.values())):
        for key, tensor in read_header(regular_file(directory, shard)).items():
            if shard_of.get(key) != shard:
                raise CheckpointError(f"{tensor.path}: holds {key}, which the index places in {shard_of.get(key)}")
            stored[key] = tensor
    for key, shard in shard_of.items():
        if key not in stored:
            raise CheckpointError(f"{index_path}: places {key} in {shard}, which does not hold it")
    return stored


def _check_tensors(directory: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`stored` under the names in memory, in model order, when it is exactly what `config` implies."""
    shapes = tensor_shapes(config)
    found: dict[str, StoredTensor] = {}
    unexpected = {}
    for key, tensor in stored.items():
        name = memory_name(key)
        if name in found:
            raise CheckpointError(
                f"{directory}: {found[name].name} and {key} are the same tensor; expected one of them"
            )
        if name not in shapes or key not in (disk_name(name), f"model.{name}"):
            unexpected[key] = tensor.shape
        else:
            found[name] = tensor
    missing = {disk_name(name): shape for name, shape in shapes.items() if name not in found}
    if missing or unexpected:
        raise CheckpointError(
            f"{directory}: config.json contradicts the weights; "
            f"missing: {_listed(missing)}; unexpected: {_listed(unexpected)}"
        )
    for name, shape in shapes.items():
        tensor = found[name]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name}: has shape {list(tensor.shape)}; config.json implies {list(shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{tensor.path}: {tensor.name}: has dtype {tensor.dtype}; expected a float type")
    return {name: found[name] for name in shapes}


def _listed(shapes: Mapping[str, tuple[int, ...]], limit: int = 6) -> str:
    listed = [f"{key} {list(shape)}" for key, shape in shapes.items()]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "none") + more


def load_weights(directory: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name in memory, each as `dtype` (or as stored), all finite."""
    checkpoint = open_checkpoint(directory)
    weights = {}
    for name, stored in checkpoint.tensors.items():
        weights[name] = stored.read().to(dtype or stored.dtype)
        if not is_finite(weights[name]):
            raise CheckpointError(f"{stored.path}: {stored.name}: is too large for {dtype}; load it as {stored.dtype}")
    return weights


def write_weights(
    directory: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    source: Path | None = None,
    beside: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> dict[str, str]:
    """Write a model in memory as a stock checkpoint; see `write_checkpoint`. Raises ValueError for NaN or infinity."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != tensor_shapes(config):
        different = dict(shapes.items() ^ tensor_shapes(config).items())
        raise ValueError(f"weights contradict the config: {_listed(different)}")
    plan = {name: TensorInfo(dtype=dtype or weights[name].dtype, shape=shapes[name]) for name in tensor_shapes(config)}

    def blocks(name: str) -> Iterator[Tensor]:
        tensor = weights[name].detach().to("cpu", plan[name].dtype)
        if not is_finite(tensor):
            raise ValueError(f"{name} holds NaN or infinity as {plan[name].dtype}; it is not written to {directory}")
        yield tensor

    return write_checkpoint(
        directory, config, plan, blocks, source=source, beside=beside, max_shard_bytes=max_shard_bytes
    )


def write_checkpoint(
    directory: Path,
    config: ModelConfig,
    plan: Mapping[str, TensorInfo],
    blocks: Callable[[str], Iterable[Tensor]],
    *,
    source: Path | None = None,
    beside: Callable[[Path], None] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write a stock checkpoint that appears whole or not at all; returns the SHA-256 of its weight files by name.

    `blocks(name)` gives each planned tensor as consecutive blocks of rows. The files that are not weights and the other
    keys of config.json come from `source`. `beside` is called with the unfinished directory, to add files of its own.
    """
    with staged_directory(directory) as staging:
        base = read_json(regular_file(source, "config.json")) if source and (source / "config.json").exists() else {}
        write_config(config, staging, main_dtype(plan.values()), base)
        if source:
            copy_side_files(source, staging, base)
        write_generation_config(staging, config)
        if beside:
            beside(staging)
        return write_shards(
            staging,
            {disk_name(name): planned for name, planned in plan.items()},
            lambda key: blocks(memory_name(key)),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )


def main_dtype(tensors: Iterable[TensorInfo]) -> torch.dtype:
    """The type that most of the data has; single tensors may differ, such as A_log in float32."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


# elastic.json


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBudget:
    """A budget, the subnet that it was resolved to, and that subnet's exact number of parameters."""

    budget: Budget
    subnet: Subnet
    params: int

    @property
    def name(self) -> str:
        return self.budget.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What makes a stock checkpoint elastic. Budgets fall from the largest; lineage says what it was made from.

    `latency_table` is there if a budget is a latency, so that it can be counted again wherever the family goes. In
    format 2 the norms of subnets are scaled by what order.safetensors says, which code that knows format 1 does not do.
    """

    axes: Axes
    budgets: tuple[ResolvedBudget, ...]
    layer_ranking: tuple[int, ...]
    lineage: dict[str, object]
    latency_table: LatencyTable | None = None
    format_version: Literal[1, 2] = 1

    def budget(self, name: str) -> ResolvedBudget:
        """The budget called `name`; ValueError that lists the known ones."""
        for budget in self.budgets:
            if budget.name == name:
                return budget
        raise ValueError(f"there is no budget {name!r}; known: {', '.join(b.name for b in self.budgets)}")


def read_family(directory: Path) -> Family:
    """The elastic.json of an elastic checkpoint, checked against its config.json."""
    if not (directory / FAMILY_FILE).exists():
        raise CheckpointError(
            f"{directory / FAMILY_FILE}: there is no such file: only an elastic checkpoint, which has it, holds "
            "budgets and other sizes; `elastic pull NAME --elastic` brings that of a registered size"
        )
    path = regular_file(directory, FAMILY_FILE)
    try:
        config = read_config(directory)
        family = _completed(build(Family, read_json(path)), config)
        _check_family(family, config)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    order, _ = (read_header(regular_file(directory, name)) for name in (ORDER_FILE, ROUTER_FILE))
    if family.format_version == 2 and ENERGY not in order:
        raise CheckpointError(
            f"{directory / ORDER_FILE}: holds no {ENERGY}, by which {FAMILY_FILE} has norms scaled; copy the one that "
            "was written with this checkpoint"
        )
    return family


def write_family(directory: Path, family: Family) -> None:
    """Write elastic.json and a model card into a directory that has its config.json; order and router go beside it."""
    _check_family(family, config := read_config(directory))
    write_json(directory / FAMILY_FILE, to_dict(family))
    (directory / CARD_FILE).write_text(family_card(config, family), encoding="utf-8")


def _completed(family: Family, config: ModelConfig) -> Family:
    """A family with experts that was written before `top_k` was an axis: its subnets keep the whole model's."""
    budgets = tuple(
        replace(budget, subnet=replace(budget.subnet, top_k=config.num_experts_per_tok))
        if budget.subnet.experts and not budget.subnet.top_k
        else budget
        for budget in family.budgets
    )
    return replace(family, budgets=budgets)


def _check_family(family: Family, config: ModelConfig) -> None:
    axes = family.axes.bind(config)
    if family.latency_table is not None:
        family.latency_table.check(config, axes)
    if sorted(family.layer_ranking) != list(range(config.num_layers)):
        raise ValueError(
            f"layer_ranking {list(family.layer_ranking)} must name each of the {config.num_layers} layers once"
        )
    names = [budget.name for budget in family.budgets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"budgets {names} must be at least one, each name once")
    for i, budget in enumerate(family.budgets):
        _check_budget(f"budgets[{i}] ({budget.name})", budget, family, config)
        if i and not is_nested(budget.subnet, family.budgets[i - 1].subnet):
            raise ValueError(f"budgets[{i}] ({budget.name}) is not nested in {family.budgets[i - 1].name}")


def _check_budget(where: str, budget: ResolvedBudget, family: Family, config: ModelConfig) -> None:
    try:
        check_subnet(budget.subnet, config)
        counted = budget_cost(config, budget.budget, family.latency_table)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if budget.subnet.layers != keep_layers(family.layer_ranking, budget.subnet.depth):
        raise ValueError(f"{where}: layers {list(budget.subnet.layers)} are not the first of layer_ranking")
    params = subnet_params(config, budget.subnet)
    if budget.params != params:
        raise ValueError(f"{where}: params is {budget.params}; its subnet has {params}")
    target, takes = budget.budget.target, counted.of(budget.subnet)
    if target is not None and takes > target:
        raise ValueError(
            f"{where}: its subnet takes {counted.text(takes)}, more than its target {counted.text(target)}"
        )
