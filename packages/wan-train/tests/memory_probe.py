"""Count bytes in a rank: what the first pack's forward pass leaves, the most until the gradients are there, what
weights, gradients and the optimizer hold between steps, and what each further step leaves behind.

Called in a rank before it trains (``warm_ranks.Call``); each rank writes RESULTS/RANK.json.
"""

import functools
import gc
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each once; of a tensor that is split over ranks, of this rank's part."""
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def shards_of(part: Any) -> list[Any]:
    """With FSDP, the groups of parameters of a part of the model; else none."""
    sharded = getattr(part, "module", None)
    buffer = getattr(sharded, "param_and_grad_buffer", None)
    return [] if buffer is None else list(buffer.parameter_groups)


def gradients_of(part: Any) -> Iterable[Tensor]:
    """The memory that a part of the model has for gradients, of whatever parameters."""
    if shards := shards_of(part):
        return [shard.main_grad_buffer.data for shard in shards if shard.main_grad_buffer is not None]
    return [buffer.grad_data for buffer in part.buffers]


def state_of(context: Any) -> dict[str, int]:
    """What is held between steps."""
    from megatron.core.utils import unwrap_model

    parameters = [parameter for part in context.model for parameter in part.parameters()]
    shards = [shard for part in context.model for shard in shards_of(part)]
    masters = [shard.main_weight_buffer.data for shard in shards if shard.main_weight_buffer is not None]
    weights = [shard.model_weight_buffer.data for shard in shards] or parameters
    optimizers = getattr(context.optimizer, "chained_optimizers", [context.optimizer])
    states = [state for one in optimizers for state in one.optimizer.state.values()]
    averages = [part.ema.tensors for part in unwrap_model(context.model) if getattr(part, "ema", None)]
    moments = [value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim()]
    return {
        "weights": bytes_of(weights),
        "gradients": bytes_of(gradients for part in context.model for gradients in gradients_of(part)),
        "optimizer": bytes_of([*moments, *masters]),
        "average": bytes_of(tensor for average in averages for tensor in average.values()),
    }


def install_state(results: str) -> None:
    """Only what is held between steps."""
    from wan_train.loop.callback import WanCallback

    end = WanCallback.on_train_step_end

    def counted_end(self: Any, context: Any) -> None:
        end(self, context)
        Path(results, f"{os.environ['RANK']}.json").write_text(json.dumps(state_of(context)))

    changed: Any = WanCallback
    changed.on_train_step_end = counted_end


def install(results: str) -> None:
    from live_memory import LiveMemory

    from wan_train.loop.callback import WanCallback
    from wan_train.loop.step import WanForwardStep

    memory = LiveMemory()
    found: dict[str, Any] = {}
    call, begin, end = WanForwardStep.__call__, WanCallback.on_train_step_start, WanCallback.on_train_step_end

    @functools.wraps(call)
    def counted_call(self: Any, state: Any, data_iterator: Any, model: Any) -> Any:
        result = call(self, state, data_iterator, model)
        gc.collect()
        found.setdefault("kept", memory.total)
        return result

    def counted_begin(self: Any, context: Any) -> None:
        begin(self, context)
        if "peak" in found:
            memory.__enter__()
            return
        step = context.optimizer.step

        def counted_step(*args: Any, **kwargs: Any) -> Any:
            if "peak" not in found:
                found["peak"] = memory.peak
                memory.__exit__(None, None, None)
            return step(*args, **kwargs)

        context.optimizer.step = counted_step
        memory.__enter__()

    def counted_end(self: Any, context: Any) -> None:
        end(self, context)
        if "weights" in found:
            memory.__exit__(None, None, None)
            gc.collect()
            found.setdefault("after_steps", []).append(memory.total)
        found.update(state_of(context))
        Path(results, f"{os.environ['RANK']}.json").write_text(json.dumps(found))

    patched: list[tuple[type, str, Callable[..., Any]]] = [
        (WanForwardStep, "__call__", counted_call),
        (WanCallback, "on_train_step_start", counted_begin),
        (WanCallback, "on_train_step_end", counted_end),
    ]
    for owner, name, function in patched:
        setattr(owner, name, function)
