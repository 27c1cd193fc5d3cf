"""x + gate * update, with the gate of each row's sample.

The gradient of x is that of the result, without a kernel. A gate without gradient, as of frozen weights, keeps no
update.

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
    x, update, out, gates, stride, chunks, WIDTH: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    chunk = tl.program_id(0)
    first, end, sample = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gates + sample * stride + columns, mask=inside, other=0.0).to(tl.float32)
    for row in range(first, end):
        places = tl.cast(row, tl.int64) * WIDTH + columns
        value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
        value += gate * tl.load(update + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + places, value.to(out.dtype.element_ty), mask=inside)


def _backward(  # type: ignore[no-untyped-def]
    grad, update, gates, grad_update, partial, stride, chunks,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GATES: tl.constexpr,
) -> None:  # fmt: skip
    # Without GATES the gradients of gates are not computed, and the update is not read.
    chunk = tl.program_id(0)
    first, end, sample = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gates + sample * stride + columns, mask=inside, other=0.0).to(tl.float32)
    grad_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(first, end):
        places = tl.cast(row, tl.int64) * WIDTH + columns
        slope = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        if GATES:
            grad_gate += slope * tl.load(update + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            grad_update + places,
            (slope * gate).to(grad_update.dtype.element_ty),
            mask=inside,
        )
    if GATES:
        tl.store(partial + chunk * WIDTH + columns, grad_gate, mask=inside)


FORWARD, BACKWARD = Kernel(_forward), Kernel(_backward)


def _add(x_SD: Tensor, update_SD: Tensor, out_SD: Tensor, gate_BD: Tensor, chunks: RowChunks) -> Tensor:
    assert gate_BD.stride(1) == 1
    width = x_SD.shape[1]
    FORWARD.launch(
        (chunks.count,), x_SD, update_SD, out_SD, gate_BD, gate_BD.stride(0), chunks.table,
        warps=warps_of(width), WIDTH=width, BLOCK=block_of(width),
    )  # fmt: skip
    return out_SD


def gate_add_(x_SD: Tensor, update_SD: Tensor, gate_BD: Tensor, chunks: RowChunks) -> Tensor:
    """Without gradients: the result overwrites the update. All are contiguous."""
    return _add(x_SD, update_SD, update_SD, gate_BD, chunks)


class _GateAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, update_SD: Tensor, gate_BD: Tensor, chunks: RowChunks) -> Tensor:
        x_SD, update_SD = x_SD.contiguous(), update_SD.contiguous()
        ctx.save_for_backward(update_SD if ctx.needs_input_grad[2] else None, gate_BD)
        ctx.rest = chunks, update_SD.dtype
        return _add(x_SD, update_SD, torch.empty_like(x_SD), gate_BD, chunks)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        update_SD, gate_BD = ctx.saved_tensors
        chunks, dtype = ctx.rest
        grad_SD = grad_SD.contiguous()
        width, grad_update_SD = grad_SD.shape[1], torch.empty_like(grad_SD, dtype=dtype)
        partial = None if update_SD is None else empty_sums(chunks, width)
        BACKWARD.launch(
            (chunks.count,), grad_SD, or_unread(update_SD, gate_BD), gate_BD, grad_update_SD,
            or_unread(partial, gate_BD), gate_BD.stride(0), chunks.table,
            warps=warps_of(width), WIDTH=width, BLOCK=block_of(width), GATES=partial is not None,
        )  # fmt: skip
        return grad_SD, grad_update_SD, None if partial is None else sum_over_chunks(partial, chunks), None


def gate_add(x_SD: Tensor, update_SD: Tensor, gate_BD: Tensor, chunks: RowChunks) -> Tensor:
    """See the module. The gate and its gradient are fp32; the result has the type of x, the update may have another."""
    out: Tensor = _GateAdd.apply(x_SD, update_SD, gate_BD, chunks)
    return out
