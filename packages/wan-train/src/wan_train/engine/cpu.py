"""Redirects Megatron's calls of CUDA to the CPU and gloo.

Megatron-Core and Megatron-Bridge name "cuda" in some five hundred places. Nearly all of them are handled by a
``TorchFunctionMode`` that rewrites the device of tensor calls, and by replacements of ``torch.cuda``'s functions. The
rest is patched one by one in ``upstream.patches``. All of this is process-wide: ``wan_train.engine.start`` installs it
in a process that only trains, without CUDA.
"""

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from wan_model.system.torchrun import processors
from wan_train.engine import gloo_groups
from wan_train.engine.upstream.replace import by, replace

_CPU = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, int):  # an integer is a CUDA device everywhere in Megatron
        return True
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CudaToCpu(TorchFunctionMode):
    """Tensor calls for a CUDA device use the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Rewrite the device of one call."""
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
            kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer compares this name with 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream whose work is always complete."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: object = None) -> "_Event":
        return _Event()


class _Event:
    """A CUDA event that has completed."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def _nothing(*args: object, **kwargs: object) -> None: ...


@contextlib.contextmanager
def _no_stream(stream: object) -> Iterator[None]:
    yield


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect", "set_stream"):
        setattr(cuda, name, _nothing)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.memory_stats = lambda *args, **kwargs: {}
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0  # an int: Megatron-FSDP formats it into "cuda:{}"
    cuda.get_device_capability = lambda *args, **kwargs: (0, 0)
    cuda.get_device_properties = lambda *args, **kwargs: types.SimpleNamespace(
        name="cpu", major=0, minor=0, multi_processor_count=processors(), total_memory=1 << 34
    )
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = _no_stream
    # The optimizers of torch 2.11 ask this in each step; without a driver it raises an error in every build of torch.
    cuda.is_current_stream_capturing = cuda.graphs.is_current_stream_capturing = lambda: False
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _hide_accelerator() -> None:
    """Let ``torch.accelerator`` answer as in a CPU build of torch.

    In a CUDA build it is CUDA, and available because ``torch.cuda.is_available`` says so here: the optimizers of torch
    2.13 would ask the driver for a stream, and data loaders for pinned memory.
    """
    # `is_available` and `device_count` ask it too.
    torch.accelerator.current_accelerator = lambda check_available=False: None


def _keep_mode_in_backward() -> None:
    # A TorchFunctionMode is disabled inside its own handler, and `backward` is called through it: without this, hooks
    # and custom backward functions (sequence parallelism, FSDP) would call CUDA.
    engine: Any = torch.autograd
    run = engine._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        with CudaToCpu():
            return run(*args, **kwargs)

    engine._engine_run_backward = run_in_mode


def _keep_rng_tracker_on_cpu() -> None:
    random = "megatron.core.tensor_parallel.random"
    replacements: dict[str, Callable[..., Any]] = {
        "_get_cuda_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "_set_cuda_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, function in replacements.items():
        replace(f"{random}:{name}", by(function), "running without CUDA")


@contextlib.contextmanager
def compiler_disabled() -> Iterator[None]:
    """In this context ``torch.compile`` returns functions unchanged.

    Megatron's ``jit_fuser`` would compile for CUDA, and setting that up takes seconds per import.
    """
    compile_function = torch.compile

    def unchanged(model: Any = None, **options: Any) -> Any:
        return model if model is not None else (lambda function: function)

    torch.compile = unchanged
    try:
        yield
    finally:
        torch.compile = compile_function


def redirect() -> None:
    """Redirect this process's calls of CUDA to the CPU, permanently."""
    # torch's optimizers import the compiler when first constructed; it must see torch.cuda's original functions.
    importlib.import_module("torch._dynamo")

    _replace_cuda_functions()
    _hide_accelerator()
    _keep_rng_tracker_on_cpu()
    _keep_mode_in_backward()
    gloo_groups.share_device()
    CudaToCpu().__enter__()
