"""Where each part of the sampler lives, and where it works."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Placement:
    """Devices and precision.

    Attributes:
        device: where the work is done.
        dtype: of the transformer's and the text encoder's weights; the autoencoder is fp32, as in the official code.
        text_device: where prompts are embedded.
        offload: keep every part in main memory and have it on the device only while it works.
    """

    device: torch.device
    dtype: torch.dtype
    text_device: torch.device
    offload: bool = False

    @classmethod
    def choose(
        cls, device: str = "auto", dtype: str = "auto", *, t5_cpu: bool = False, offload: bool = False
    ) -> "Placement":
        """From the command line's words: ``auto`` is CUDA with bfloat16 where there is one, else the CPU with float32.

        Raises:
            ValueError: a device that is not here, or an unknown precision.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and (own := os.environ.get("LOCAL_RANK")):
            device = f"cuda:{own}"  # each process of a machine has a device of its own
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
        return cls(chosen, DTYPES[dtype], torch.device("cpu") if t5_cpu else chosen, offload)

    @property
    def home(self) -> torch.device:
        """Where the parts wait."""
        return torch.device("cpu") if self.offload else self.device

    @property
    def text_home(self) -> torch.device:
        """Where the text encoder waits."""
        return torch.device("cpu") if self.offload else self.text_device


@contextlib.contextmanager
def at_work(module: nn.Module, device: torch.device, home: torch.device) -> Iterator[None]:
    """Have a module on ``device`` inside the block, and back home behind it."""
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
        if device.type == "cuda" and home != device:
            torch.cuda.empty_cache()
