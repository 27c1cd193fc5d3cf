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

from wan_model.config import WanConfig
from wan_model.dit.lora import LoraSettings
from wan_model.pack import PackLayout

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
        kept: bytes that autograd keeps for the backward pass besides parameters, by type; each piece of memory once.
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
        storage = x.untyped_storage()
        memory = storage.data_ptr()
        # A matrix product keeps the transposed view of its weight.
        parameter = isinstance(x if x._base is None else x._base, torch.nn.Parameter)
        if memory not in seen and not parameter:
            seen[memory] = x  # so that the memory is not used again
            # All of it: a view keeps what it is a view of.
            traffic.kept[x.dtype] = traffic.kept.get(x.dtype, 0) + storage.nbytes()
        return x

    with (
        mock.patch.object(available, "for_tensor", return_value=kernels),
        mock.patch.object(Kernel, "launch", launch),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        _Counter(traffic),
    ):
        yield traffic


# A block, and packs, that are small enough to be counted in a second.
BLOCK = WanConfig(num_heads=2, head_dim=48, ffn_dim=560, num_layers=1, text_dim=16, text_length=32, freq_dim=32)
PACKS = {"a video": PackLayout(((4, 8, 8),)), "27 images": PackLayout(((1, 4, 8),) * 27)}


@dataclasses.dataclass
class BlockStep:
    """The two passes of a block in bf16.

    Attributes:
        forward, backward: of the passes.
        unit: bytes of the block's rows.
    """

    forward: Traffic
    backward: Traffic
    unit: int


def block_step(
    config: WanConfig, layout: PackLayout, *, kernels: bool, adapters: LoraSettings | None = None, dropped: bool = False
) -> BlockStep:
    """Count a training step of one block on a pack.

    Args:
        config: sizes.
        layout: of the pack.
        kernels: whether the kernels for CUDA are used.
        adapters: trained on a frozen block, which is not the first: its rows have a gradient, text and time have none.
        dropped: whether adapters drop values of their inputs.
    """
    from wan_model import TokenRows, WanDiT
    from wan_model.dit.adapters import add_adapters
    from wan_model.dit.rope import rotary_table

    model, rng = WanDiT(dataclasses.replace(config, num_layers=1)), torch.Generator().manual_seed(1)
    if adapters is not None:
        add_adapters(model, adapters)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.02
    block = model.to_precision(torch.bfloat16).blocks["0"]
    samples, width, rows = layout.num_samples, config.hidden_size, TokenRows.whole(layout)
    x, text = (
        torch.randn(count, width, generator=rng).bfloat16() for count in (layout.total, samples * config.text_length)
    )
    time = torch.randn(samples, 6, width, generator=rng)
    x.requires_grad_()
    text.requires_grad_(adapters is None)
    time.requires_grad_(adapters is None)
    offsets = tuple(i * config.text_length for i in range(samples + 1))
    table = rotary_table(rows, config.head_dim, torch.device("cpu"))
    arguments = (x, time, text, rows, table, offsets, 1 if dropped else None)
    with counted(kernels=kernels) as forward:
        out = block(*arguments)
    with counted(kernels=kernels) as backward:
        out.backward(torch.ones_like(out))
    return BlockStep(forward, backward, x.numel() * 2)
