"""Rotary position embedding over (frame, row, column), for packs.

Source: Wan 2.1's ``rope_params`` and diffusers' ``WanRotaryPosEmbed``. The head width E is split as
t = E - 4*floor(E/6), h = w = 2*floor(E/6) (44/42/42 for 128); theta is 10,000; the pairs (2i, 2i+1) are rotated.
Angles are computed in fp64 and their sines and cosines kept in fp32.
"""

import functools

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from wan_model.pack import Grid, PackLayout

THETA = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's values turn with the frame, the row and the column."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def grid_angles(grid: Grid, head_dim: int) -> Float[Tensor, "S half"]:
    """Angles of one sample's tokens, [f*h*w, head_dim/2], fp64, on the CPU."""
    f, h, w = grid
    per_axis = []
    for size, width in zip(grid, axis_widths(head_dim), strict=True):
        frequency = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        per_axis.append(torch.outer(torch.arange(size, dtype=torch.float64), frequency))
    return torch.cat(
        [
            repeat(per_axis[0], "f e -> (f h w) e", h=h, w=w),
            repeat(per_axis[1], "h e -> (f h w) e", f=f, w=w),
            repeat(per_axis[2], "w e -> (f h w) e", f=f, h=h),
        ],
        dim=-1,
    )


@functools.lru_cache(maxsize=64)
def rotary_tables(layout: PackLayout, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, sin) of every token of a pack, each [S, 1, head_dim/2] fp32; built once a layout. Padding is not turned."""
    # A tensor made in inference mode could never be used in training afterwards, and these are kept.
    with torch.inference_mode(False):
        angles = torch.cat([grid_angles(grid, head_dim) for grid in layout.grids])
        if layout.padding:
            angles = torch.cat([angles, angles.new_zeros(layout.padding, angles.shape[1])])
        table = rearrange(angles, "s e -> s 1 e")
        return table.cos().float().to(device), table.sin().float().to(device)


def rotate(x_SHE: Float[Tensor, "S H E"], tables: tuple[Tensor, Tensor]) -> Float[Tensor, "S H E"]:
    """Turn each pair of values by its token's angle, in fp32."""
    cos, sin = tables
    even, odd = rearrange(x_SHE.float(), "s h (e two) -> two s h e", two=2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rearrange(turned, "s h e two -> s h (e two)").to(x_SHE.dtype)
