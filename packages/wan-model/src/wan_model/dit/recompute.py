"""Activation recomputation: which activations of a block are kept for its backward pass.

``none`` keeps everything. ``block`` keeps a block's input and computes the block again. ``all_but_attention`` keeps
the result of self-attention as well, which is most of the work of a long video, and computes the rest again. The model
draws no random numbers, so what is computed again is the same.
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
    """Refuse a mode that does not exist.

    Raises:
        ValueError: naming those that do.
    """
    if mode not in get_args(Recompute):
        raise ValueError(f"recompute is {mode!r}; expected one of {', '.join(get_args(Recompute))}")


@contextlib.contextmanager
def self_attention_region() -> Iterator[None]:
    """Mark attention calls whose results ``all_but_attention`` keeps."""
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
        function: of tensors and constants.
        args: its arguments.
        keep_attention: keep what was computed in a ``self_attention_region``.
    """
    options: dict[str, Any] = {}
    if keep_attention:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)
    return result
