"""Activation recomputation: which activations of a block are saved for its backward pass.

``none`` saves everything. ``block`` saves a block's input and recomputes the block. ``all_but_attention`` also saves
the result of self-attention, which is most of the work for a long video, and recomputes the rest. ``elementwise`` saves
the results of all matrix products and of both attentions, and recomputes norms, rotations, gated additions and the
activation, which take little time and most of the memory; adapters' small products are recomputed too, because each
ends in a second result of the size of the linear's. Random numbers are drawn from seeds (dropout of adapters), so
recomputed values are equal.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recompute = Literal["none", "elementwise", "all_but_attention", "block"]

_in_self_attention = contextvars.ContextVar("in_self_attention", default=False)
_saves_products = contextvars.ContextVar("saves_products", default=False)
_in_adapter = contextvars.ContextVar("in_adapter", default=False)
_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
_MATRIX_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default}


def check_recompute(mode: str) -> None:
    """Check the name of a mode.

    Raises:
        ValueError: it is unknown; the message lists the known modes.
    """
    if mode not in get_args(Recompute):
        raise ValueError(f"recompute is {mode!r}; expected one of {', '.join(get_args(Recompute))}")


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar[bool]) -> Iterator[None]:
    token = variable.set(True)
    try:
        yield
    finally:
        variable.reset(token)


def self_attention_region() -> contextlib.AbstractContextManager[None]:
    """Mark attention calls whose results ``all_but_attention`` saves."""
    return _set(_in_self_attention)


def adapter_region() -> contextlib.AbstractContextManager[None]:
    """Mark the products of an adapter, which no mode saves."""
    return _set(_in_adapter)


def products_are_saved() -> bool:
    """Whether the result of a matrix product is saved for the backward pass, so that it may not be overwritten."""
    return _saves_products.get()


def _marked(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: object) -> Tensor:
        with _set(_saves_products):
            return function(*args)

    return call


def _attends(operator: Any) -> bool:
    # The variable-length kernel is an operator of its own, which older versions of torch do not have.
    return operator in _ATTENTION or "varlen_attn" in operator.name()


def _self_attention_is_saved(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = _attends(operator) and _in_self_attention.get()
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _products_are_saved(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = (operator in _MATRIX_PRODUCTS and not _in_adapter.get()) or _attends(operator)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


_POLICIES: dict[Recompute, Callable[..., CheckpointPolicy]] = {
    "all_but_attention": _self_attention_is_saved,
    "elementwise": _products_are_saved,
}


def recomputed(function: Callable[..., Tensor], *args: object, mode: Recompute) -> Tensor:
    """Call a function with activation checkpointing (torch's, non-reentrant).

    Args:
        function: a function of tensors and constants.
        args: its arguments.
        mode: any but ``none``.
    """
    options: dict[str, Any] = {}
    if mode in _POLICIES:
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _POLICIES[mode])
    if mode == "elementwise":
        function = _marked(function)
    result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **options)
    return result
