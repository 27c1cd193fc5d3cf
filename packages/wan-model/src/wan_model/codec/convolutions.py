"""How the autoencoder's convolutions run on a GPU: TF32 or not, and the memory format of their weights.

On Ampere and later torch rounds the inputs of cuDNN's fp32 convolutions to TF32, with 10 bits of mantissa, unless told
otherwise; matrix products are not rounded. Here it is a choice, so that ``float32`` means the same on every device.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn

from wan_model.precision import VAE_PRECISIONS

# The same with torch's types.
PRECISIONS: dict[str, tuple[torch.dtype, bool]] = {
    name: (getattr(torch, dtype), tf32) for name, (dtype, tf32) in VAE_PRECISIONS.items()
}
_Item = TypeVar("_Item")


@contextlib.contextmanager
def tf32_convolutions(allowed: bool) -> Iterator[None]:
    """Whether cuDNN may round the inputs of fp32 convolutions to TF32, within this context; without effect on a CPU."""
    precision = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = precision.fp32_precision
    precision.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        precision.fp32_precision = before


def computed_with_tf32(items: Iterable[_Item], allowed: bool) -> Iterator[_Item]:
    """The items of an iterator that computes them; the setting holds only while it computes one."""
    iterator = iter(items)
    while True:
        with tf32_convolutions(allowed):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def prepare_for(device: torch.device | str, autoencoder: nn.Module) -> None:
    """Choose the memory format that is fast on a device.

    On an H200 with TF32, 81 frames of 480 x 832 took 3.6 s with the channels last and 2.7 s with the channels first.
    """
    if torch.device(device).type == "cuda" and next(autoencoder.parameters()).element_size() == 2:
        to_channels_last(autoencoder)


def to_channels_last(module: nn.Module) -> None:
    """Store the weights of all convolutions with the channels last, in place.

    The outputs then have that format too where cuDNN computes them. Results differ by rounding.
    """
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for part in module.modules():
        for kind, memory_format in formats.items():
            if isinstance(part, kind):
                part.weight.data = part.weight.data.contiguous(memory_format=memory_format)
