"""Counts what a computation moves and launches outside matrix products and attention, without a GPU.

Torch's operations are counted by a dispatch mode, and the kernels of ``wan_model.kernels``, which are not computed, by
their arguments: every input is read once and every output written once. Run it on CPU tensors; the values that kernels
would have written are undefined.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default}
# They allocate memory and launch nothing.
_ALLOCATE = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default}


@dataclasses.dataclass
class Traffic:
    """What was counted.

    Attributes:
        bytes: read and written outside matrix products and attention.
        launches: of operations and kernels outside matrix products and attention.
        kept: bytes that autograd keeps for the backward pass, by type; each piece of memory once.
    """

    bytes: int = 0
    launches: int = 0
    kept: dict[torch.dtype, int] = dataclasses.field(default_factory=dict)


def _size(x: Tensor) -> int:
    # A broadcast tensor is read once, from what it is stored in.
    return min(x.numel(), x.untyped_storage().nbytes() // x.element_size()) * x.element_size()


def _is_view(operator: Any) -> bool:
    returned = operator._schema.returns
    return bool(returned) and all(one.alias_info is not None and not one.alias_info.is_write for one in returned)


class _Counter(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        attends = "attention" in func.name()
        if not (attends or func in _PRODUCTS or func in _ALLOCATE or _is_view(func)):
            tensors = [one for one in tree_leaves((args, kwargs)) + tree_leaves(out) if isinstance(one, Tensor)]
            self.traffic.bytes += sum(map(_size, tensors))
            self.traffic.launches += 1
        return out


@contextlib.contextmanager
def counted(*, kernels: bool) -> Iterator[Traffic]:
    """Count in this context.

    Args:
        kernels: whether the kernels for CUDA are used.
    """
    from wan_model.kernels import available
    from wan_model.kernels.launch import Kernel

    traffic = Traffic()
    seen: dict[int, Tensor] = {}

    def launch(self: Kernel, grid: Any, *arguments: Any, **constants: Any) -> None:
        traffic.bytes += sum(_size(one) for one in arguments if isinstance(one, Tensor))
        traffic.launches += 1

    def keep(x: Tensor) -> Tensor:
        memory = x.untyped_storage().data_ptr()
        if memory not in seen and not isinstance(x, torch.nn.Parameter):
            seen[memory] = x  # so that the memory is not used again
            traffic.kept[x.dtype] = traffic.kept.get(x.dtype, 0) + _size(x)
        return x

    with (
        mock.patch.object(available, "for_tensor", return_value=kernels),
        mock.patch.object(Kernel, "launch", launch),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        _Counter(traffic),
    ):
        yield traffic
