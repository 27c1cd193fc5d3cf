"""Layer norm with a factor and an offset: of each sample (modulation), or the same for all rows (weight and bias).

    out = (x - mean) / sqrt(variance + eps) * (plus_one + factor) + offset

The backward pass computes the statistics again from the input, which it reads anyway, so nothing else is kept. It
computes no gradients of factor and offset where neither needs one, as of frozen weights.

Legend: S rows, B samples, D width.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from wan_model.kernels.launch import Kernel, block_of, warps_of
from wan_model.kernels.reduction import empty_sums, or_unread, sum_over_chunks
from wan_model.kernels.row_chunks import RowChunks


def _forward(  # type: ignore[no-untyped-def]
    x, out, factors, offsets, stride, chunks, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr,
) -> None:  # fmt: skip
    chunk = tl.program_id(0)
    first, end, sample = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    factor = PLUS_ONE + tl.load(factors + sample * stride + columns, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(offsets + sample * stride + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, end):
        places = tl.cast(row, tl.int64) * WIDTH + columns
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - tl.sum(value, axis=0) / WIDTH, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
        tl.store(out + places, (normed * factor + offset).to(out.dtype.element_ty), mask=inside)


def _backward(  # type: ignore[no-untyped-def]
    grad, x, factors, grad_x, partial, stride, chunks, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr, SUMS: tl.constexpr,
) -> None:  # fmt: skip
    chunk = tl.program_id(0)
    first, end, sample = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    factor = PLUS_ONE + tl.load(factors + sample * stride + columns, mask=inside, other=0.0).to(tl.float32)
    grad_factor = tl.zeros((BLOCK,), dtype=tl.float32)
    grad_offset = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(first, end):
        places = tl.cast(row, tl.int64) * WIDTH + columns
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, value - tl.sum(value, axis=0) / WIDTH, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
        normed = centred * scale
        if SUMS:
            grad_factor += slope * normed
            grad_offset += slope
        slope = tl.where(inside, slope * factor, 0.0)
        slope -= tl.sum(slope, axis=0) / WIDTH + normed * (tl.sum(slope * normed, axis=0) / WIDTH)
        tl.store(grad_x + places, (slope * scale).to(grad_x.dtype.element_ty), mask=inside)
    if SUMS:
        tl.store(partial + (2 * chunk) * WIDTH + columns, grad_factor, mask=inside)
        tl.store(partial + (2 * chunk + 1) * WIDTH + columns, grad_offset, mask=inside)


FORWARD, BACKWARD = Kernel(_forward), Kernel(_backward)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SD: Tensor, factor_BD: Tensor, offset_BD: Tensor, chunks: RowChunks, eps: float, plus_one: float
    ) -> Tensor:
        x_SD = x_SD.contiguous()
        assert factor_BD.stride() == offset_BD.stride()
        assert factor_BD.stride(1) == 1
        width, out_SD = x_SD.shape[1], torch.empty_like(x_SD)
        constants = {"WIDTH": width, "BLOCK": block_of(width), "PLUS_ONE": plus_one}
        FORWARD.launch(
            (chunks.count,), x_SD, out_SD, factor_BD, offset_BD, factor_BD.stride(0), chunks.table, eps,
            warps=warps_of(width), **constants,
        )  # fmt: skip
        ctx.save_for_backward(x_SD, factor_BD)
        ctx.rest = chunks, eps, constants
        return out_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, factor_BD = ctx.saved_tensors
        chunks, eps, constants = ctx.rest
        width, grad_x_SD = x_SD.shape[1], torch.empty_like(x_SD)
        partial = empty_sums(chunks, 2, width) if any(ctx.needs_input_grad[1:3]) else None
        BACKWARD.launch(
            (chunks.count,), grad_SD.contiguous(), x_SD, factor_BD, grad_x_SD, or_unread(partial, factor_BD),
            factor_BD.stride(0), chunks.table, eps, warps=warps_of(width), SUMS=partial is not None, **constants,
        )  # fmt: skip
        if partial is None:
            return grad_x_SD, None, None, None, None, None
        grad_factor_BD, grad_offset_BD = sum_over_chunks(partial, chunks).unbind(1)
        return grad_x_SD, grad_factor_BD, grad_offset_BD, None, None, None


def layer_norm_factor_offset(
    x_SD: Tensor, factor_BD: Tensor, offset_BD: Tensor, chunks: RowChunks, eps: float, *, plus_one: float
) -> Tensor:
    """See the module.

    Args:
        x_SD: rows.
        factor_BD, offset_BD: fp32, of equal strides, the last of them 1.
        chunks: the rows of each sample.
        eps: added to the variance.
        plus_one: 1 for the scale of a modulation, 0 for a weight.
    """
    out: Tensor = _LayerNorm.apply(x_SD, factor_BD, offset_BD, chunks, eps, plus_one)
    return out
