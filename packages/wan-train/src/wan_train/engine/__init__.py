"""Starting Megatron's engine in a training process, on CUDA or on a CPU.

``start`` is called once, first, in a training process; never on import. Its effect:

| machine | effect |
|---|---|
| any | Megatron-Bridge is imported without modelopt and its model families |
| without nvidia-resiliency-ext, regex or six | and without the restart within the process and tokenizers |
| without TE, or without CUDA | and without Transformer Engine |
| no CUDA | and Megatron's calls of CUDA and NCCL are redirected to the CPU and gloo |
"""

import contextlib
import dataclasses
import importlib
from typing import TYPE_CHECKING

from wan_model.system.torchrun import local_rank
from wan_train.engine.installed import is_installed, require_installed

if TYPE_CHECKING:  # start() imports it; a command that imports wan_train.engine.installed should not wait for it
    import torch


@dataclasses.dataclass(frozen=True)
class Engine:
    """Device and backend of the process.

    Attributes:
        device: of this process's tensors.
        backend: torch.distributed's backend.
        transformer_engine: whether Transformer Engine can be used.
    """

    device: "torch.device"
    backend: str
    transformer_engine: bool


_started: Engine | None = None


def _take_device() -> None:
    import torch

    if local_rank() >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"this is process {local_rank() + 1} of its machine, which has {count} GPU{'s' * (count > 1)}; start one "
            f"for each: --nproc-per-node {count}"
        )
    torch.cuda.set_device(local_rank())


def start(*, take_device: bool = True) -> Engine:
    """Make Megatron-Bridge's loop importable and runnable in this process; further calls return the same result.

    Args:
        take_device: make this process's CUDA device the current one, which allocates memory on it; not needed for
            reading configurations.

    Raises:
        EngineError: megatron-core or megatron-bridge is not installed, or not in versions that can be used.
    """
    global _started
    if _started is not None:
        return _started
    require_installed()
    import torch

    from wan_train.engine import absent_modules, cpu
    from wan_train.engine.upstream.replace import import_errors_explained

    has_cuda = torch.cuda.is_available()
    has_te = has_cuda and is_installed("transformer_engine")
    if has_cuda and take_device:  # before imports that may look at the current device
        _take_device()
    left_out = [absent_modules.MODELOPT, *absent_modules.unused_and_absent()]
    if not has_te:
        left_out.append(absent_modules.TRANSFORMER_ENGINE)
    with import_errors_explained():
        absent_modules.skip_model_families()
        if has_te:  # before transformers is left out
            importlib.import_module("transformer_engine.pytorch")
        with contextlib.nullcontext() if has_cuda else cpu.compiler_disabled():
            absent_modules.import_bridge_without(left_out)
    if has_cuda:
        device, backend = torch.device("cuda", local_rank()), "nccl"
    else:
        cpu.redirect()
        device, backend = torch.device("cpu"), "gloo"
    from wan_train.engine.upstream.patches import patch_bridge

    patch_bridge(on_cpu=not has_cuda, without_te=not has_te)
    _started = Engine(device, backend, has_te)
    return _started
