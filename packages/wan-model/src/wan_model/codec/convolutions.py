"""Whether cuDNN may round the inputs of the autoencoder's fp32 convolutions to TF32.

On Ampere and later torch rounds the inputs of cuDNN's fp32 convolutions to TF32, with 10 bits of mantissa, unless told
otherwise; matrix products are not rounded. Here it is a choice, so that ``float32`` means the same on every device.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

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
