"""Attention over packed sequences: every sample attends to itself (or to its own text) and to nothing else.

Shapes: S tokens, H heads, E head width. Offsets are host integers, so nothing is read back from the device, and no
mask of tokens × tokens is ever made.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def packed_attention(
    q_SHE: Float[Tensor, "S H E"],
    k_SHE: Float[Tensor, "K H E"],
    v_SHE: Float[Tensor, "K H E"],
    q_offsets: tuple[int, ...],
    k_offsets: tuple[int, ...],
) -> Float[Tensor, "S H E"]:
    """Scaled dot-product attention, segment by segment.

    Args:
        q_SHE: queries; rows behind the last offset are padding and come out as zeros.
        k_SHE, v_SHE: keys and values.
        q_offsets, k_offsets: segment starts, and last the end: B+1 ascending integers each.

    Returns:
        Attended values, [S, H, E].
    """
    assert len(q_offsets) == len(k_offsets), "queries and keys must have the same number of segments"
    parts = []
    for i in range(len(q_offsets) - 1):
        q, k, v = (
            rearrange(x[start:stop], "s h e -> 1 h s e")
            for x, start, stop in (
                (q_SHE, q_offsets[i], q_offsets[i + 1]),
                (k_SHE, k_offsets[i], k_offsets[i + 1]),
                (v_SHE, k_offsets[i], k_offsets[i + 1]),
            )
        )
        parts.append(rearrange(F.scaled_dot_product_attention(q, k, v), "1 h s e -> s h e"))
    if padding := q_SHE.shape[0] - q_offsets[-1]:
        parts.append(q_SHE.new_zeros(padding, *q_SHE.shape[1:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
