"""What tensors take: bytes of the storages that a block of code makes and holds."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Inside the block, of all storages that it made: `now` bytes are held, `peak` were at most.

    It counts on any device, and fake tensors as if they were there; those of the meta device take nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, made_here=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._meet(tensor, made_here=True)
        return out

    def _meet(self, tensor: Any, made_here: bool) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:  # type: ignore[attr-defined]
            return
        size = storage.nbytes() if made_here else 0
        self._known.add(storage._cdata)  # type: ignore[attr-defined]
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, size)  # type: ignore[attr-defined]

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
