"""What a layer kind answers to whoever counts, ranks, cuts, plans or trains.

A kind is one file of this folder. Of its tensors it says how they are laid out: what a subnet keeps of them, where
that lies in a checkpoint and how many parameters it has all follow from there.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_core.geometry import ModelConfig
from elastic_core.layers.kernels import Backend
from elastic_core.layers.packing import Packing
from elastic_core.layers.weights import take
from elastic_core.layout import WHOLE, Kept, Layout
from elastic_core.schema import OPTIONAL

FLOAT32_BYTES = 4


@dataclass(slots=True)
class Cache:
    """What decoding carries from one call to the next, at one subnet: a layer's index to its states and its weights.

    The weights are taken once a text, and not once a token: some must be gathered from inside groups. `padding` is
    there where shorter texts are padded on the left; `real_BT` then says which of the tokens that are being read are
    the texts' own, None where all are.
    """

    conv: dict[int, Tensor] = field(default_factory=dict)
    ssm: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    padding: "Padding | None" = None
    seen: int = 0
    real_BT: Tensor | None = None

    def read(self, tokens: int) -> None:
        """Begin to read so many tokens more of each text."""
        first, self.seen = self.seen, self.seen + tokens
        self.real_BT = self.padding.real(first, self.seen) if self.padding else None

    def copied(self) -> "Cache":
        """The same texts, to go on with apart from these."""
        return replace(
            self,
            conv=dict(self.conv),
            ssm=dict(self.ssm),
            keys=dict(self.keys),
            values=dict(self.values),
            weights=dict(self.weights),
        )


@dataclass(frozen=True, slots=True)
class Padding:
    """Left padding: the tokens before each text of a batch, (B,), and the most of them, known on the host."""

    first_B: Tensor
    most: int

    def real(self, first: int, end: int) -> Tensor | None:
        """Which of the tokens from `first` to `end` belong to the texts, (B, T); None where all do."""
        if first >= self.most:
            return None
        return torch.arange(first, end, device=self.first_B.device) >= self.first_B[:, None]


class Mixer(nn.Module):
    """What a layer adds to the residual stream, computed of its normalised input with the weights that are kept.

    `residual` names the projection back to the residual stream, which fresh weights make smaller in a deeper model.
    """

    residual: str

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.layouts = config, layer, self.lay_out(config, layer)

    @staticmethod
    def lay_out(model: ModelConfig, layer: int) -> dict[str, Layout]:
        """How each tensor is laid out, by name, in the order of a checkpoint; sides are named by axis."""
        raise NotImplementedError

    def forward(
        self,
        x_BTD: Tensor,
        kept: Kept,
        soft: Mapping[str, Tensor] | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None = None,
    ) -> Tensor:
        """`kept` and `soft` have the sizes and the masks of the sides that the layouts name."""
        weights = self.weights(kept, cache)
        parts_BTC = self.components(x_BTD, weights, kept, soft, cache, backend, packing)
        return F.linear(parts_BTC, weights[self.residual])

    def components(
        self,
        x_BTD: Tensor,
        weights: Mapping[str, Tensor],
        kept: Kept,
        soft: Mapping[str, Tensor] | None,
        cache: Cache | None,
        backend: Backend,
        packing: Packing | None,
    ) -> Tensor:
        """What the residual projection takes: the outputs of the layer's components, of these kept weights."""
        raise NotImplementedError

    def weights(self, kept: Kept, cache: Cache | None) -> dict[str, Tensor]:
        """What is kept of every tensor, by name; what was, when the cache first saw the layer."""
        if cache is not None and self.layer in cache.weights:
            return cache.weights[self.layer]
        taken = {name: take(self.get_parameter(name), layout, kept) for name, layout in self.layouts.items()}
        if cache is not None:
            cache.weights[self.layer] = taken
        return taken


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The sizes that a layer's cost depends on.

    `width` is its FFN width, Mamba heads, query heads or the width of a routed expert; the sizes of axes that the layer
    lacks are 0.
    """

    kind: str
    hidden: int
    width: int
    mamba_head_dim: int = 0
    experts: int = field(default=0, metadata=OPTIONAL)
    shared_ffn: int = field(default=0, metadata=OPTIONAL)
    top_k: int = field(default=0, metadata=OPTIONAL)
    latent: int = field(default=0, metadata=OPTIONAL)

    def sizes(self, model: ModelConfig) -> dict[str, int]:
        """The size of such a layer on each of its axes."""
        width, *others = model.axes_of(self.kind)
        return {width: self.width} | {axis: getattr(self, axis) for axis in others}

    def kept(self, model: ModelConfig) -> Kept:
        """What such a layer keeps on each of its axes: of heads, so many in each group."""
        return {"hidden": self.hidden} | {axis: n // model.groups(axis) for axis, n in self.sizes(model).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingStep:
    """The largest step of a served slice: `tokens` of each of `batch` texts, in a cache of `context` tokens a text.

    `width` is the bytes of a value.
    """

    batch: int
    context: int
    tokens: int
    width: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


class Training(Protocol):
    """A micro-step of training.

    Its tokens, the bytes of a value, those of its copy if it is cast, and whether masks weigh it.
    """

    @property
    def tokens(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def cast(self) -> int: ...
    @property
    def masked(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs by part. `projections` are the weights' products but for the head's, `scan` the SSD scan's.

    `attention` is the two products of the scores, of which a causal kernel computes T (T + 1) / 2 a head, not T^2.
    """

    projections: int = 0
    convolution: int = 0
    scan: int = 0
    attention: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        return self.projections + self.convolution + self.scan + self.attention + self.head

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


class Kind(ABC):
    """A layer kind. `letter` stands for it in the pattern of layers; geometry.py has the axes of each letter."""

    letter: str
    mixer: type[Mixer]

    @abstractmethod
    def width(self, model: ModelConfig) -> tuple[str, object]:
        """What people call its width, and how wide the model's layers are."""

    def text(self, sizes: Mapping[str, object]) -> str:
        """The sizes of such a layer on its axes, as people write them, such as heads x channels."""
        return " x ".join(map(str, sizes.values()))

    def initialise(self, name: str, weight: Tensor, model: ModelConfig, generator: torch.Generator) -> None:
        """Fresh values for a tensor of the mixer: normal, of a residual projection over sqrt(layers)."""
        std = model.initializer_range / (math.sqrt(model.num_layers) if name == self.mixer.residual else 1.0)
        weight.normal_(0.0, std, generator=generator)

    # Importance

    def added(
        self, mixer: Mixer, normed_BTD: Tensor, backend: Backend, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        """What each component adds to the residual stream, summed over these inputs, in float64; the mixer's output.

        Component c of the outputs y counts sum_t |y_tc| ||W_:,c||_2, with W the residual projection: the score of Wanda
        (arXiv 2306.11695), of whole columns.
        """
        weights = mixer.weights(WHOLE, None)
        parts_BTC = mixer.components(normed_BTD, weights, WHOLE, None, None, backend, packing)
        norms_C: Tensor = weights[mixer.residual].double().norm(dim=0)
        sums_C = parts_BTC.abs().sum((0, 1), dtype=torch.float64) * norms_C
        return sums_C, F.linear(parts_BTC, weights[mixer.residual])

    @abstractmethod
    def activations(self, mixer: Mixer, normed_BTD: Tensor, *, signed: bool) -> Tensor:
        """The sums of arXiv 2511.16664 over these inputs; `signed` sums keep their sign."""

    @abstractmethod
    def order(self, model: ModelConfig, scores: Tensor, kept: Mapping[str, int]) -> dict[str, Tensor]:
        """The components of each axis by falling score, for subnets that keep at least `kept`; heads inside groups."""

    # Cost

    def idle_params(self, model: ModelConfig, shape: LayerShape) -> int:
        """Parameters of such a layer that no product of a token's forward pass reads."""
        return 0

    def cache_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        """What `Cache` holds for such a layer."""
        return 0

    @abstractmethod
    def serving_bytes(self, model: ModelConfig, shape: LayerShape, serving: ServingStep) -> int:
        """What the mixer needs at its most, beside its input."""

    @abstractmethod
    def saved_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """What autograd saves of the mixer's forward pass, of a token."""

    @abstractmethod
    def gradient_bytes(self, model: ModelConfig, shape: LayerShape, step: Training) -> int:
        """What the mixer's backward pass holds at its most beside what is saved, of a token, from above."""

    @abstractmethod
    def flops(self, model: ModelConfig, shape: LayerShape, tokens: int, *, last_projection: bool) -> Flops:
        """A forward pass over a sequence, with or without the projection that gives the mixer's output."""


def descending(scores: Tensor, groups: int = 1) -> Tensor:
    """Indices by falling score, of each of `groups` equal groups in that group's place."""
    in_group = scores.view(groups, -1).argsort(dim=1, descending=True, stable=True).cpu()
    return (in_group + torch.arange(groups)[:, None] * in_group.shape[1]).flatten()
