"""NaN guard: a non-finite loss or gradient stops all ranks before the weights are updated.

Import only after ``wan_train.engine.start``.

The gradient norm is reduced over all ranks, so it is equal on all of them, and a non-finite loss makes it non-finite.
The optimizer computes it anyway. Only if it is non-finite are the losses of the samples gathered, to name the samples.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from wan_train.loop.step import WanForwardStep

_MAX_LISTED = 8


class NonFiniteGradientError(ValueError):
    """The gradient of a step is not finite; the weights are those before the step."""


def guard_gradient(optimizer: Any, step: WanForwardStep, steps_done: Callable[[], int]) -> None:
    """Have the optimizer raise ``NonFiniteGradientError`` instead of stepping with a gradient that is not finite.

    Args:
        optimizer: Megatron's optimizer, plain or chained.
        step: the forward step, which has the losses of the samples.
        steps_done: returns the number of completed steps.
    """
    # A chained optimizer computes the norm of all its parts; a plain one computes it when clipping.
    name = "get_grad_norm" if hasattr(optimizer, "chained_optimizers") else "clip_grad_norm"
    norm_of = getattr(optimizer, name)

    @functools.wraps(norm_of)
    def finite_norm(*args: Any, **kwargs: Any) -> Any:
        norm = norm_of(*args, **kwargs)
        if norm is not None and not math.isfinite(norm):
            raise NonFiniteGradientError(_explain(step, steps_done() + 1, float(norm)))
        return norm

    setattr(optimizer, name, finite_norm)


def _explain(step: WanForwardStep, number: int, norm: float) -> str:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, step.losses_of_samples())
    losses = {key: loss for part in gathered for key, loss in part}
    bad = sorted(key for key, loss in losses.items() if not math.isfinite(loss))
    if bad:
        what = f"the loss is not finite for {_listed(bad)}"
    else:
        what = f"every sample's own loss is finite; the step saw {_listed(sorted(losses))}"
    return (
        f"the gradient's norm is {norm} at step {number}: {what}; training stops before the weights change, and "
        "saved checkpoints are unchanged"
    )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return f"{'sample' if len(keys) == 1 else 'samples'} {', '.join(keys[:_MAX_LISTED])}{more}"
