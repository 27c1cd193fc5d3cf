"""The interface between the transformer and its runtime, which implements all parallelism.

Shapes: S tokens, D width, H heads on this rank, E head width.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from wan_model.dit.attention import AttentionKind, Offsets, check_kind, packed_attention
from wan_model.dit.context_parallel import ContextParallel
from wan_model.dit.elementwise import rms_norm_
from wan_model.dit.lora import AdaptableLinear, LoraMatrix
from wan_model.dit.recompute import Recompute, recomputed, self_attention_region
from wan_model.pack import PackLayout, TokenRows


class Linear(AdaptableLinear, nn.Linear):
    """A linear without initialisation: torch's takes time and draws from the global generator."""

    def reset_parameters(self) -> None:
        """No-op; see ``wan_model.init_weights``."""

    def forward(self, x: Tensor) -> Tensor:
        """[S, in] -> [S, out]."""
        return self.with_adapter(self.product(x, self.bias), x)


class RMSNorm(nn.Module):
    """RMS norm over the full width, statistics in fp32, with the rotary embedding that follows it.

    A runtime that shards the width overrides ``forward``.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_SD: Tensor, table_S1P: Tensor | None = None) -> Tensor:
        """Normalise the last axis, then rotate each head if a table (``wan_model.dit.rope``) is given.

        Without gradients the input is overwritten, so it must not be used afterwards.
        """
        return rms_norm_(x_SD, self.weight, self.eps, table_S1P)


@runtime_checkable
class Ops(Protocol):
    """A runtime. ``TorchOps`` is the one for plain torch; wan-train implements one for Megatron.

    Between ``shard_tokens`` and ``gather_tokens`` a rank holds only some rows of the token sequence (``held_rows``).
    ``project_tokens`` returns the rows of attention and of the wide part of the feed-forward (``entered_rows``), of
    which the rank may have only some heads or columns; ``row_linear`` returns the held rows.
    """

    def column_linear(self, width_in: int, width_out: int) -> nn.Module:
        """A linear with bias whose output is split over ranks."""

    def row_linear(self, width_in: int, width_out: int) -> nn.Module:
        """A linear with bias whose input is split over ranks; its output is this rank's rows at full width."""

    def add_adapter(self, linear: nn.Module, rank: int) -> None:
        """Give a linear of this runtime ``lora_A`` and ``lora_B`` (see ``wan_model.dit.lora``)."""

    def input_columns(self, linear: nn.Module) -> tuple[int, int, int]:
        """(first, end, all) of the columns of a linear's input that this rank has."""

    def norm_across_heads(self, width: int, eps: float) -> nn.Module:
        """RMS norm over the full width, applied to a column-linear's output."""

    def local_heads(self, heads: int) -> int:
        """Heads on this rank."""

    def shard_tokens(self, x_SD: Tensor) -> Tensor:
        """This rank's rows of the sequence."""

    def gather_tokens(self, x_SD: Tensor) -> Tensor:
        """All rows, on every rank; the incoming gradient is the same on every rank."""

    def project_tokens(self, x_SD: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """Column-linears that all read the held rows: the entered rows of each."""

    def project_text(self, x_TD: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """Column-linears that all read the rows of texts, which every rank has."""

    def held_rows(self, layout: PackLayout) -> TokenRows:
        """The rows that this rank holds after ``shard_tokens``.

        Raises:
            ValueError: the pack's tokens cannot be divided evenly.
        """

    def entered_rows(self, layout: PackLayout) -> TokenRows:
        """The rows that ``project_tokens`` returns."""

    def on_token_rows(self, module: nn.Module) -> None:
        """Declare that a module's parameters are replicated, with gradients only from this rank's rows."""

    def partition(self, parameter: nn.Parameter) -> tuple[int, int, int] | None:
        """(axis, rank, ranks) of a parameter that is split over ranks; None for a replicated one."""

    def self_attention(self, q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, offsets: Offsets) -> Tensor:
        """Each sample attends to itself; entered rows in and out, ``offsets`` of the samples in the whole pack."""

    def cross_attention(
        self, q_SHE: Tensor, k_KHE: Tensor, v_KHE: Tensor, q_offsets: Offsets, k_offsets: Offsets
    ) -> Tensor:
        """Each sample attends to its own text; entered rows in and out, ``q_offsets`` as above."""

    def checkpoint(self, function: Callable[..., Tensor], *args: object, mode: Recompute) -> Tensor:
        """Call a function with activation checkpointing in a mode of ``wan_model.dit.recompute``."""


class TorchOps:
    """Plain torch, on one device or with context parallelism.

    Args:
        attention: see ``wan_model.dit.attention``.
        context: the context-parallel group; None for one device.

    Raises:
        ValueError: the attention kind is unknown.
    """

    def __init__(self, attention: AttentionKind = "auto", context: ContextParallel | None = None) -> None:
        check_kind(attention)
        self.kind = attention
        self.context = context

    def column_linear(self, width_in: int, width_out: int) -> nn.Module:
        """A plain linear."""
        return Linear(width_in, width_out)

    def row_linear(self, width_in: int, width_out: int) -> nn.Module:
        """A plain linear."""
        return Linear(width_in, width_out)

    def add_adapter(self, linear: nn.Module, rank: int) -> None:
        """Whole matrices."""
        assert isinstance(linear, Linear)
        with torch.device(linear.weight.device):
            linear.lora_A, linear.lora_B = LoraMatrix(rank, linear.in_features), LoraMatrix(linear.out_features, rank)

    def input_columns(self, linear: nn.Module) -> tuple[int, int, int]:
        """All of them."""
        assert isinstance(linear, Linear)
        return 0, linear.in_features, linear.in_features

    def norm_across_heads(self, width: int, eps: float) -> nn.Module:
        """A plain RMS norm."""
        return RMSNorm(width, eps)

    def local_heads(self, heads: int) -> int:
        """All heads."""
        return heads

    def shard_tokens(self, x_SD: Tensor) -> Tensor:
        """This rank's share of the context."""
        return self.context.shard_rows(x_SD) if self.context else x_SD

    def gather_tokens(self, x_SD: Tensor) -> Tensor:
        """All rows."""
        return self.context.gather_rows(x_SD) if self.context else x_SD

    def project_tokens(self, x_SD: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """One after the other."""
        return tuple(linear(x_SD) for linear in linears)

    def project_text(self, x_TD: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
        """One after the other."""
        return tuple(linear(x_TD) for linear in linears)

    def held_rows(self, layout: PackLayout) -> TokenRows:
        """This rank's share of the context."""
        return self.entered_rows(layout)

    def entered_rows(self, layout: PackLayout) -> TokenRows:
        """This rank's share of the context."""
        rows = TokenRows.whole(layout)
        return rows.part(self.context.rank, self.context.ranks) if self.context else rows

    def on_token_rows(self, module: nn.Module) -> None:
        """No-op."""

    def partition(self, parameter: nn.Parameter) -> tuple[int, int, int] | None:
        """None: no parameter is split."""
        return None

    def self_attention(self, q_SHE: Tensor, k_SHE: Tensor, v_SHE: Tensor, offsets: Offsets) -> Tensor:
        """See ``wan_model.dit.attention`` and ``wan_model.dit.context_parallel``."""
        with self_attention_region():
            if self.context:
                return self.context.self_attention(q_SHE, k_SHE, v_SHE, offsets, self.attend)
            return self.attend(q_SHE, k_SHE, v_SHE, offsets, offsets)

    def cross_attention(
        self, q_SHE: Tensor, k_KHE: Tensor, v_KHE: Tensor, q_offsets: Offsets, k_offsets: Offsets
    ) -> Tensor:
        """See ``wan_model.dit.attention`` and ``wan_model.dit.context_parallel``."""
        if self.context:
            return self.context.cross_attention(q_SHE, k_KHE, v_KHE, q_offsets, k_offsets, self.attend)
        return self.attend(q_SHE, k_KHE, v_KHE, q_offsets, k_offsets)

    def attend(self, q_SHE: Tensor, k_KHE: Tensor, v_KHE: Tensor, q_offsets: Offsets, k_offsets: Offsets) -> Tensor:
        """Packed attention on this device; a subclass with another kernel overrides it."""
        return packed_attention(q_SHE, k_KHE, v_KHE, q_offsets, k_offsets, self.kind)

    def checkpoint(self, function: Callable[..., Tensor], *args: object, mode: Recompute) -> Tensor:
        """See ``wan_model.dit.recompute``."""
        return recomputed(function, *args, mode=mode)
