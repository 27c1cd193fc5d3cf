"""x + gate * update, with the gate of each row's sample.

The gradient of x is that of the result, without a kernel.

Legend: S rows, B samples, D width.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from wan_model.kernels.launch import Kernel, block_of, warps_of
from wan_model.kernels.reduction import sum_over_chunks
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
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    chunk = tl.program_id(0)
    first, end, sample = tl.load(chunks + 3 * chunk), tl.load(chunks + 3 * chunk + 1), tl.load(chunks + 3 * chunk + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gates + sample * stride + columns, mask=inside, other=0.0).to(tl.float32)
    grad_gate = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(first, end):
        places = tl.cast(row, tl.int64) * WIDTH + columns
        slope = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        grad_gate += slope * tl.load(update + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(
            grad_update + places,
            (slope * gate).to(grad_update.dtype.element_ty),
            mask=inside,
        )
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
        ctx.save_for_backward(update_SD, gate_BD)
        ctx.chunks = chunks
        return _add(x_SD, update_SD, torch.empty_like(x_SD), gate_BD, chunks)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        update_SD, gate_BD = ctx.saved_tensors
        chunks, width = ctx.chunks, update_SD.shape[1]
        grad_SD, grad_update_SD = grad_SD.contiguous(), torch.empty_like(update_SD)
        partial = torch.empty(chunks.count, width, dtype=torch.float32, device=update_SD.device)
        BACKWARD.launch(
            (chunks.count,), grad_SD, update_SD, gate_BD, grad_update_SD, partial, gate_BD.stride(0), chunks.table,
            warps=warps_of(width), WIDTH=width, BLOCK=block_of(width),
        )  # fmt: skip
        return grad_SD, grad_update_SD, sum_over_chunks(partial, chunks), None


def gate_add(x_SD: Tensor, update_SD: Tensor, gate_BD: Tensor, chunks: RowChunks) -> Tensor:
    """See the module. The gate and its gradient are fp32; the result has the type of x, the update may have another."""
    out: Tensor = _GateAdd.apply(x_SD, update_SD, gate_BD, chunks)
    return out
