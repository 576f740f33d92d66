"""The bytes of tensors that are alive while a function runs: an allocator's view of it, without an allocator."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every tensor that an operation returns until it is gone; `peak` is the most that were alive at once.

    A storage counts once, however many views it has; those of `given` tensors do not count. What an operation needs
    only inside itself is not seen.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(
        self, operation: Any, types: Any, inputs: tuple[Any, ...] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        outputs = operation(*inputs, **(named or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return outputs

    def _freed(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.live -= size
