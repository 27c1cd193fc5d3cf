"""Functions of Megatron-Bridge and Megatron-Core that do nothing here, or that do not work without CUDA.

Import only after Bridge is imported; ``wan_train.engine.start`` calls it.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from wan_train.engine import gloo_groups, torch_adam, write_results
from wan_train.engine.upstream import bucket_padding
from wan_train.engine.upstream.replace import by, changed, drop, find, replace

_BRIDGE = "megatron.bridge.training"
_ON_CPU = "running without CUDA"
_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"


def patch_bridge(*, on_cpu: bool, without_te: bool) -> None:
    """Replace functions that do not work here.

    Args:
        on_cpu: there is no CUDA.
        without_te: Transformer Engine is not installed, so the optimizer is torch's AdamW.

    Raises:
        EngineChangedError: one of them is not there.
    """
    # Compiles a helper for language-model datasets. The wheel has it compiled but without its Makefile, and a failed
    # `make` ends the process.
    drop(f"{_BRIDGE}.initialize:compile_helpers")
    # Prints the memory of a language model of these sizes.
    drop(f"{_BRIDGE}.utils.train_utils:report_theoretical_memory")
    # Compiles fused functions of language models, with tensors of the run's size, which no Wan model calls.
    drop(f"{_BRIDGE}.initialize:_warmup_jit_function")
    # modelopt is not imported (see absent_modules), so there is nothing of it to save or restore.
    for name in ("save_sharded_modelopt_state", "save_modelopt_state", "restore_modelopt_state"):
        drop(f"{_BRIDGE}.checkpointing:{name}")
    drop(f"{_BRIDGE}.train:get_tensor_shapes_adjust_fn_for_distillation")
    _write_with_core()
    bucket_padding.save_without_padding()
    if on_cpu:
        _patch_writer()
        gloo_groups.skip_groups_of_one()
        # There are none, and it would search all objects for them.
        drop(f"{_BRIDGE}.train:_delete_cuda_graphs")
        _fork_a_writer_for_each_save()
    if without_te:
        torch_adam.patch_optimizer()


def _write_with_core() -> None:
    """Only Core's own writer is tested; Core 0.17.0 prefers that of nvidia-resiliency-ext for every save."""
    strategy = "megatron.core.dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.save"
    save = find(strategy)  # in Core 0.16 inherited, from a module that knows no other writer
    if save is not None and "HAVE_NVRX" in save.__globals__:
        save.__globals__["HAVE_NVRX"] = False


def _patch_writer() -> None:
    # Core 0.17 dropped the underscore and added an argument.
    for name in ("get_write_results_queue", "_get_write_results_queue"):
        if find(f"{_WRITER}:{name}") is not None:
            replace(
                f"{_WRITER}:{name}",
                by(lambda *args, **kwargs: write_results.results_of_process()),
                _ON_CPU,
                called_by=(f"{_WRITER}:FileSystemWriterAsync.prepare_write_data",),
            )
            return
    raise changed(f"{_WRITER} has no get_write_results_queue", _ON_CPU)


def _fork_a_writer_for_each_save() -> None:
    """The persistent process that writes checkpoints needs a CUDA device."""
    import megatron.bridge.training.state as state
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    if "initialize_async_checkpoint_worker" not in vars(state.GlobalState):
        raise changed(f"{state.__name__} has no GlobalState.initialize_async_checkpoint_worker", _ON_CPU)

    def initialize(self: Any) -> None:
        checkpoint = self.cfg.checkpoint
        if self._async_calls_queue is None and checkpoint.save is not None and checkpoint.async_save:
            self._async_calls_queue = AsyncCallsQueue(persistent=False)

    state.GlobalState.initialize_async_checkpoint_worker = initialize


class _NoModule:
    """Has no instances."""


class _NoHook:
    def remove(self) -> None:
        """There is none."""


@contextlib.contextmanager
def _no_hooks_on_frozen_parameters() -> Iterator[None]:
    """In this context hooks on gradients are registered for parameters only that have gradients.

    Megatron-FSDP keeps parameters apart that have none, but registers its hooks on all, which torch refuses.
    """
    register = torch.Tensor.register_post_accumulate_grad_hook

    def register_on_trained(self: torch.Tensor, hook: Any) -> Any:
        return register(self, hook) if self.requires_grad else _NoHook()

    torch.Tensor.register_post_accumulate_grad_hook = register_on_trained  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.register_post_accumulate_grad_hook = register  # type: ignore[method-assign]


def _chosen(state_of: Callable[..., dict[str, Any]], saved: Callable[[str], bool]) -> Callable[..., dict[str, Any]]:
    def chosen_state(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: value for key, value in state_of(*args, **kwargs).items() if saved(key)}

    return chosen_state


def _reduce_what_has_gradients() -> None:
    """Where nothing is sharded, Megatron-FSDP asks every group of parameters for its gradients, frozen ones too."""
    import megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer as buffers

    reduce = vars(buffers.ParamAndGradBuffer).get("reduce_scatter_gradients")
    if reduce is None:
        raise changed(f"{buffers.__name__} reduces no gradients", "training adapters with Megatron-FSDP")

    @functools.wraps(reduce)
    def reduce_trained(self: Any, *args: Any, **kwargs: Any) -> Any:
        groups = self.parameter_groups
        self.parameter_groups = [group for group in groups if group.main_grad_buffer is not None]
        try:
            return reduce(self, *args, **kwargs)
        finally:
            self.parameter_groups = groups

    buffers.ParamAndGradBuffer.reduce_scatter_gradients = reduce_trained


def use_fsdp_units(*modules: type, saved: Callable[[str], bool] | None = None) -> None:
    """Make Megatron-FSDP shard these modules one by one; its default unit is Megatron's own ``TransformerLayer``.

    Args:
        modules: the units.
        saved: which tensors of the model are saved, by their keys; None for all.

    Raises:
        EngineChangedError: Megatron-FSDP takes no such modules.
    """
    import megatron.core.distributed.fsdp.mcore_fsdp_adapter as adapter

    # Core 0.16 and 0.17 test every module for being one of Transformer Engine's, which may be absent.
    if not isinstance(getattr(adapter, "TELinear", object), type):
        adapter.TELinear = _NoModule
    # Replaced in the class, because who creates it differs from version to version.
    create = adapter.FullyShardedDataParallel.__init__
    if "fsdp_unit_modules" not in inspect.signature(create).parameters:
        raise changed(f"{adapter.__name__} takes no fsdp_unit_modules", "sharding block by block")

    @functools.wraps(create)
    def create_with_units(self: Any, *args: Any, **kwargs: Any) -> None:
        with _no_hooks_on_frozen_parameters():
            create(self, *args, **{"fsdp_unit_modules": list(modules), **kwargs})
        if saved is not None:
            # Bridge asks the one inside.
            for module in (self, self.module):
                module.state_dict_for_save_checkpoint = _chosen(module.state_dict_for_save_checkpoint, saved)

    adapter.FullyShardedDataParallel.__init__ = create_with_units
    if saved is not None:
        _reduce_what_has_gradients()
