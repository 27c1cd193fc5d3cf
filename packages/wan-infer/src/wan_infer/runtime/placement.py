"""Devices and precision of the sampler's parts, and offloading."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wan_infer.request.options import ComputeOptions
from wan_model.codec.convolutions import PRECISIONS
from wan_model.precision import DTYPES
from wan_model.system import torchrun


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices and precision.

    Attributes:
        device: the execution device of transformer and autoencoder.
        dtype: of the transformer's and the text encoder's weights.
        text_device: the execution device of the text encoder.
        offload: keep every part in main memory, and on its execution device only while it computes.
        vae_dtype: of the autoencoder's weights; fp32 in the official code.
        vae_tf32: whether a GPU may round the autoencoder's fp32 convolutions to TF32.
    """

    device: torch.device
    dtype: torch.dtype
    text_device: torch.device
    offload: bool = False
    vae_dtype: torch.dtype = torch.float32
    vae_tf32: bool = False

    @classmethod
    def choose(cls, options: ComputeOptions) -> "Placement":
        """Resolve ``auto``, and check that the device exists.

        Raises:
            ValueError: a device that this machine does not have, or an unknown precision.
        """
        device, dtype = options.device, options.dtype
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and torchrun.world_size() > 1:
            device = f"cuda:{torchrun.local_rank()}"  # each process of a machine has its own device
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise ValueError(f"there is no device {device!r}; expected auto, cpu, cuda or cuda:N") from None
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"the device {device} was asked for and this machine has {torch.cuda.device_count()} CUDA devices; "
                "use --device auto or cpu"
            )
        if chosen.type not in ("cpu", "cuda"):
            raise ValueError(f"the device {device} is not supported; expected auto, cpu, cuda or cuda:N")
        if dtype == "auto":
            dtype = "bfloat16" if chosen.type == "cuda" else "float32"
        if dtype not in DTYPES:
            raise ValueError(f"there is no precision {dtype!r}; expected auto, {' or '.join(DTYPES)}")
        text_device = torch.device("cpu") if options.t5_cpu else chosen
        return cls(chosen, getattr(torch, dtype), text_device, options.offload, *PRECISIONS[options.vae_dtype])

    @property
    def offload_device(self) -> torch.device:
        """The device of transformer and autoencoder while they do not compute."""
        return torch.device("cpu") if self.offload else self.device

    @property
    def text_offload_device(self) -> torch.device:
        """The device of the text encoder while it does not compute."""
        return torch.device("cpu") if self.offload else self.text_device


@contextlib.contextmanager
def onload(module: nn.Module, device: torch.device, offload_device: torch.device) -> Iterator[None]:
    """Copy a module to its execution device for the block; after it, it has the tensors of the offload device again.

    The weights do not change meanwhile, so the copy is dropped and not copied back.
    """
    if offload_device == device:
        module.to(device)
        yield
        return
    module.to(offload_device)
    # Moving a module replaces the data of a parameter, or the parameter.
    kept: list[tuple[dict[str, Any], str, Tensor, Tensor]] = [
        (table, name, tensor, tensor.data)
        for owner in module.modules()
        for table in (owner._parameters, owner._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    module.to(device)
    try:
        yield
    finally:
        for table, name, tensor, data in kept:
            table[name] = tensor
            tensor.data = data
        if device.type == "cuda":
            torch.cuda.empty_cache()
