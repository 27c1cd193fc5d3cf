"""Forward and backward read nothing back from the device, and copy to it from pinned memory alone.

On an accelerator each such read, and each copy from pageable memory, waits for all work that is queued.
"""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_model import LatentPack, PackLayout, WanDiT
from wan_model.dit import rope
from wan_model.dit.attention import offsets_on_device
from wan_model.dit.recompute import Recompute
from wan_model.kernels import row_chunks
from wan_model.pack import PackedText, sample_index

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


@pytest.mark.parametrize(
    "make",
    [
        lambda device: sample_index.__wrapped__(LAYOUT, device),
        lambda device: rope._axis_rotations.__wrapped__(4, 8, device),
        lambda device: offsets_on_device.__wrapped__((0, 3, 5), device),
        lambda device: row_chunks._of_segments.__wrapped__(((0, 0, 5),), 1, device),
        lambda device: LatentPack(
            torch.ones(LAYOUT.total, 4), PackedText.of([torch.ones(2, 3)] * 2, 4), LAYOUT, ("a", "b")
        ).to(device, torch.bfloat16),
    ],
    ids=["sample index", "rotations", "offsets", "chunks", "pack"],
)
def test_what_comes_from_the_host_comes_from_pinned_memory(
    make: Callable[[torch.device], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU: every tensor that is copied to one has been pinned, and is copied without waiting."""
    pinned: list[Tensor] = []
    copied: list[bool] = []
    to = Tensor.to

    def pin(self: Tensor) -> Tensor:
        pinned.append(self.clone())
        return pinned[-1]

    def copy(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(args[0], torch.device):
            return to(self, *args, **kwargs)
        assert kwargs == {"non_blocking": True}
        copied.append(any(self is one for one in pinned))
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", copy)
    make(torch.device("cuda"))
    assert copied
    assert all(copied)
