"""Attention over packed sequences: every sample attends only to itself (or to its own text).

Shapes: S queries, K keys, H heads, E head width. Offsets are host integers, so nothing is read back from the device,
and no mask of tokens x tokens is built: memory is linear in the number of tokens.

``sdpa`` calls torch's attention once for each run of consecutive segments of equal lengths, as a batch, with the kernel
that torch selects; ``cudnn`` and ``flash`` do the same with only that kernel. ``varlen`` is torch's variable-length
flash attention, one launch for all segments. The last three need CUDA and 16-bit tensors. At the few lengths at which
cuDNN's backward pass can return NaN, ``sdpa`` and ``cudnn`` take flash attention instead.
"""

import contextlib
import functools
import itertools
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan_model.pack import to_device

AttentionKind = Literal["auto", "sdpa", "cudnn", "flash", "varlen"]
Offsets = tuple[int, ...]

_OTHER_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# With fewer tokens than this in a launch a GPU is bound by launches, so all segments share one.
_FEW_TOKENS = 2048


class Batch(NamedTuple):
    """Consecutive segments of equal lengths.

    Attributes:
        segments: how many.
        queries, keys: of each.
    """

    segments: int
    queries: int
    keys: int


@functools.lru_cache(maxsize=64)
def equal_segments(q_offsets: Offsets, k_offsets: Offsets) -> tuple[Batch, ...]:
    """The runs of consecutive segments of equal lengths, each of which is one batch of torch's attention."""
    assert len(q_offsets) == len(k_offsets), "queries and keys must have the same number of segments"
    lengths = zip(*([b - a for a, b in itertools.pairwise(offsets)] for offsets in (q_offsets, k_offsets)), strict=True)
    return tuple(Batch(sum(1 for _ in same), *pair) for pair, same in itertools.groupby(lengths))


def cudnn_may_give_nan(queries: int, keys: int) -> bool:
    """Whether cuDNN's backward pass can return NaN at these lengths, or has no kernel for them.

    It scores the rows that pad its last tile with 0. Where all true scores of a query are below -88, the exponential of
    the difference overflows. Sources: pytorch issue 196678 (keys of 64 modulo 128), cudnn-frontend issue 1072 (one
    query); ``tools/gpu_check.py`` found the same with cuDNN 9.19 on an H200. One key alone is not supported.
    """
    return keys % 128 == 64 or queries < 2 or keys < 2


def check_kind(kind: str) -> None:
    """Check the name of an attention kind.

    Raises:
        ValueError: it is unknown; the message lists the known kinds.
    """
    if kind not in get_args(AttentionKind):
        raise ValueError(f"attention is {kind!r}; expected one of {', '.join(get_args(AttentionKind))}")


def resolve_kind(kind: AttentionKind, q_SHE: Tensor, q_offsets: Offsets, k_offsets: Offsets) -> AttentionKind:
    """Resolve ``auto``: ``varlen`` for many short segments of different lengths in 16 bits on CUDA, else ``sdpa``.

    Raises:
        ValueError: the requested kind cannot run on these tensors.
    """
    on_cuda_in_16_bits = q_SHE.is_cuda and q_SHE.dtype in (torch.float16, torch.bfloat16)
    if kind == "auto":
        launches = len(equal_segments(q_offsets, k_offsets))
        few = q_offsets[-1] < _FEW_TOKENS * launches
        return "varlen" if on_cuda_in_16_bits and few and launches > 1 else "sdpa"
    if kind != "sdpa" and not on_cuda_in_16_bits:
        raise ValueError(
            f"attention {kind} needs CUDA and bfloat16 or float16; got {q_SHE.dtype} on {q_SHE.device}: "
            "choose sdpa or auto"
        )
    return kind


def packed_attention(
    q_SHE: Float[Tensor, "S H E"],
    k_SHE: Float[Tensor, "K H E"],
    v_SHE: Float[Tensor, "K H E"],
    q_offsets: Offsets,
    k_offsets: Offsets,
    kind: AttentionKind = "auto",
) -> Float[Tensor, "S H E"]:
    """Scaled dot-product attention; segment i of the queries attends to segment i of the keys.

    Args:
        q_SHE: queries; rows after the last offset are padding, whose results are zeros.
        k_SHE, v_SHE: keys and values.
        q_offsets, k_offsets: segment starts and the end of the last one: B+1 ascending integers each; the first query
            is that of the first segment. A segment without queries is skipped.
        kind: see the module's docstring.

    Returns:
        Attended values, [S, H, E].

    Raises:
        ValueError: a kind that cannot run on these tensors, or queries before the first segment.
    """
    if q_offsets[0]:
        raise ValueError(
            f"the first segment of queries starts at row {q_offsets[0]}; expected 0: cut the rows before it"
        )
    kind = resolve_kind(kind, q_SHE, q_offsets, k_offsets)
    if kind == "varlen":
        parts = [_variable_length(q_SHE, k_SHE, v_SHE, q_offsets, k_offsets)]
    else:
        parts = _batch_by_batch(q_SHE, k_SHE, v_SHE, q_offsets, k_offsets, kind)
    padding = q_SHE.shape[0] - q_offsets[-1]
    if padding or not parts:
        zeros = q_SHE.new_zeros(padding, *q_SHE.shape[1:])
        # A rank that has only padding must take part in the backward pass, because the other ranks wait for it.
        parts.append(zeros if parts else zeros + (q_SHE[:0].sum() + k_SHE[:0].sum() + v_SHE[:0].sum()))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.lru_cache(maxsize=8)
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def _kernels(kind: AttentionKind, device: torch.device, it: Batch) -> contextlib.AbstractContextManager[None]:
    """The kernels that torch may take, the preferred first."""
    if kind == "flash" or (kind == "cudnn" and cudnn_may_give_nan(it.queries, it.keys)):
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    if kind == "cudnn":
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    if device.type != "cuda":
        return contextlib.nullcontext()
    if cudnn_may_give_nan(it.queries, it.keys):
        return sdpa_kernel(_OTHER_KERNELS)
    if _is_hopper(device):
        # By default torch prefers flash attention to cuDNN's, although it is slower on Hopper. On newer cards nothing
        # was measured, and on some of them cuDNN's is said to be the slower one: torch's order is kept.
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *_OTHER_KERNELS], set_priority=True)
    return contextlib.nullcontext()


def _batch_by_batch(
    q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, q_offsets: Offsets, k_offsets: Offsets, kind: AttentionKind
) -> list[Tensor]:
    parts = []
    batches = equal_segments(q_offsets, k_offsets)
    of_queries = _split(q_SHE, 0, [it.segments * it.queries for it in batches])
    of_keys, of_values = (_split(x, k_offsets[0], [it.segments * it.keys for it in batches]) for x in (k_SHE, v_SHE))
    for it, q, k, v in zip(batches, of_queries, of_keys, of_values, strict=True):
        if not it.queries:
            continue
        # [b s, h, e] to [b, h, s, e] and back, as plain views: this runs for every batch of every layer.
        q, k, v = (x.unflatten(0, (it.segments, -1)).transpose(1, 2) for x in (q, k, v))
        with _kernels(kind, q_SHE.device, it):
            parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return parts


def _split(x_SHE: Tensor, start: int, lengths: list[int]) -> tuple[Tensor, ...]:
    # Split, not sliced: the gradient of a slice is a tensor of the full size.
    rest = x_SHE.shape[0] - start - sum(lengths)
    if len(lengths) == 1 and not start and not rest:
        return (x_SHE,)
    return x_SHE.split([start, *lengths, rest])[1:-1]


@functools.lru_cache(maxsize=256)
def offsets_on_device(offsets: Offsets, device: torch.device) -> Tensor:
    """The offsets as int32, as fused kernels take them."""
    # The result is cached, and a tensor created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return to_device(torch.tensor(offsets, dtype=torch.int32), device)


def _longest(offsets: Offsets) -> int:
    return max(stop - start for start, stop in itertools.pairwise(offsets))


def _variable_length(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, q_offsets: Offsets, k_offsets: Offsets) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q_SHE[: q_offsets[-1]],
        k_SHE[: k_offsets[-1]],
        v_SHE[: k_offsets[-1]],
        offsets_on_device(q_offsets, q_SHE.device),
        offsets_on_device(k_offsets, k_SHE.device),
        _longest(q_offsets),
        _longest(k_offsets),
    )
    assert isinstance(out, Tensor), "nothing but the result was asked for"
    return out
