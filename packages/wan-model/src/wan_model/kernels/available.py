"""Whether Triton's kernels can be used on a device. Imports no Triton by itself."""

import functools
import warnings

import torch
from torch import Tensor

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def for_tensor(x: Tensor) -> bool:
    """Whether kernels compute this tensor: on CUDA, in a precision of theirs, and where they can be compiled."""
    return x.is_cuda and x.dtype in _TYPES and usable(x.device)


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run; if not, one warning says why."""
    try:
        from wan_model.kernels.launch import try_out

        try_out(device)
    except Exception as error:
        last = (str(error).strip().splitlines() or [""])[-1].strip()
        warnings.warn(
            f"Triton kernels cannot be used on {device} ({type(error).__name__}: {last}); the operations between "
            "matrix products run one by one, which is slower. They need the package triton and a C compiler on the "
            "PATH, for example gcc",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
