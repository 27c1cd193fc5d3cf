"""Activation recomputation: which activations of a block are saved for its backward pass.

``none`` saves everything. ``block`` saves a block's input and recomputes the block. ``all_but_attention`` also saves
the result of self-attention, which is most of the work for a long video, and recomputes the rest. The model draws no
random numbers, so recomputed values are equal.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "block", "all_but_attention"]

_in_self_attention = contextvars.ContextVar("in_self_attention", default=False)
_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def check_recompute(mode: str) -> None:
    """Check the name of a mode.

    Raises:
        ValueError: it is unknown; the message lists the known modes.
    """
    if mode not in get_args(Recompute):
        raise ValueError(f"recompute is {mode!r}; expected one of {', '.join(get_args(Recompute))}")


@contextlib.contextmanager
def self_attention_region() -> Iterator[None]:
    """Mark attention calls whose results ``all_but_attention`` saves."""
    token = _in_self_attention.set(True)
    try:
        yield
    finally:
        _in_self_attention.reset(token)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # The variable-length kernel is an operator of its own, which older versions of torch do not have.
    attends = operator in _ATTENTION or "varlen_attn" in operator.name()
    keep = attends and _in_self_attention.get()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(function: Callable[..., Tensor], *args: object, keep_attention: bool) -> Tensor:
    """Call a function with activation checkpointing (torch's, non-reentrant).

    Args:
        function: a function of tensors and constants.
        args: its arguments.
        keep_attention: save the results of a ``self_attention_region``.
    """
    options: dict[str, Any] = {}
    if keep_attention:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)
    return result
