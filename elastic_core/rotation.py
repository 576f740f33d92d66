"""The principal channels of the residual stream: the one rotation of a model after which a few channels carry most.

An RMSNorm divides by the length of a vector, which no rotation changes. So once the weights of every norm are
multiplied into the matrices that read it, the residual stream may be rotated by any orthonormal basis without a change
of the function (SliceGPT, arXiv 2401.15024, section 3, with one basis for all layers, because one stock checkpoint has
one residual stream). In the basis of the principal components, what the stream varies along comes first, and cutting
the last channels loses the least energy that any cut to as many channels can lose.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_core.files import shards
from elastic_core.files.checkpoint import TensorPlace, open_checkpoint, tensor_places, write_checkpoint
from elastic_core.files.shards import Progress
from elastic_core.geometry import ModelConfig
from elastic_core.layers.kernels import select_backend
from elastic_core.model import ElasticNemotronH
from elastic_core.subnet import full_subnet
from elastic_core.training.tokens import TokenBatch

# Gives a tensor by its name in memory as consecutive blocks of rows.
Blocks = Callable[[str], Iterable[Tensor]]


@torch.no_grad()
def residual_covariance(model: ElasticNemotronH, batches: Iterable[TokenBatch]) -> Tensor:
    """Sum of x x^T over tokens and norms, (D, D), float64, on the CPU; x the norm's input, at root mean square 1.

    Every norm counts alike, the final one too: each layer sees the stream at the same size.
    """
    device, size = model.embeddings.weight.device, model.config.hidden_size
    backend, full = select_backend(model.backend, device), full_subnet(model.config)
    total_DD = torch.zeros(size, size, dtype=torch.float64, device=device)

    def count(x_BTD: Tensor) -> None:
        x_TD = F.rms_norm(x_BTD.flatten(0, 1).float(), (size,), eps=model.config.layer_norm_epsilon)
        total_DD.add_(x_TD.T @ x_TD)

    for batch in (batch.to(device) for batch in batches):
        x_BTD = model.embeddings(batch.inputs_BT)
        for layer in model.layers:
            count(x_BTD)
            x_BTD = layer(x_BTD, full, None, None, backend, batch.packing)
        count(x_BTD)
    return total_DD.cpu()


def principal_basis(covariance_DD: Tensor) -> Tensor:
    """Eigenvectors as columns, (D, D), float64, that of the largest eigenvalue first.

    The largest entry of each is positive, so that the basis does not depend on the solver's choice of sign.
    """
    vectors_DD: Tensor = torch.linalg.eigh(covariance_DD.double()).eigenvectors.flip(1)
    largest = vectors_DD.abs().argmax(0, keepdim=True)
    return vectors_DD * vectors_DD.gather(0, largest).sign()


def rotate_weights(weights: Mapping[str, Tensor], basis_DD: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of a model, by name in memory, with the columns of `basis_DD` as its hidden channels."""
    check_basis(basis_DD, config)
    return {
        name: torch.cat([*_rotated(name, place, lambda name: [weights[name]], basis_DD)])
        for name, place in tensor_places(config).items()
    }


def rotate_checkpoint(source: Path, basis_DD: Tensor, target: Path, *, progress: Progress | None = None) -> None:
    """Write the checkpoint `source`, rotated, to the new directory `target`, in bounded memory (C7).

    Tensors keep the types that they are stored in; each entry is rounded to it once.
    """
    checkpoint = open_checkpoint(source)
    check_basis(basis_DD, checkpoint.config)
    places = tensor_places(checkpoint.config)

    def read(name: str) -> Iterator[Tensor]:
        return checkpoint.tensors[name].blocks(*[None] * len(checkpoint.tensors[name].shape))

    write_checkpoint(
        target,
        checkpoint.config,
        checkpoint.tensors,
        lambda name: _rotated(name, places[name], read, basis_DD),
        source=source,
        progress=progress,
    )


def check_basis(basis_DD: Tensor, config: ModelConfig) -> None:
    """Raise ValueError unless the columns of `basis_DD` are an orthonormal basis of the model's hidden channels."""
    size = config.hidden_size
    if basis_DD.shape != (size, size):
        raise ValueError(f"basis is {list(basis_DD.shape)}; the model's hidden size needs [{size}, {size}]")
    basis_DD = basis_DD.double()
    error = float((basis_DD.T @ basis_DD - torch.eye(size, dtype=torch.float64)).abs().max())
    if not error < 1e-6:
        raise ValueError(f"basis is not orthonormal: an entry of B^T B is {error:.1e} off")


def _rotated(name: str, place: TensorPlace, read: Blocks, basis_DD: Tensor) -> Iterator[Tensor]:
    """A tensor's blocks of rows after x -> B^T x: W diag(norm) B where it reads the stream, B^T W where it writes."""
    axes = place.layout.axes
    if "hidden" not in axes:
        yield from read(name)
    elif axes == ("hidden",):
        yield from (torch.ones_like(block) for block in read(name))
    elif axes[0] == "hidden":
        yield from _written(lambda: read(name), basis_DD)
    else:
        norm = _norm_before(name, place)
        gain_D = None if norm is None else torch.cat([*read(norm)])
        for block in read(name):
            wide = block.to(_wider(block.dtype))
            wide = wide if gain_D is None else wide * gain_D.to(wide.dtype)
            yield (wide @ basis_DD.to(wide.dtype)).to(block.dtype)


def _written(read: Callable[[], Iterable[Tensor]], basis_DD: Tensor) -> Iterator[Tensor]:
    """B^T W by blocks of rows, each a sum over all blocks of W, which is read once for each."""
    first = next(iter(read()))
    wide = _wider(first.dtype)
    rows = max(1, shards.BLOCK_BYTES // (first.shape[1] * wide.itemsize))
    for columns_DR in basis_DD.to(wide).split(rows, dim=1):
        total, start = torch.zeros(columns_DR.shape[1], first.shape[1], dtype=wide), 0
        for block in read():
            total.addmm_(columns_DR[start : start + len(block)].T, block.to(wide))
            start += len(block)
        yield total.to(first.dtype)


def _norm_before(name: str, place: TensorPlace) -> str | None:
    """The norm whose output a matrix reads; None for the embedding, which reads tokens."""
    if place.layer is not None:
        return f"layers.{place.layer}.norm.weight"
    return "norm_f.weight" if name == "lm_head.weight" else None


def _wider(dtype: torch.dtype) -> torch.dtype:
    """What products are taken in, so that only the result is rounded to `dtype`."""
    return torch.float32 if dtype.itemsize < 4 else torch.float64
