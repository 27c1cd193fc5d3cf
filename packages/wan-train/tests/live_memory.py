"""The bytes of all tensors that live, counted operation by operation; on any device, exact, whatever holds them."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts storages that are made while it is active and until they are freed.

    Attributes:
        total: bytes that live now.
        peak: the most that lived at any time.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        self._live: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._know(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A view of what was there before is nothing new.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._live:
                self._know(tensor.untyped_storage())
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.total)
        return out

    def _know(self, storage: Any) -> None:
        # As long as it lives: its address may be another storage's afterwards.
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda reference: self._known.pop(key, None))

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._live or key in self._known:
            return

        def gone(reference: object) -> None:
            del self._live[key]
            self.total -= size

        self._live[key] = weakref.ref(storage, gone)
        self.total += size
