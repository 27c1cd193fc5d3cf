"""The most memory that a process has held so far."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a CUDA device, else of the whole process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
