"""Whether an optimizer's own weights, as a checkpoint had them, are those of the model.

The distributed optimizer saves the weights that it updates beside the model's. In 16-bit training they are fp32 copies,
of which the model has the roundings; weights that the model has in fp32 too, adapters among them, are the model's own
memory, and loading the optimizer overwrites them. ``bucket_padding`` tells of checkpoints in which they do not agree.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from wan_train.engine.upstream.replace import changed

_FP32_COPIES, _ROUNDED, _FP32 = "shard_fp32_from_float16_groups", "shard_float16_groups", "shard_fp32_groups"


@contextlib.contextmanager
def noting_weights(optimizer: Any) -> Iterator[Callable[[], int]]:
    """In this context a checkpoint is loaded, the model's weights before the optimizer.

    Yields:
        A function for after the load, which returns the number of parameters, of those that this rank updates, of
        which the optimizer has other weights than the model. An optimizer that keeps them elsewhere has none.

    Raises:
        EngineChangedError: of the function: Megatron's optimizer does not keep both as it did.
    """
    if optimizer is None:
        yield lambda: 0
        return
    load, loaded = optimizer.load_state_dict, list[Tensor]()

    def load_and_note(state: Any) -> None:
        loaded.extend(weight.detach().clone() for part in _parts(optimizer) for weight in _of_groups(part, _FP32))
        load(state)

    def differing() -> int:
        # Nothing was noted if the optimizer was not loaded, as in a new run from a checkpoint's weights.
        now = [weight for part in _parts(optimizer) for weight in _of_groups(part, _FP32)]
        overwritten = sum(not torch.equal(one, other) for one, other in zip(loaded, now, strict=False))
        return overwritten + sum(_differing_copies(part) for part in _parts(optimizer))

    optimizer.load_state_dict = load_and_note
    try:
        yield differing
    finally:
        optimizer.load_state_dict = load


def _differing_copies(part: Any) -> int:
    copies, rounded = _of_groups(part, _FP32_COPIES), _of_groups(part, _ROUNDED)
    if len(copies) != len(rounded):
        raise changed(f"{type(part).__name__} has not both {_FP32_COPIES} and {_ROUNDED}", "an exact resume")
    pairs = zip(copies, rounded, strict=True)
    # The precision-aware optimizer has no copies.
    return sum(copy is not None and not torch.equal(copy.to(model), model) for copy, model in pairs)


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that this one consists of and that keep their weights on the device."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.config.optimizer_cpu_offload]


def _of_groups(part: Any, name: str) -> list[Any]:
    return [tensor for group in getattr(part, name, []) for tensor in group]
