"""What one GPU holds at the peak of a micro-step of training, in bytes by part.

Exact: master weights, gradients and AdamW's moments, all in float32, and the teacher in the dtype of computation.
Tensor by tensor: what autograd saves of the forward pass with the fused kernels on CUDA, and the buffers of the loss.
From above: what a layer's backward pass, or a unit that FSDP2 gathers, needs for a while. The plain scan of ssm.py
saves several times what the fused one does, and is not planned for.
"""

from collections import Counter
from dataclasses import dataclass
from math import ceil

from elastic_core.budget import Dtype
from elastic_core.cost import DTYPE_BYTES, ParamsCost, embedding_params, shapes
from elastic_core.geometry import ModelConfig
from elastic_core.layers.kind import FLOAT32_BYTES, Shape
from elastic_core.layers.kinds import KINDS
from elastic_core.recipe import Distillation
from elastic_core.subnet import Subnet, full_subnet
from elastic_core.training.losses import default_chunk_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one GPU, by part.

    `gathered` is weights in the dtype of computation beside the float32 ones: autocast's copies in one process; in
    several, the units that FSDP2 holds whole, and their gradients. `activations` is what the backward pass waits for.
    `working` is what the loss or one layer needs on top, whichever is more.
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


def training_memory(model: ModelConfig, step: MicroStep, *, gpus: int, router_params: int = 0) -> Memory:
    """The memory of one of `gpus` that train together (parallel.py); every one holds the router whole."""
    params = ParamsCost(model=model).of(full_subnet(model))
    mine = ceil(params / gpus) + router_params
    working = max(loss_bytes(model, step, gathered=gpus > 1), layer_at_work(model, step))
    if gpus > 1:
        working = max(working, _last_reduction(model, step))
    return Memory(
        parameters=FLOAT32_BYTES * mine,
        gradients=FLOAT32_BYTES * mine,
        optimizer=2 * FLOAT32_BYTES * mine,
        teacher=step.width * ceil(params / gpus) if step.has_teacher else 0,
        gathered=_gathered(model, step) if gpus > 1 else _autocast_copies(model, step),
        activations=activation_bytes(model, step),
        working=working,
    )


# Activations


def activation_bytes(model: ModelConfig, step: MicroStep) -> int:
    """What is saved of the forward pass: all that layers save, or with recomputation the input of each."""
    hidden, width = step.subnet.hidden, step.width
    outside = step.tokens * ((width * hidden if step.masked else 0) + _norm(hidden, step))
    if step.recompute:
        return outside + step.tokens * step.subnet.depth * width * hidden
    layers = Counter(shapes(model, step.subnet))
    return outside + sum(count * saved_bytes(model, shape, step) for shape, count in layers.items())


def saved_bytes(model: ModelConfig, shape: Shape, step: MicroStep) -> int:
    """What autograd saves of one layer: its norm, its mixer, and its output where a mask weighs it."""
    weighed = step.width * shape.hidden if step.masked else 0
    return step.tokens * (_norm(shape.hidden, step) + KINDS[shape.kind].saved_bytes(model, shape, step) + weighed)


def _norm(hidden: int, step: MicroStep) -> int:
    """Of a token: the input in float32 and its root mean square, and the output, which the next product saves.

    A mask takes the norm apart, and the normalised values and a second mean are saved too.
    """
    wide = FLOAT32_BYTES * (hidden + 1)
    return (2 if step.masked else 1) * wide + step.width * hidden


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


def layer_at_work(model: ModelConfig, step: MicroStep) -> int:
    """The layer whose backward pass needs most; with recomputation, what it saves is made again first."""
    return max(
        (saved_bytes(model, shape, step) if step.recompute else 0) + _backward_bytes(model, shape, step)
        for shape in set(shapes(model, step.subnet))
    )


def _backward_bytes(model: ModelConfig, shape: Shape, step: MicroStep) -> int:
    """The gradients that a layer's backward pass holds at once, in its norm or in its mixer, from above."""
    norm = 2 * (step.width + FLOAT32_BYTES) * shape.hidden
    mixer = KINDS[shape.kind].gradient_bytes(model, shape, step)
    return step.tokens * max(norm, step.width * shape.hidden + mixer)


def _autocast_copies(model: ModelConfig, step: MicroStep) -> int:
    """The layers' weights as autocast casts them, which the backward pass uses again."""
    counted = ParamsCost(model=model)
    return step.cast * sum(map(counted.layer, shapes(model, step.subnet)))


def _gathered(model: ModelConfig, step: MicroStep) -> int:
    """Embeddings and head of student and teacher, a layer and the next, the gradients of the layer and of the head.

    A layer's gradient is there in the dtype of computation and in float32, in which it is reduced.
    """
    roots = (2 if step.has_teacher else 1) * embedding_params(model, model.hidden_size)
    largest = _largest_layer(model)
    head = model.vocab_size * model.hidden_size
    return step.width * (roots + 3 * largest + head) + FLOAT32_BYTES * largest


def _last_reduction(model: ModelConfig, step: MicroStep) -> int:
    """The gradient of embeddings and head, reduced at the end of the backward pass."""
    return (step.width + FLOAT32_BYTES) * embedding_params(model, model.hidden_size)


def _largest_layer(model: ModelConfig) -> int:
    counted = ParamsCost(model=model)
    return max(map(counted.layer, set(shapes(model, full_subnet(model)))))
