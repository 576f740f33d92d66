"""The inputs of recomputed layers in host memory, between a layer's forward pass and its backward pass.

They are copied beside the compute. The backward pass of a layer brings back the input of the layer before it too, so
that none is waited for; two are on the device at once.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class InputsOnHost(saved_tensors_hooks):
    """While this context is open, what autograd saves is moved to the host, bit for bit.

    Open it around a checkpointed layer, whose only saved tensor is its input.
    """

    def __init__(self) -> None:
        super().__init__(self._move_out, self._bring_back)
        self._last: weakref.ref[_Moved] | None = None

    def _move_out(self, tensor: Tensor) -> "_Moved":
        before = self._last() if self._last is not None else None
        moved = _Moved(tensor, before)
        self._last = weakref.ref(moved)
        return moved

    @staticmethod
    def _bring_back(moved: "_Moved") -> Tensor:
        tensor = moved.tensor()
        before = moved.before() if moved.before is not None else None
        if before is not None:
            before.fetch()
        return tensor


class _Moved:
    """A tensor on the host; `before` is the one that was moved before it, which is needed after it.

    References between them are weak, so that autograd's graph alone keeps them.
    """

    def __init__(self, tensor: Tensor, before: "_Moved | None") -> None:
        self.before = weakref.ref(before) if before is not None else None
        self._device = tensor.device
        self._back: Tensor | None = None
        self._streams, side = torch.get_device_module(tensor.device), _side_stream(tensor.device)
        self._host = empty_on_host(tensor)
        side.wait_stream(self._streams.current_stream())
        with self._streams.stream(side):
            self._host.copy_(tensor, non_blocking=True)
        if tensor.is_cuda:
            tensor.record_stream(side)  # its memory is not given away before it is copied

    def fetch(self) -> None:
        """Begin to copy the tensor back."""
        if self._back is not None:
            return
        with self._streams.stream(_side_stream(self._device)):
            self._back = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._device)
            self._back.copy_(self._host, non_blocking=True)

    def tensor(self) -> Tensor:
        """The tensor on its device, once it is there; only once, for the copy is given away."""
        self.fetch()
        current = self._streams.current_stream()
        current.wait_stream(_side_stream(self._device))
        tensor, self._back = self._back, None
        assert tensor is not None, "fetch copies it back"
        if tensor.is_cuda:
            tensor.record_stream(current)
        return tensor


def empty_on_host(like: Tensor) -> Tensor:
    """Room for a tensor in host memory, pinned where a device copies to it."""
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=like.is_cuda)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """The stream of a device that copies run on."""
    return torch.get_device_module(device).Stream()
