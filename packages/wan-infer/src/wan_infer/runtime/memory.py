"""Peak memory of a process."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Peak bytes of tensors on a CUDA device, otherwise of the process in main memory (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
