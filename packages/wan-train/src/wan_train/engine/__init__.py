"""Starting Megatron's engine in a training process, on CUDA or on a CPU.

``start`` is called once, first thing, in a process that trains; it is never called on import. What it does:

====================  ==========================================================================================
machine               effect
====================  ==========================================================================================
CUDA, with TE         nothing but the imports
CUDA, without TE      Megatron-Bridge is imported without Transformer Engine, modelopt and its model families
no CUDA               the same, and what Megatron asks of CUDA and NCCL is answered by the CPU and gloo
====================  ==========================================================================================
"""

import contextlib
import dataclasses

import torch

from wan_train.engine.installed import is_installed, require_installed


@dataclasses.dataclass(frozen=True)
class Engine:
    """What the process runs on.

    Attributes:
        device: where tensors of this process live.
        backend: torch.distributed's backend.
        transformer_engine: whether Transformer Engine's modules are there to be used.
    """

    device: torch.device
    backend: str
    transformer_engine: bool


_started: Engine | None = None


def start(*, take_device: bool = True) -> Engine:
    """Make Megatron-Bridge's loop importable and runnable here; calling it again returns the same.

    Args:
        take_device: make this process's CUDA device the current one, which takes memory of it; a process that only
            looks at configurations leaves it alone.

    Raises:
        EngineMissingError: megatron-core or megatron-bridge is not there.
    """
    global _started
    if _started is not None:
        return _started
    require_installed()
    from wan_train.engine import absent_modules, cpu

    has_cuda = torch.cuda.is_available()
    has_te = has_cuda and is_installed("transformer_engine")
    if not has_te:
        absent_modules.leave_out_model_families()
        with contextlib.nullcontext() if has_cuda else cpu.without_compiler():
            absent_modules.import_bridge_without((absent_modules.TRANSFORMER_ENGINE, absent_modules.MODELOPT))
    if has_cuda:
        local_rank = cpu.local_rank()
        if take_device:
            torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "nccl"
    else:
        cpu.redirect()
        device, backend = torch.device("cpu"), "gloo"
    cpu.mend_bridge(on_cpu=not has_cuda, without_te=not has_te)
    _started = Engine(device, backend, has_te)
    return _started
