"""What Megatron asks of CUDA, answered by the CPU and gloo.

Megatron-Core 0.16 and Megatron-Bridge 0.3 name "cuda" in some five hundred places. Two devices serve nearly all of
them: a ``TorchFunctionMode`` that rewrites the device of tensor calls, and plain replacements for ``torch.cuda``'s
functions. The rest is listed one by one in ``mend_bridge``. Everything here is process-wide and meant to be: it is
installed by ``wan_train.engine.start`` in a process whose only purpose is to train where there is no CUDA.
"""

import contextlib
import importlib
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from wan_train.engine import gloo_groups, torch_adam, write_results

_CPU = torch.device("cpu")


def local_rank() -> int:
    """This process's number on its machine, as torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _means_cuda(device: object) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, int):  # a bare number is a CUDA device everywhere in Megatron
        return True
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class CudaMeansCpu(TorchFunctionMode):
    """Tensor calls that ask for a CUDA device get the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Rewrite one call."""
        kwargs = kwargs or {}
        if "device" in kwargs and _means_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
            kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _means_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer sorts parameters by comparing this name with 'torch.cuda.FloatTensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Stream:
    """A CUDA stream where everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: object = None) -> "_Event":
        return _Event()


class _Event:
    """A CUDA event that has happened."""

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
        name="cpu", major=0, minor=0, multi_processor_count=os.cpu_count(), total_memory=1 << 34
    )
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = _no_stream
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _keep_mode_in_backward() -> None:
    # A TorchFunctionMode is off inside its own handler, and `backward` is called through it: hooks and custom backwards
    # (sequence parallelism, FSDP) would meet CUDA again.
    engine: Any = torch.autograd
    run = engine._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        with CudaMeansCpu():
            return run(*args, **kwargs)

    engine._engine_run_backward = run_in_mode


def _keep_rng_tracker_on_cpu() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Leave functions as they are that are decorated with ``torch.compile`` in here.

    Megatron's ``jit_fuser`` would compile for a device that is not there, and setting that up takes seconds an import.
    """
    compile_function = torch.compile

    def leave(model: Any = None, **options: Any) -> Any:
        return model if model is not None else (lambda function: function)

    torch.compile = leave
    try:
        yield
    finally:
        torch.compile = compile_function


def redirect() -> None:
    """Send what this process asks of CUDA to the CPU, for the rest of its life."""
    # torch's optimizers import the compiler when they are first built; it must see torch.cuda's own functions then.
    importlib.import_module("torch._dynamo")

    _replace_cuda_functions()
    _keep_rng_tracker_on_cpu()
    _keep_mode_in_backward()
    gloo_groups.share_device()
    CudaMeansCpu().__enter__()


def mend_bridge(*, on_cpu: bool, without_te: bool) -> None:
    """Replace the few functions of Bridge that cannot work here.

    Args:
        on_cpu: there is no CUDA.
        without_te: Transformer Engine is not installed, so the optimizer is torch's AdamW.
    """
    import megatron.bridge.training.initialize as initialize
    import megatron.bridge.training.train as train
    import megatron.bridge.training.utils.train_utils as train_utils

    # Builds an index for language-model corpora. The wheel on PyPI ships it compiled but without its Makefile, and a
    # failed `make` ends the process.
    initialize.compile_helpers = _nothing
    # Prints the memory that a language model of these sizes would take.
    train_utils.report_theoretical_memory = _nothing
    if on_cpu:
        import megatron.bridge.training.state as state
        import megatron.core.dist_checkpointing.strategies.filesystem_async as writer

        writer._get_write_results_queue = write_results.results_of_process
        gloo_groups.leave_alone_groups_of_one()

        initialize._warmup_jit_function = _nothing
        train._delete_cuda_graphs = _nothing  # there are none, and it looks at every object for them
        # The process that writes checkpoints for a whole run looks for a CUDA device; one is forked for each instead.
        calls = state.AsyncCallsQueue
        state.AsyncCallsQueue = lambda persistent: calls(persistent=False)
    if without_te:
        torch_adam.mend()
        # modelopt is left out (see absent_modules): a model that it has not changed has nothing to save or restore.
        import megatron.bridge.training.checkpointing as checkpointing

        checkpointing.save_sharded_modelopt_state = _nothing
        checkpointing.save_modelopt_state = _nothing
        checkpointing.restore_modelopt_state = _nothing
        train.get_tensor_shapes_adjust_fn_for_distillation = _nothing
