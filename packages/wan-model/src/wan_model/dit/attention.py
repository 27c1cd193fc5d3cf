"""Attention over packed sequences: every sample attends only to itself (or to its own text).

Shapes: S queries, K keys, H heads, E head width. Offsets are host integers, so nothing is read back from the device,
and no mask of tokens x tokens is built: memory is linear in the number of tokens.

``sdpa`` calls torch's attention segment by segment, with the kernel that torch selects; ``cudnn`` and ``flash`` do the
same with only that kernel. ``varlen`` is torch's variable-length flash attention, one launch for all segments. The last
three need CUDA and 16-bit tensors.
"""

import contextlib
import functools
import itertools
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionKind = Literal["auto", "sdpa", "cudnn", "flash", "varlen"]
Offsets = tuple[int, ...]

_ONE_KERNEL = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# With segments shorter than this on average a GPU is bound by kernel launches, so all segments share one launch.
_SHORT_SEGMENTS = 2048


def check_kind(kind: str) -> None:
    """Check the name of an attention kind.

    Raises:
        ValueError: it is unknown; the message lists the known kinds.
    """
    if kind not in get_args(AttentionKind):
        raise ValueError(f"attention is {kind!r}; expected one of {', '.join(get_args(AttentionKind))}")


def resolve_kind(kind: AttentionKind, q_SHE: Tensor, q_offsets: Offsets) -> AttentionKind:
    """Resolve ``auto``: ``varlen`` for many short segments in 16 bits on CUDA, else ``sdpa``.

    Raises:
        ValueError: the requested kind cannot run on these tensors.
    """
    on_cuda_in_16_bits = q_SHE.is_cuda and q_SHE.dtype in (torch.float16, torch.bfloat16)
    if kind == "auto":
        short = q_offsets[-1] < _SHORT_SEGMENTS * (len(q_offsets) - 1)
        return "varlen" if on_cuda_in_16_bits and short and len(q_offsets) > 2 else "sdpa"
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
        q_offsets, k_offsets: segment starts and the end of the last one: B+1 ascending integers each. A segment without
            queries is skipped.
        kind: see the module's docstring.

    Returns:
        Attended values, [S, H, E].

    Raises:
        ValueError: a kind that cannot run on these tensors.
    """
    assert len(q_offsets) == len(k_offsets), "queries and keys must have the same number of segments"
    kind = resolve_kind(kind, q_SHE, q_offsets)
    if kind == "varlen":
        parts = [_variable_length(q_SHE, k_SHE, v_SHE, q_offsets, k_offsets)]
    else:
        # By default torch prefers flash attention to cuDNN's, although it is slower on Hopper.
        only = sdpa_kernel(_ONE_KERNEL[kind]) if kind in _ONE_KERNEL else _preferred(q_SHE.device)
        with only:
            parts = _segment_by_segment(q_SHE, k_SHE, v_SHE, q_offsets, k_offsets)
    if padding := q_SHE.shape[0] - q_offsets[-1]:
        zeros = q_SHE.new_zeros(padding, *q_SHE.shape[1:])
        # A rank that has only padding must take part in the backward pass, because the other ranks wait for it.
        parts.append(zeros if parts else zeros + (q_SHE[:0].sum() + k_SHE[:0].sum() + v_SHE[:0].sum()))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@functools.lru_cache(maxsize=8)
def _is_hopper_or_newer(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def _preferred(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type != "cuda" or not _is_hopper_or_newer(device):
        return contextlib.nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _segment_by_segment(
    q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, q_offsets: Offsets, k_offsets: Offsets
) -> list[Tensor]:
    parts = []
    for q, k, v in zip(_split(q_SHE, q_offsets), _split(k_SHE, k_offsets), _split(v_SHE, k_offsets), strict=True):
        if not q.shape[0]:
            continue
        # [s, h, e] to [1, h, s, e] and back, as plain views: this runs for every segment of every layer.
        q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).squeeze(0))
    return parts


def _split(x_SHE: Tensor, offsets: Offsets) -> tuple[Tensor, ...]:
    # Split, not sliced: the gradient of a slice is a tensor of the full size.
    rest = x_SHE.shape[0] - offsets[-1]
    if len(offsets) == 2 and not offsets[0] and not rest:
        return (x_SHE,)
    lengths = [offsets[0], *(stop - start for start, stop in itertools.pairwise(offsets)), rest]
    return x_SHE.split(lengths)[1:-1]


@functools.lru_cache(maxsize=32)
def _on_device(offsets: Offsets, device: torch.device) -> Tensor:
    # The result is cached, and a tensor created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return torch.tensor(offsets, dtype=torch.int32).to(device, non_blocking=True)


def _longest(offsets: Offsets) -> int:
    return max(stop - start for start, stop in itertools.pairwise(offsets))


def _variable_length(q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, q_offsets: Offsets, k_offsets: Offsets) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q_SHE[: q_offsets[-1]],
        k_SHE[: k_offsets[-1]],
        v_SHE[: k_offsets[-1]],
        _on_device(q_offsets, q_SHE.device),
        _on_device(k_offsets, k_SHE.device),
        _longest(q_offsets),
        _longest(k_offsets),
    )
    assert isinstance(out, Tensor), "nothing but the result was asked for"
    return out
