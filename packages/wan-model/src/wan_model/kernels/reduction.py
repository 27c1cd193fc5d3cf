"""The sum over the chunks of each sample, in a fixed order."""

import torch
import triton.language as tl
from torch import Tensor

from wan_model.kernels.launch import Kernel
from wan_model.kernels.row_chunks import RowChunks

# Partial sums that are read at once, and columns of a program.
CHUNKS, COLUMNS = 64, 32


def _sum_chunks(  # type: ignore[no-untyped-def]
    partial, out, of_sample, width, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr
) -> None:
    sample = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    first = tl.load(of_sample + 2 * sample)
    end = tl.load(of_sample + 2 * sample + 1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(first, end, CHUNKS):
        chunks = start + tl.arange(0, CHUNKS)
        places = chunks[:, None].to(tl.int64) * width + columns[None, :]
        total += tl.sum(tl.load(partial + places, mask=(chunks < end)[:, None] & inside[None, :], other=0.0), axis=0)
    tl.store(out + sample * width + columns, total, mask=inside)


SUM_CHUNKS = Kernel(_sum_chunks)


def empty_sums(chunks: RowChunks, *shape: int) -> Tensor:
    """Memory for the sums of each chunk, [chunks, *shape] fp32."""
    return torch.empty(chunks.count, *shape, dtype=torch.float32, device=chunks.table.device)


def or_unread(tensor: Tensor | None, other: Tensor) -> Tensor:
    """An argument of a kernel: the tensor, or another in its place where the kernel does not touch it."""
    return other if tensor is None else tensor


def sum_over_chunks(partial: Tensor, chunks: RowChunks) -> Tensor:
    """The sum of each sample's chunks.

    Args:
        partial: [chunks, ...] fp32, contiguous.
        chunks: of these.

    Returns:
        [samples, ...] fp32.
    """
    samples, width = chunks.of_sample.shape[0], partial[0].numel()
    out = torch.empty(samples, *partial.shape[1:], dtype=torch.float32, device=partial.device)
    grid = samples, -(-width // COLUMNS)
    SUM_CHUNKS.launch(grid, partial, out, chunks.of_sample, width, warps=4, CHUNKS=CHUNKS, COLUMNS=COLUMNS)
    return out
