"""What one GPU holds at the peak of a micro-step of training, in bytes by part.

Exact: master weights, gradients and AdamW's moments, all in float32, and the teacher in the dtype of computation.
Tensor by tensor: what autograd saves of the forward pass with the fused kernels on CUDA, and the buffers of the loss.
From above: what a layer's backward pass, or a unit that FSDP2 gathers, needs for a while. The plain scan of ssm.py
saves several times what the fused one does, and is not planned for.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from math import ceil

from elastic_core.budget import Dtype
from elastic_core.cost import DTYPE_BYTES, ParamsCost, shapes
from elastic_core.geometry import ModelConfig
from elastic_core.layers.kind import FLOAT32_BYTES, LayerShape
from elastic_core.layers.kinds import KINDS
from elastic_core.layers.tiles import GPU_VALUES
from elastic_core.layout import Layout
from elastic_core.model import keeps_type
from elastic_core.recipe import Distillation
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training.losses import default_chunk_tokens

# Of the size of a tile, what a masked norm's backward pass has in float32 at once.
TILE_TENSORS = 4

# Layer inputs that offloading leaves on the device: a layer's, and that of the one before it.
ON_DEVICE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU, by part.

    The last three are those of the moment at which they are most together. `gathered` is weights in the dtype of
    computation beside the float32 ones: autocast's copies in one process; in several, the units that FSDP2 holds
    whole, and their gradients. `activations` is what the backward pass waits for. `working` is what the loss or one
    layer needs on top.
    """

    parameters: int
    gradients: int
    optimizer: int
    teacher: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        states = self.parameters + self.gradients + self.optimizer + self.teacher
        return states + self.gathered + self.activations + self.working


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroStep:
    """What a GPU runs at once: `sequences` of `sequence_length` tokens at a subnet, under the router's masks or not."""

    subnet: Subnet
    masked: bool
    sequences: int
    sequence_length: int
    recompute: bool
    distillation: Distillation
    dtype: Dtype
    offload: bool = False

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def width(self) -> int:
        """Bytes of a value in the dtype of computation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def cast(self) -> int:
        """Bytes of a value that is cast from float32 to be computed with; 0 where nothing is cast."""
        return self.width if self.width < FLOAT32_BYTES else 0

    @property
    def has_teacher(self) -> bool:
        """Whether a frozen teacher is held beside the student."""
        return self.distillation.kl_weight > 0 and self.distillation.teacher == "frozen"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    """What a moment of a micro-step needs beside the states; parts as in `Memory`."""

    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.gathered + self.activations + self.working


def training_memory(model: ModelConfig, step: MicroStep, *, gpus: int, router_params: int = 0) -> Memory:
    """The memory of one of `gpus` that divide the weights (parallel.py); every one holds the routers whole."""
    params, undivided = ParamsCost(model=model).of(full_subnet(model)), _undivided(model)
    shard = ceil((params - undivided) / gpus)
    mine = shard + undivided + router_params
    moments = _moments(model, step) if gpus > 1 else _moments_alone(model, step)
    most = max(moments, key=lambda moment: moment.total)
    return Memory(
        parameters=FLOAT32_BYTES * mine,
        gradients=FLOAT32_BYTES * mine,
        optimizer=2 * FLOAT32_BYTES * mine,
        teacher=step.width * shard + FLOAT32_BYTES * undivided if step.has_teacher else 0,
        gathered=most.gathered,
        activations=most.activations,
        working=most.working,
    )


def host_bytes(steps: Iterable[MicroStep]) -> int:
    """What offloading keeps in host memory for one GPU, whichever of these micro-steps run: the input of each layer.

    The memory is pinned. torch rounds a pinned block up to a power of two, and keeps it for the next tensor of that
    size: never for a smaller one, and never for the system.
    """
    blocks: dict[int, int] = {}
    for step in steps:
        if step.offload:
            block = 1 << (step.tokens * step.width * step.subnet.hidden - 1).bit_length()
            blocks[block] = max(blocks.get(block, 0), step.subnet.depth)
    return sum(block * count for block, count in blocks.items())


# Moments


def _moments(model: ModelConfig, step: MicroStep) -> Iterator[_Moment]:
    """The loss, the backward pass of each layer, and the last reduction, under FSDP2.

    Embeddings and head of student and teacher stay gathered. A layer's backward pass finds its own weights gathered,
    makes their gradients, and gathers the layer before it, while the gradient of the layer after it is reduced in
    float32.
    """
    root, hidden = step.width * root_matrices(model), step.tokens * step.width * step.subnet.hidden
    roots = (2 if step.has_teacher else 1) * root
    layers = list(zip(step.subnet.layers, shapes(model, step.subnet), strict=True))
    joined = [_joined(model, step, *layer) for layer in layers]
    yield _Moment(
        gathered=roots,
        activations=activation_bytes(model, step) + (0 if step.recompute else sum(joined)),
        working=loss_bytes(model, step, gathered=True) + kept_rows_bytes(model, step) - hidden,
    )
    whole = [matrix_params(model, layer) for layer, _ in layers]
    for place, (_, shape) in enumerate(layers):
        before, after = whole[place - 1] if place else 0, whole[place + 1] if place + 1 < len(whole) else 0
        units = root // 2 + step.width * (2 * whole[place] + before) + FLOAT32_BYTES * after
        kept = joined[place] if step.recompute else sum(joined[: place + 1])
        yield _Moment(
            gathered=roots + units,
            activations=_activations_before(model, step, place + 1) + kept,
            working=_layer_bytes(model, shape, step),
        )
    # The student's embeddings and head have been given back; their gradients are there.
    yield _Moment(gathered=roots, activations=0, working=FLOAT32_BYTES * root_matrices(model))


def _moments_alone(model: ModelConfig, step: MicroStep) -> Iterator[_Moment]:
    """The loss, and the layer that needs most, in one process, which holds autocast's copies of the layers' weights."""
    copies = _autocast_copies(model, step)
    activations = activation_bytes(model, step)
    for working in (loss_bytes(model, step) + kept_rows_bytes(model, step), layer_at_work(model, step)):
        yield _Moment(gathered=copies, activations=activations, working=working)


# Activations


def activation_bytes(model: ModelConfig, step: MicroStep) -> int:
    """What is saved of the forward pass: all that layers save, or with recomputation the input of each."""
    return step.tokens * _norm(step.subnet.hidden, step) + _activations_before(model, step, step.subnet.depth)


def _activations_before(model: ModelConfig, step: MicroStep, layers: int) -> int:
    """What is saved until so many layers have run: of the masked embeddings, and of these layers."""
    hidden = step.tokens * step.width * step.subnet.hidden
    embedded = hidden if step.masked else 0
    if step.recompute:
        return embedded + (min(layers, ON_DEVICE) if step.offload else layers) * hidden
    ran = Counter(islice(shapes(model, step.subnet), layers))
    return embedded + sum(count * saved_bytes(model, shape, step) for shape, count in ran.items())


def saved_bytes(model: ModelConfig, shape: LayerShape, step: MicroStep) -> int:
    """What autograd saves of one layer: its norm, its mixer, and its output where a mask weighs it."""
    weighed = step.width * shape.hidden if step.masked else 0
    return step.tokens * (_norm(shape.hidden, step) + KINDS[shape.kind].saved_bytes(model, shape, step) + weighed)


def _norm(hidden: int, step: MicroStep) -> int:
    """Of a token: the norm's output, which the next product saves; its input in float32 and its root mean square.

    Under a mask the input is saved as it came.
    """
    return step.width * hidden + (step.width * hidden if step.masked else FLOAT32_BYTES * (hidden + 1))


# For a while


def loss_bytes(model: ModelConfig, step: MicroStep, *, gathered: bool = False) -> int:
    """What losses.py holds at its peak: hidden states and their gradient, the gradient of the head, a chunk's buffers.

    `gathered`: the head is there in the dtype of computation already.
    """
    task, vocabulary, hidden = step.distillation, model.vocab_size, step.subnet.hidden
    rows = min(default_chunk_tokens(vocabulary, hidden), step.tokens)
    logits, cast_logits = FLOAT32_BYTES * rows * vocabulary, step.cast * rows * vocabulary
    head_gradient = vocabulary * hidden * (FLOAT32_BYTES if rows < step.tokens or not gathered else step.width)
    head_copy = 0 if gathered else step.cast * vocabulary * hidden
    states = step.tokens * step.width * (2 * hidden + (model.hidden_size if task.kl_weight > 0 else 0))
    if task.kl_weight > 0:  # logits of both, and the teacher's probabilities, with the softmax at temperature 1
        buffers, softmax = 2 * logits, (2 if task.temperature != 1.0 and task.ce_weight > 0 else 1) * logits
    else:
        buffers, softmax = logits, cast_logits
    before = cast_logits if rows < step.tokens else 0  # the gradient of the chunk before is still there
    working = max(softmax + before, cast_logits + step.cast * vocabulary * hidden)
    return states + head_gradient + head_copy + buffers + working


def kept_rows_bytes(model: ModelConfig, step: MicroStep) -> int:
    """The hidden states of student and teacher once more, without the tokens after which nothing is to be learned."""
    teacher = model.hidden_size if step.distillation.kl_weight > 0 else 0
    return step.tokens * step.width * (step.subnet.hidden + teacher)


def layer_at_work(model: ModelConfig, step: MicroStep) -> int:
    """The layer whose backward pass needs most."""
    return max(_layer_bytes(model, shape, step) for shape in set(shapes(model, step.subnet)))


def _layer_bytes(model: ModelConfig, shape: LayerShape, step: MicroStep) -> int:
    """What a layer's backward pass needs; with recomputation, what it saves is made again first.

    A masked norm saves the layer's input, which is there.
    """
    again = saved_bytes(model, shape, step) if step.recompute else 0
    there = step.tokens * step.width * shape.hidden if step.recompute and step.masked else 0
    return again - there + _backward_bytes(model, shape, step)


def _backward_bytes(model: ModelConfig, shape: LayerShape, step: MicroStep) -> int:
    """The gradients that a layer's backward pass holds at once, in its norm or in its mixer, from above.

    What a mask weighed is given back before the mixer's.
    """
    tile = TILE_TENSORS * FLOAT32_BYTES * ceil(min(shape.hidden, GPU_VALUES / step.tokens))
    norm = 2 * step.width * shape.hidden + (tile if step.masked else 2 * FLOAT32_BYTES * shape.hidden)
    mixer = KINDS[shape.kind].gradient_bytes(model, shape, step)
    return step.tokens * max(norm, (0 if step.masked else step.width * shape.hidden) + mixer)


def _autocast_copies(model: ModelConfig, step: MicroStep) -> int:
    """The layers' weights as autocast casts them, which the backward pass uses again."""
    counted = ParamsCost(model=model)
    return step.cast * sum(map(counted.layer, shapes(model, step.subnet)))


def _joined(model: ModelConfig, step: MicroStep, layer: int, shape: LayerShape) -> int:
    """The copies that `take` makes of a layer's matrices where they are not one prefix, for autograd to keep."""
    kept = shape.kept(model)
    return step.width * sum(w.numel(kept) for w in _matrices(model, layer).values() if w.is_joined(kept))


def root_matrices(model: ModelConfig) -> int:
    """Elements of embeddings and head."""
    return 2 * model.vocab_size * model.hidden_size


@cache
def matrix_params(model: ModelConfig, layer: int) -> int:
    """Elements of the matrices of a whole layer that FSDP2 shards: all but the router of experts."""
    return sum(weight.numel() for name, weight in _matrices(model, layer).items() if not keeps_type(name, 2))


@cache
def _undivided(model: ModelConfig) -> int:
    """Elements of the routers of experts, which every process holds whole, as parallel.py has it."""
    matrices = (item for layer in range(model.num_layers) for item in _matrices(model, layer).items())
    return sum(weight.numel() for name, weight in matrices if keeps_type(name, 2))


@cache
def _matrices(model: ModelConfig, layer: int) -> dict[str, Layout]:
    laid_out = KINDS[model.hybrid_override_pattern[layer]].mixer.lay_out(model, layer)
    return {f"mixer.{name}": weight for name, weight in laid_out.items() if len(weight.dims) == 2}
