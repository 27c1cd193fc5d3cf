"""Forward and backward read nothing back from the device; on an accelerator each such read stalls the queue."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_model import PackLayout, WanDiT
from wan_model.dit.recompute import Recompute

# Operators whose result depends on values that the host must see.
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique", "bincount", "is_nonzero")
LAYOUT = PackLayout(((2, 2, 3), (1, 3, 2)), padding=2)


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.name() == "aten::index.Tensor" else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if by_mask or any(name in func.name() for name in READS):
            raise AssertionError(f"{func.name()} reads from the device")
        return func(*args, **(kwargs or {}))


def arguments(model: WanDiT, device: str) -> tuple[Tensor, Tensor, Tensor, PackLayout]:
    tokens = torch.zeros(LAYOUT.total, model.config.token_in, device=device)
    text = torch.zeros(2, model.config.text_length, model.config.text_dim, device=device)
    return tokens, torch.full((2,), 500.5, device=device), text, LAYOUT


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_the_mode_catches_reads(read: Callable[[Tensor], object]) -> None:
    with NoReads(), pytest.raises(AssertionError, match="reads from the device"):
        read(torch.ones(3))


@pytest.mark.parametrize("recompute", get_args(Recompute))
def test_a_known_layout_reads_nothing(small_model: WanDiT, recompute: Recompute) -> None:
    small_model.recompute = recompute
    args = arguments(small_model, "cpu")
    small_model(*args)
    with NoReads():
        small_model(*args).sum().backward()


def test_a_new_layout_reads_nothing_either(small_model: WanDiT) -> None:
    # A tensor on the meta device has no data, so any read of one raises, whichever way it is done.
    small_model.to("meta")
    args = arguments(small_model, "meta")
    out = small_model(*args)
    assert out.shape == (LAYOUT.total, small_model.config.token_out)
    out.sum().backward()
    for read in (lambda: out.sum().item(), lambda: out.tolist(), lambda: out.cpu()):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            read()
