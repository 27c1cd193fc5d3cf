"""Chunks of a pack's rows: consecutive rows of one sample, for which a program of a kernel looks up its values once."""

import dataclasses
import functools

import torch
from torch import Tensor

from wan_model.pack import TokenRows, to_device

# Enough programs for all multiprocessors of a large GPU, several on each.
_PROGRAMS = 1024
_FEWEST, _MOST = 4, 32

Segments = tuple[tuple[int, int, int], ...]


@dataclasses.dataclass(frozen=True)
class RowChunks:
    """Chunks in order.

    Attributes:
        table: [chunks, 3] int32 on the device: first row, end, sample.
        of_sample: [samples, 2] int32 on the device: each sample's first chunk, and the end.
        count: number of chunks.
    """

    table: Tensor
    of_sample: Tensor
    count: int


def rows_of_a_chunk(rows: int) -> int:
    """The most rows of a chunk."""
    size = _FEWEST
    while size < _MOST and rows > 2 * size * _PROGRAMS:
        size *= 2
    return size


@functools.lru_cache(maxsize=16)
def _of_segments(segments: Segments, samples: int, device: torch.device) -> RowChunks:
    size = rows_of_a_chunk(segments[-1][2] - segments[0][1])
    chunks: list[tuple[int, int, int]] = []
    of_sample = [(0, 0)] * samples
    for sample, start, stop in segments:
        first = len(chunks)
        chunks += [(row, min(row + size, stop), sample) for row in range(start, stop, size)]
        of_sample[sample] = (first, len(chunks))
    # The results are cached, and tensors created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        table, ranges = (to_device(torch.tensor(values, dtype=torch.int32), device) for values in (chunks, of_sample))
    return RowChunks(table, ranges, len(chunks))


def chunks_by_sample(rows: TokenRows, device: torch.device) -> RowChunks:
    """Chunks of the rows of a rank; padding counts to the last sample."""
    return _of_segments(rows.segments, rows.layout.num_samples, device)


def chunks_of_all(rows: int, device: torch.device) -> RowChunks:
    """Chunks of rows that share the same values, such as the weights of a norm."""
    return _of_segments(((0, 0, rows),), 1, device)
