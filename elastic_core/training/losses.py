"""Distillation and cross-entropy from the last hidden states, in chunks of tokens.

One float32 tensor of tokens x vocabulary is 26 GB at 49152 tokens and 131072 words. It never exists here: each chunk's
logits are made, turned in place into the gradient with respect to themselves, and folded into the gradients of the
hidden states and of the head before the next chunk reuses the buffers. The backward pass only scales what is there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_BYTES = 64 * 2**20
COLUMNS = 32768  # of the head that a CPU has in float32 at once


@dataclass(frozen=True, slots=True, kw_only=True)
class LossParts:
    """total = kl_weight * kl + ce_weight * cross_entropy; only total has a gradient. tokens: targets that count."""

    total: Tensor
    kl: Tensor
    cross_entropy: Tensor
    tokens: int


def distillation_loss(
    student_hidden_TD: Tensor,
    student_head_VD: Tensor,
    teacher_hidden_TD: Tensor | None,
    teacher_head_VD: Tensor | None,
    targets_T: Tensor,
    *,
    kl_weight: float,
    ce_weight: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
    learned: int | None = None,
    chunk_tokens: int | None = None,
    denominator: float | None = None,
) -> LossParts:
    """Forward KL(teacher || student) and cross-entropy, averaged over the tokens whose target is not ignore_index.

    kl = temperature^2 * sum_v p_v (log p_v - log q_v), where p and q are the softmax of the teacher's and the student's
    logits over the temperature (the task loss of arXiv 2511.16664). cross_entropy is at temperature 1, and reported
    whatever its weight. Where kl_weight is 0 the teacher is not used, may be None, and kl is reported as 0.

    Shapes: T is every token of the batch, flattened; the teacher's D may differ from the student's. A head may be a
    view, such as the first columns of a wider weight. denominator replaces the number of tokens in the averages: under
    gradient accumulation, what micro-batches count on average. With no token to count, all parts and gradients are 0.
    learned is the number of targets that are not ignore_index, where the caller knows it. Without it the host waits for
    the device to count them.

    No gradient reaches the teacher, and none is computed where none is wanted: the same call evaluates. The loss can be
    differentiated once. Products run in the dtype of the hidden states, or in autocast's; softmax, sums, and the head's
    gradient over several chunks in float32 or wider.

    Raises ValueError for shapes that do not fit together, and for weights or a temperature that mean nothing.
    """
    _check_rows("student", student_hidden_TD, student_head_VD, targets_T)
    teacher = None
    if kl_weight != 0:
        teacher = _teacher_for(kl_weight, student_head_VD, teacher_hidden_TD, teacher_head_VD, targets_T)

    # Masked rows are dropped first, so that no product is spent on them.
    if learned != len(targets_T):
        kept = _kept_rows(targets_T != ignore_index, learned)
        student_hidden_TD, targets_T = student_hidden_TD[kept], targets_T[kept]
        if teacher is not None:
            teacher = _Readout(hidden_TD=teacher.hidden_TD[kept], head_VD=teacher.head_VD)

    task = _Task(
        teacher=teacher,
        targets_T=targets_T,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        chunk_tokens=default_chunk_tokens(*student_head_VD.shape) if chunk_tokens is None else chunk_tokens,
    )
    if torch.is_grad_enabled() and (student_hidden_TD.requires_grad or student_head_VD.requires_grad):
        total, kl, cross_entropy = _ChunkedLoss.apply(student_hidden_TD, student_head_VD, task)  # type: ignore[no-untyped-call]
    else:
        total, kl, cross_entropy = _sum_chunks(student_hidden_TD, student_head_VD, task, None, None)

    count = (len(targets_T) if denominator is None else denominator) or 1
    return LossParts(total=total / count, kl=kl / count, cross_entropy=cross_entropy / count, tokens=len(targets_T))


def _teacher_for(
    kl_weight: float, student_head_VD: Tensor, hidden_TD: Tensor | None, head_VD: Tensor | None, targets_T: Tensor
) -> "_Readout":
    """The teacher, whose states and head must be there and fit the student's."""
    if hidden_TD is None or head_VD is None:
        raise ValueError(f"kl_weight={kl_weight} needs a teacher: pass its hidden states and head, or kl_weight=0")
    _check_rows("teacher", hidden_TD, head_VD, targets_T)
    if len(head_VD) != len(student_head_VD):
        raise ValueError(
            f"teacher's vocabulary is {len(head_VD)} and student's {len(student_head_VD)}: they must be one"
        )
    return _Readout(hidden_TD=hidden_TD, head_VD=head_VD)


def _kept_rows(counts_T: Tensor, learned: int | None) -> Tensor:
    """The indices of the rows that count, in order. Where their number is known, nothing waits for the device."""
    if learned is None:
        return counts_T.nonzero().squeeze(1)
    return torch.nonzero_static(counts_T, size=learned).squeeze(1)


def _check_rows(who: str, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> None:
    needed = (len(targets_T), head_VD.shape[1])
    if hidden_TD.shape != needed:
        raise ValueError(
            f"{who}'s hidden states are {tuple(hidden_TD.shape)}, but {len(targets_T)} targets and a head of "
            f"{tuple(head_VD.shape)} need {needed}"
        )


def default_chunk_tokens(vocabulary: int, hidden: int) -> int:
    """Tokens whose float32 logits fill _CHUNK_BYTES, or a quarter of the head's elements where those are more.

    Every chunk reads and writes the head's whole gradient: with few tokens a chunk that, not the products, is the cost.
    A quarter keeps the buffers small beside that gradient, which has to exist anyway.
    """
    return max(_CHUNK_BYTES // (4 * vocabulary), hidden // 4, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Readout:
    """Hidden states and the head that reads logits from them."""

    hidden_TD: Tensor
    head_VD: Tensor

    def in_matmul_dtype(self) -> "_Readout":
        """Both in the dtype of the hidden states, or in autocast's, which spares float64 as it does elsewhere."""
        dtype, device = self.hidden_TD.dtype, self.hidden_TD.device.type
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return _Readout(hidden_TD=self.hidden_TD.to(dtype), head_VD=self.head_VD.to(dtype))

    def logits(self, rows: slice, buffer_TV: Tensor) -> Tensor:
        """Logits of rows, written over the first rows of buffer_TV."""
        hidden_TD = self.hidden_TD[rows]
        return _matmul(hidden_TD, self.head_VD.t(), out=buffer_TV[: len(hidden_TD)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What the student is to learn: every row counts, and the teacher, if any, has the same rows."""

    teacher: _Readout | None
    targets_T: Tensor
    kl_weight: float
    ce_weight: float
    temperature: float
    chunk_tokens: int

    def __post_init__(self) -> None:
        if not (self.kl_weight >= 0 and self.ce_weight >= 0 and self.kl_weight + self.ce_weight > 0):
            raise ValueError(
                f"kl_weight={self.kl_weight} and ce_weight={self.ce_weight}: none may be negative, one must be positive"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive")
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens} must be at least 1")


class _ChunkedLoss(torch.autograd.Function):
    """_sum_chunks with gradients: the forward pass computes them, the backward pass scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, head_VD: Tensor, task: _Task) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_head, _ = ctx.needs_input_grad
        grad_hidden_TD = torch.empty_like(hidden_TD) if needs_hidden else None
        # In bfloat16 a sum over many chunks would stop growing.
        several = len(task.targets_T) > task.chunk_tokens
        dtype = torch.promote_types(head_VD.dtype, torch.float32) if several else head_VD.dtype
        grad_head_VD = head_VD.new_zeros(head_VD.shape, dtype=dtype) if needs_head else None
        total, kl, cross_entropy = _sum_chunks(hidden_TD, head_VD, task, grad_hidden_TD, grad_head_VD)
        ctx.save_for_backward(grad_hidden_TD, grad_head_VD)
        ctx.mark_non_differentiable(kl, cross_entropy)
        return total, kl, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # In place, to spare a copy of the head. A second backward pass would scale twice, but autograd refuses it: it
        # checks the version of what it saved. It also casts what is returned to the dtype of the input.
        gradients = ctx.saved_tensors
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_total)
        return *gradients, None


@torch.no_grad()
def _sum_chunks(
    hidden_TD: Tensor, head_VD: Tensor, task: _Task, grad_hidden_TD: Tensor | None, grad_head_VD: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted total, KL and cross-entropy, summed over tokens; the total's gradients go into the buffers given."""
    student = _Readout(hidden_TD=hidden_TD, head_VD=head_VD).in_matmul_dtype()
    teacher = None if task.teacher is None else task.teacher.in_matmul_dtype()
    with_grad = grad_hidden_TD is not None or grad_head_VD is not None
    size = max(1, min(task.chunk_tokens, len(task.targets_T)))
    dtype = torch.promote_types(student.hidden_TD.dtype, torch.float32)
    student_buffer_TV = head_VD.new_empty((size, len(head_VD)), dtype=dtype)
    teacher_buffer_TV = student_buffer_TV if teacher is None else torch.empty_like(student_buffer_TV)
    kl, cross_entropy = head_VD.new_zeros((), dtype=dtype), head_VD.new_zeros((), dtype=dtype)

    for start in range(0, len(task.targets_T), size):
        rows = slice(start, start + size)
        student_TV = student.logits(rows, student_buffer_TV)
        teacher_TV = None if teacher is None else teacher.logits(rows, teacher_buffer_TV)
        chunk_kl, chunk_cross_entropy = _chunk_loss_(student_TV, teacher_TV, task.targets_T[rows], task, with_grad)
        kl += chunk_kl
        cross_entropy += chunk_cross_entropy

        grad_TV = student_TV.to(student.head_VD.dtype) if with_grad else student_TV
        if grad_hidden_TD is not None:
            _matmul(grad_TV, student.head_VD, out=grad_hidden_TD[rows])
        if grad_head_VD is not None:
            _add_matmul_(grad_head_VD, grad_TV.t(), student.hidden_TD[rows])
    return task.kl_weight * kl + task.ce_weight * cross_entropy, kl, cross_entropy


def _chunk_loss_(
    student_TV: Tensor, teacher_TV: Tensor | None, targets_T: Tensor, task: _Task, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """KL and cross-entropy, summed over a chunk of logits; student_TV becomes the gradient of their weighted sum.

    d kl / d student = temperature * (softmax(student / temperature) - softmax(teacher / temperature))
    d cross_entropy / d student = softmax(student) - onehot(targets)
    """
    _log_softmax_(student_TV)
    cross_entropy = -student_TV.gather(1, targets_T.unsqueeze(1)).sum()
    kl = torch.zeros_like(cross_entropy)
    kl_slope, ce_slope = task.kl_weight * task.temperature, task.ce_weight

    hard_TV = probs_TV = None
    if teacher_TV is not None:
        if task.temperature != 1.0:
            hard_TV = student_TV.exp() if with_grad and ce_slope > 0 else None
            # Normalised logits differ from the logits by a constant per row, which the next softmax removes.
            _log_softmax_(student_TV.div_(task.temperature))
            teacher_TV.div_(task.temperature)
        probs_TV = _log_softmax_(teacher_TV).exp()
        kl = teacher_TV.sub_(student_TV).mul_(probs_TV).sum() * task.temperature**2

    if with_grad:
        student_TV.exp_()
        if (slope := kl_slope if hard_TV is not None else kl_slope + ce_slope) != 1.0:
            student_TV.mul_(slope)
        if probs_TV is not None:
            student_TV.sub_(probs_TV, alpha=kl_slope)
        if hard_TV is not None:
            student_TV.add_(hard_TV, alpha=ce_slope)
        student_TV[torch.arange(len(targets_T), device=targets_T.device), targets_T] -= ce_slope
    return kl, cross_entropy


def _log_softmax_(logits_TV: Tensor) -> Tensor:
    return torch.log_softmax(logits_TV, -1, out=logits_TV)


def _matmul(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """The product in the type of `out`: rounded to bfloat16, logits of 16 to 32 would be 0.125 apart."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    left = left.to(out.dtype)
    for start in range(0, right.shape[1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        torch.mm(left, right[:, columns].to(out.dtype), out=out[:, columns])
    return out


def _add_matmul_(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return total.addmm_(left, right) if total.dtype == left.dtype else total.add_(left @ right)
