"""What the transformer asks of its runtime: the one seam between the mathematics and parallelism.

Shapes: S tokens, D width, H heads on this rank, E head width.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan_model.attention import packed_attention


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, statistics in fp32.

    ``mean_square`` may be overridden by a runtime that holds only a part of the width.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def mean_square(self, x: Tensor) -> Tensor:
        """Mean of the squares over the full width, [..., 1]."""
        return x.square().mean(dim=-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = x.float()
        normed = wide * torch.rsqrt(self.mean_square(wide) + self.eps)
        return normed.to(x.dtype) * self.weight


@runtime_checkable
class Ops(Protocol):
    """A runtime. ``TorchOps`` is the single-device one; wan-train has Megatron's.

    Between ``shard_tokens`` and ``gather_tokens`` a rank may hold only some rows of the token sequence.
    ``enter_tokens`` gives it all rows for the linears and the attention, of which it then holds only some heads;
    ``row_linear`` returns to rows.
    """

    def column_linear(self, width_in: int, width_out: int) -> nn.Module:
        """A biased linear whose output is split over ranks."""

    def row_linear(self, width_in: int, width_out: int) -> nn.Module:
        """A biased linear whose input is split over ranks and whose output is this rank's rows, whole in width."""

    def norm_across_heads(self, width: int, eps: float) -> nn.Module:
        """RMS norm over the full width, applied to a column-linear's output."""

    def local_heads(self, heads: int) -> int:
        """Heads on this rank."""

    def shard_tokens(self, x_SD: Tensor) -> Tensor:
        """This rank's rows of the sequence."""

    def gather_tokens(self, x_SD: Tensor) -> Tensor:
        """All rows, on every rank; the gradient that comes back is the same on every rank."""

    def enter_tokens(self, x_SD: Tensor) -> Tensor:
        """All rows, as the input of column-linears."""

    def enter_text(self, x_SD: Tensor) -> Tensor:
        """Text rows, which every rank holds whole, as the input of column-linears."""

    def local_index(self, index_S: Tensor) -> Tensor:
        """The part of a per-token index that belongs to this rank's rows."""

    def on_token_rows(self, module: nn.Module) -> None:
        """Declare that a module's parameters are whole on every rank but see only this rank's rows."""

    def partition(self, parameter: nn.Parameter) -> tuple[int, int, int] | None:
        """(axis, rank, ranks) of a parameter that is split over ranks, None for one that is whole."""

    def attention(
        self,
        q_SHE: Tensor,
        k_SHE: Tensor,
        v_SHE: Tensor,
        q_offsets: tuple[int, ...],
        k_offsets: tuple[int, ...],
    ) -> Tensor:
        """Segment i of the queries attends to segment i of the keys."""

    def checkpoint(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """Call a function and recompute it in the backward pass instead of keeping its activations."""


class TorchOps:
    """One device, plain torch."""

    def column_linear(self, width_in: int, width_out: int) -> nn.Module:
        """A plain linear."""
        return nn.Linear(width_in, width_out)

    def row_linear(self, width_in: int, width_out: int) -> nn.Module:
        """A plain linear."""
        return nn.Linear(width_in, width_out)

    def norm_across_heads(self, width: int, eps: float) -> nn.Module:
        """A plain RMS norm."""
        return RMSNorm(width, eps)

    def local_heads(self, heads: int) -> int:
        """All of them."""
        return heads

    def shard_tokens(self, x_SD: Tensor) -> Tensor:
        """All rows."""
        return x_SD

    def gather_tokens(self, x_SD: Tensor) -> Tensor:
        """All rows."""
        return x_SD

    def enter_tokens(self, x_SD: Tensor) -> Tensor:
        """All rows."""
        return x_SD

    def enter_text(self, x_SD: Tensor) -> Tensor:
        """All rows."""
        return x_SD

    def local_index(self, index_S: Tensor) -> Tensor:
        """The whole index."""
        return index_S

    def on_token_rows(self, module: nn.Module) -> None:
        """Nothing to declare."""

    def partition(self, parameter: nn.Parameter) -> tuple[int, int, int] | None:
        """Every parameter is whole."""
        return None

    def attention(
        self,
        q_SHE: Tensor,
        k_SHE: Tensor,
        v_SHE: Tensor,
        q_offsets: tuple[int, ...],
        k_offsets: tuple[int, ...],
    ) -> Tensor:
        """See ``wan_model.attention``."""
        return packed_attention(q_SHE, k_SHE, v_SHE, q_offsets, k_offsets)

    def checkpoint(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        """torch's non-reentrant checkpoint; the model draws no random numbers, so none are saved."""
        result: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return result
