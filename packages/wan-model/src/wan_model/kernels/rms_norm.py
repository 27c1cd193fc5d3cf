"""RMS norm over the whole width, and the rotary rotation that follows it.

    normed = x / sqrt(mean(x^2) + eps);  out = rotate(normed * weight)

Values 2i and 2i + 1 of a head are a pair, which is rotated by the angle of its token and i. The backward pass computes
the statistics again from the input, which it reads anyway, so nothing else is kept. The gradient of a frozen weight is
not computed.

Legend: S rows, D width, P pairs of a head.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from wan_model.kernels.launch import Kernel, block_of, warps_of
from wan_model.kernels.reduction import empty_sums, or_unread, sum_over_chunks
from wan_model.kernels.rotation import rotate
from wan_model.kernels.row_chunks import RowChunks, chunks_of_all


def _forward(  # type: ignore[no-untyped-def]
    x, out, weights, table, sums, chunks, eps, full_width,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr, ROTATED: tl.constexpr, SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    # Also the second kernel of split_rms_norm: with SPLIT the sums of the squares of whole rows are read.
    chunk = tl.program_id(0)
    first, end = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(weights + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, end):
        places = tl.cast(row, tl.int64) * WIDTH + columns
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(sums + row) / full_width if SPLIT else tl.sum(value * value, axis=0) / WIDTH
        value *= weight * tl.rsqrt(mean + eps)
        if ROTATED:
            value = rotate(value, table, row, columns, inside, HEAD, BLOCK, 1.0)
        tl.store(out + places, value.to(out.dtype.element_ty), mask=inside)


def _backward(  # type: ignore[no-untyped-def]
    grad, x, weights, table, grad_x, partial, chunks, eps,
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
        scale = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
        normed = value * scale
        if SUMS:
            grad_weight += slope * normed
        slope *= weight
        slope -= normed * (tl.sum(slope * normed, axis=0) / WIDTH)
        tl.store(grad_x + places, (slope * scale).to(grad_x.dtype.element_ty), mask=inside)
    if SUMS:
        tl.store(partial + chunk * WIDTH + columns, grad_weight, mask=inside)


FORWARD, BACKWARD = Kernel(_forward), Kernel(_backward)


def constants_of(width: int, table_S1P2: Tensor | None) -> dict[str, Any]:
    """The constants of the kernels for rows of this width on this rank, and this table of angles."""
    head = 1 if table_S1P2 is None else 2 * table_S1P2.shape[-2]
    return {"WIDTH": width, "BLOCK": block_of(width), "HEAD": head, "ROTATED": table_S1P2 is not None}


def _launch_forward(
    x_SD: Tensor, out_SD: Tensor, weight_D: Tensor, table: Tensor, chunks: RowChunks, eps: float, constants: Any
) -> None:
    width = x_SD.shape[1]
    # The weight stands for the sums, which are not read.
    FORWARD.launch(
        (chunks.count,), x_SD, out_SD, weight_D, table, weight_D, chunks.table, eps, width,
        warps=warps_of(width), SPLIT=False, **constants,
    )  # fmt: skip


def rms_norm_rotate_(x_SD: Tensor, weight_D: Tensor, eps: float, table_S1P2: Tensor | None) -> Tensor:
    """Without gradients: the result overwrites the input.

    Args:
        x_SD: contiguous.
        weight_D: of the norm.
        eps: added to the mean of the squares.
        table_S1P2: cosine and sine of each pair's angle, fp32, contiguous; None for no rotation.
    """
    chunks, constants = chunks_of_all(x_SD.shape[0], x_SD.device), constants_of(x_SD.shape[1], table_S1P2)
    table = weight_D if table_S1P2 is None else table_S1P2
    _launch_forward(x_SD, x_SD, weight_D, table, chunks, eps, constants)
    return x_SD


def weight_gradient(partial: Tensor | None, chunks: RowChunks, weight_D: Tensor) -> Tensor | None:
    """From the sums of each chunk; None of a frozen weight."""
    return None if partial is None else sum_over_chunks(partial, chunks)[0].to(weight_D.dtype)


class _RMSNormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, weight_D: Tensor, eps: float, table_S1P2: Tensor | None) -> Tensor:
        x_SD = x_SD.contiguous()
        chunks, constants = chunks_of_all(x_SD.shape[0], x_SD.device), constants_of(x_SD.shape[1], table_S1P2)
        out_SD = torch.empty_like(x_SD)
        table = weight_D if table_S1P2 is None else table_S1P2
        _launch_forward(x_SD, out_SD, weight_D, table, chunks, eps, constants)
        ctx.save_for_backward(x_SD, weight_D, table)
        ctx.rest = chunks, eps, constants
        return out_SD

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        x_SD, weight_D, table = ctx.saved_tensors
        chunks, eps, constants = ctx.rest
        width, grad_x_SD = x_SD.shape[1], torch.empty_like(x_SD)
        partial = empty_sums(chunks, width) if ctx.needs_input_grad[1] else None
        BACKWARD.launch(
            (chunks.count,), grad_SD.contiguous(), x_SD, weight_D, table, grad_x_SD, or_unread(partial, weight_D),
            chunks.table, eps, warps=warps_of(width), SUMS=partial is not None, **constants,
        )  # fmt: skip
        return grad_x_SD, weight_gradient(partial, chunks, weight_D), None, None


def rms_norm_rotate(x_SD: Tensor, weight_D: Tensor, eps: float, table_S1P2: Tensor | None) -> Tensor:
    """See the module; the arguments are those of ``rms_norm_rotate_``."""
    out: Tensor = _RMSNormRotate.apply(x_SD, weight_D, eps, table_S1P2)
    return out
