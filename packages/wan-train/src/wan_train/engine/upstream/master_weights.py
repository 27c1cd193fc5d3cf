"""Whether the optimizer's fp32 weights, as they were loaded, are those of the model.

In 16-bit training the distributed optimizer updates weights in fp32 and the model has them rounded. A checkpoint has
both; ``bucket_padding`` tells of checkpoints in which they do not agree.
"""

from typing import Any

import torch

from wan_train.engine.upstream.replace import changed

_FP32, _ROUNDED = "shard_fp32_from_float16_groups", "shard_float16_groups"


def differing_weights(optimizer: Any) -> int:
    """The number of parameters of this rank whose fp32 weights do not round to the model's.

    An optimizer that keeps its fp32 weights elsewhere, in fused kernels or in main memory, has none.

    Raises:
        EngineChangedError: Megatron's optimizer does not keep both as it did.
    """
    differing = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not hasattr(part, _FP32) or part.config.optimizer_cpu_offload:
            continue
        fp32, rounded = (_of_groups(part, name) for name in (_FP32, _ROUNDED))
        if len(fp32) != len(rounded):
            raise changed(f"{type(part).__name__} has not both {_FP32} and {_ROUNDED}", "an exact resume")
        pairs = zip(fp32, rounded, strict=True)
        differing += sum(weight is not None and not torch.equal(weight.to(model), model) for weight, model in pairs)
    return differing


def _of_groups(part: Any, name: str) -> list[Any]:
    return [tensor for group in getattr(part, name, []) for tensor in group]
