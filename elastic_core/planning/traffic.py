"""What the GPUs of a stage send one another, in bytes: the weights that FSDP2 gathers, the gradients that it reduces.

A layer that is run is gathered and reduced whole, whatever subnet runs of it; a layer that a subnet leaves out is not.
Collectives are planned as rings: every GPU sends all but its own share of a tensor to the next, so that as much leaves
every host. Where every host has a copy of the weights, all of that stays inside a host, and hosts average gradients.

Beside it stands what expert parallelism would send, which is not built.
"""

from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from elastic_core.geometry import MOE, ModelConfig
from elastic_core.layers.kind import FLOAT32_BYTES
from elastic_core.planning.memory import MicroStep, matrix_params, root_matrices
from elastic_core.subnet import Subnet, full_subnet


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of whole tensors that a micro-step gathers, in the dtype of computation, and reduces, in float32."""

    gathered: int
    reduced: int

    def sent(self, gpus: int) -> int:
        """Bytes that one of `gpus` sends."""
        return round((self.gathered + self.reduced) * Fraction(gpus - 1, gpus))


def micro_step_traffic(model: ModelConfig, step: MicroStep, gpus: int) -> Traffic:
    """The traffic of a micro-step on one of `gpus`, none on one.

    The student is gathered for its forward pass and for its backward pass, but for embeddings and head, which stay
    gathered in between; those of a frozen teacher stay for the whole stage. A trainable teacher is the student.
    """
    if gpus == 1:
        return Traffic(gathered=0, reduced=0)
    root, layers = root_matrices(model), layer_matrices(model, step.subnet)
    gathered = root + 2 * layers
    if step.distillation.kl_weight > 0:
        gathered += layer_matrices(model, full_subnet(model))
    return Traffic(gathered=step.width * gathered, reduced=FLOAT32_BYTES * (root + layers))


def averaging_traffic(model: ModelConfig, layers: Collection[int], shards: int, hosts: int) -> int:
    """Bytes that one GPU sends, once a step, to average its `1 / shards` of the gradients of these layers over `hosts`.

    An all-reduce in float32: every part goes round the ring twice, but for one hop each time.
    """
    params = root_matrices(model) + sum(matrix_params(model, layer) for layer in layers)
    return round(2 * FLOAT32_BYTES * Fraction(params, shards) * Fraction(hosts - 1, hosts))


def expert_parallel_traffic(model: ModelConfig, step: MicroStep) -> int:
    """Bytes that one GPU would give and take in a micro-step if every expert lay whole on one GPU.

    Each token goes to all experts that it chose, and what they make of it comes back: when the student runs, when
    recomputation runs it again, when its gradients run back, and when a frozen teacher runs.
    """

    def moved(subnet: Subnet) -> int:
        return 2 * subnet.top_k * (subnet.latent or subnet.hidden) * len({*subnet.layers} & {*model.layers_of(MOE)})

    elements = (2 + step.recompute) * moved(step.subnet)
    if step.distillation.kl_weight > 0:
        elements += moved(full_subnet(model))
    return step.width * step.tokens * elements


def layer_matrices(model: ModelConfig, subnet: Subnet) -> int:
    """Elements of the matrices of the layers that `subnet` keeps, at full width."""
    return sum(matrix_params(model, layer) for layer in subnet.layers)
