"""The RMS norm and rotation of ``rms_norm`` where several ranks hold parts of each row (tensor parallelism).

The sum of the squares of a row, and in the backward pass one product of a row, are added over the ranks. Each pass
reads its input twice, before and after the exchange. The second half of the forward pass is the kernel of ``rms_norm``,
which reads the sums; its backward pass is not shared, because an exchange divides it here.

Legend: S rows, D this rank's width, P pairs of a head.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from wan_model.kernels.launch import Kernel, block_of, warps_of
from wan_model.kernels.reduction import empty_sums, or_unread
from wan_model.kernels.rms_norm import FORWARD, constants_of, weight_gradient
from wan_model.kernels.rotation import rotate
from wan_model.kernels.row_chunks import chunks_of_all


def _squares(x, sums, chunks, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    chunk = tl.program_id(0)
    first, end = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    for row in range(first, end):
        value = tl.load(x + tl.cast(row, tl.int64) * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + row, tl.sum(value * value, axis=0))


def _backward_products(  # type: ignore[no-untyped-def]
    grad, x, weights, table, sums, products, partial, chunks, eps, full_width,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, ROTATED: tl.constexpr, SUMS: tl.constexpr,
) -> None:  # fmt: skip
    chunk = tl.program_id(0)
    first, end = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weights + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(first, end):
        places = tl.cast(row, tl.int64) * WIDTH + columns
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        if ROTATED:
            slope = rotate(slope, table, row, columns, inside, HEAD, BLOCK, -1.0)
        normed = value * tl.rsqrt(tl.load(sums + row) / full_width + eps)
        if SUMS:
            grad_weight += slope * normed
        tl.store(products + row, tl.sum(slope * weight * normed, axis=0))
    if SUMS:
        tl.store(partial + chunk * WIDTH + columns, grad_weight, mask=inside)


def _backward(  # type: ignore[no-untyped-def]
    grad, x, weights, table, sums, products, grad_x, chunks, eps, full_width,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, ROTATED: tl.constexpr,
) -> None:  # fmt: skip
    chunk = tl.program_id(0)
    first, end = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weights + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, end):
        places = tl.cast(row, tl.int64) * WIDTH + columns
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        if ROTATED:
            slope = rotate(slope, table, row, columns, inside, HEAD, BLOCK, -1.0)
        scale = tl.rsqrt(tl.load(sums + row) / full_width + eps)
        slope = slope * weight - value * scale * (tl.load(products + row) / full_width)
        tl.store(grad_x + places, (slope * scale).to(grad_x.dtype.element_ty), mask=inside)


SQUARES, BACKWARD_PRODUCTS, BACKWARD = Kernel(_squares), Kernel(_backward_products), Kernel(_backward)


class _SplitRMSNormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_SD: Tensor,
        weight_D: Tensor,
        eps: float,
        table_S1P2: Tensor | None,
        full_width: int,
        add_over_ranks: Callable[[Tensor], object],
    ) -> Tensor:
        x_SD = x_SD.contiguous()
        rows, width = x_SD.shape
        chunks, warps = chunks_of_all(rows, x_SD.device), warps_of(width)
        constants = constants_of(width, table_S1P2)
        table = weight_D if table_S1P2 is None else table_S1P2
        grid = (chunks.count,)
        sums_S = torch.empty(rows, dtype=torch.float32, device=x_SD.device)
        SQUARES.launch(grid, x_SD, sums_S, chunks.table, warps=warps, WIDTH=width, BLOCK=block_of(width))
        add_over_ranks(sums_S)
        out_SD = torch.empty_like(x_SD)
        FORWARD.launch(
            grid, x_SD, out_SD, weight_D, table, sums_S, chunks.table, eps, full_width,
            warps=warps, SPLIT=True, **constants,
        )  # fmt: skip
        ctx.save_for_backward(x_SD, weight_D, table, sums_S)
        ctx.rest = chunks, eps, full_width, add_over_ranks, warps, constants
        return out_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weight_D, table, sums_S = ctx.saved_tensors
        chunks, eps, full_width, add_over_ranks, warps, constants = ctx.rest
        grid, grad_SD = (chunks.count,), grad_SD.contiguous()
        products_S, grad_x_SD = torch.empty_like(sums_S), torch.empty_like(x_SD)
        partial = empty_sums(chunks, x_SD.shape[1]) if ctx.needs_input_grad[1] else None
        BACKWARD_PRODUCTS.launch(
            grid, grad_SD, x_SD, weight_D, table, sums_S, products_S, or_unread(partial, weight_D), chunks.table, eps,
            full_width, warps=warps, SUMS=partial is not None, **constants,
        )  # fmt: skip
        add_over_ranks(products_S)
        BACKWARD.launch(
            grid, grad_SD, x_SD, weight_D, table, sums_S, products_S, grad_x_SD, chunks.table, eps, full_width,
            warps=warps, **constants,
        )  # fmt: skip
        return grad_x_SD, weight_gradient(partial, chunks, weight_D), None, None, None, None


def split_rms_norm_rotate(
    x_SD: Tensor,
    weight_D: Tensor,
    eps: float,
    table_S1P2: Tensor | None,
    full_width: int,
    add_over_ranks: Callable[[Tensor], object],
) -> Tensor:
    """See the module.

    Args:
        x_SD: this rank's part of the rows.
        weight_D: this rank's part of the weight.
        eps: added to the mean of the squares.
        table_S1P2: cosine and sine of each pair's angle, fp32, contiguous; None for no rotation.
        full_width: of all ranks.
        add_over_ranks: adds a tensor [S] over the ranks, in place.
    """
    out: Tensor = _SplitRMSNormRotate.apply(x_SD, weight_D, eps, table_S1P2, full_width, add_over_ranks)
    return out
