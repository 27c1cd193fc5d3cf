"""Rotary position embedding over (frame, row, column), for packs.

Source: Wan 2.1's ``rope_params`` and diffusers' ``WanRotaryPosEmbed``. The head width E is split as
t = E - 4*floor(E/6), h = w = 2*floor(E/6) (44/42/42 for 128); theta is 10,000; the pairs (2i, 2i+1) are rotated.
A pair is a complex number that is multiplied by exp(i * angle): angles are computed in fp64 and rounded to fp32 at the
end.
"""

import functools

import torch
from einops import rearrange, repeat
from jaxtyping import Complex
from torch import Tensor

from wan_model.pack import TokenRows, to_device

THETA = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """The number of values of a head that are rotated by the frame, the row and the column index."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


@functools.lru_cache(maxsize=64)
def _axis_rotations(positions: int, width: int, device: torch.device) -> Complex[Tensor, "positions pairs"]:
    frequency = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return to_device(torch.polar(torch.ones_like(angles), angles).to(torch.complex64), device)


# A table of 43,008 tokens takes 22 MB on the device, and layouts seldom recur.
@functools.lru_cache(maxsize=4)
def rotary_table(rows: TokenRows, head_dim: int, device: torch.device) -> Complex[Tensor, "S 1 pairs"]:
    """The rotation of each pair of values of each token, [S, 1, head_dim/2], complex fp32; padding is not rotated.

    Only the rotations of single positions (a few hundred numbers) are copied from the host. The table is built on the
    device, once for all layers of a forward pass, and cached for the most recent layouts.
    """
    # The results are cached, and tensors created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        parts = []
        for f, h, w in rows.layout.grids:
            # Powers of two, so that few tables serve all grids.
            rotations = [
                _axis_rotations(1 << (size - 1).bit_length(), width, device)[:size]
                for size, width in zip((f, h, w), axis_widths(head_dim), strict=True)
            ]
            along_f = repeat(rotations[0], "f e -> f h w e", h=h, w=w)
            along_h = repeat(rotations[1], "h e -> f h w e", f=f, w=w)
            along_w = repeat(rotations[2], "w e -> f h w e", f=f, h=h)
            parts.append(rearrange(torch.cat([along_f, along_h, along_w], dim=-1), "f h w e -> (f h w) e"))
        if rows.layout.padding:
            parts.append(torch.ones(rows.layout.padding, head_dim // 2, dtype=torch.complex64, device=device))
        table = parts[0] if len(parts) == 1 else torch.cat(parts)
        if (rows.start, rows.stop) != (0, rows.layout.total):
            table = table[rows.start : rows.stop].clone()
        return rearrange(table, "s e -> s 1 e")
