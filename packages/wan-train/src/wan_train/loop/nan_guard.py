"""Stopping every rank together, before the weights change, where a loss or a gradient is not finite.

Import only after ``wan_train.engine.start``.

The gradient's norm is the same number on every rank (it is reduced over all of them), and a loss that is not finite
makes a gradient that is not: so the norm, which the optimizer computes anyway, is what is looked at, and no rank can
miss what another one saw. Only then are the samples' own losses read and gathered, to name who did it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from wan_train.loop.step import WanForwardStep

_NAMED = 8


class NotFiniteError(ValueError):
    """A step whose gradient is not finite; the weights are those before it."""


def watch_gradient(optimizer: Any, step: WanForwardStep, steps_done: Callable[[], int]) -> None:
    """Have the optimizer raise ``NotFiniteError`` instead of stepping with a gradient that is not finite.

    Args:
        optimizer: Megatron's, of one part or of several.
        step: the forward step, which knows what the step's samples lost.
        steps_done: before the one that is under way.
    """
    # Several parts get their norm together; one alone computes it where it clips.
    name = "get_grad_norm" if hasattr(optimizer, "chained_optimizers") else "clip_grad_norm"
    norm_of = getattr(optimizer, name)

    @functools.wraps(norm_of)
    def finite_norm(*args: Any, **kwargs: Any) -> Any:
        norm = norm_of(*args, **kwargs)
        if norm is not None and not math.isfinite(norm):
            raise NotFiniteError(_explain(step, steps_done() + 1, float(norm)))
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
        f"the gradient's norm is {norm} at step {number}: {what}; training stops before the weights change, and what "
        "was saved is untouched"
    )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return f"{'sample' if len(keys) == 1 else 'samples'} {', '.join(keys[:_NAMED])}{more}"
