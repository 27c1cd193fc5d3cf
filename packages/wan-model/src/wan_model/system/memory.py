"""Peak memory of this process."""

import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Peak bytes of tensors on a CUDA device, otherwise of the process in main memory (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()


def peak_resident() -> int:
    """The most bytes of main memory that this process had (resident set)."""
    # Linux lets ``ru_maxrss`` begin with what the process had that started this one, however large that was.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
