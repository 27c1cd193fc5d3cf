"""Context parallelism: the tokens of one pack on several processes, in plain ``torch.distributed``.

A rank holds an equal, contiguous share of the pack's rows, independent of the samples' boundaries. Self-attention
exchanges rows for heads by an all-to-all, as in DeepSpeed-Ulysses: each rank attends over the whole pack with its share
of the heads, and a second all-to-all restores the rows. If the number of ranks does not divide the heads, keys and
values are gathered and each rank attends with its own rows.
Text is never sharded: each rank's rows attend to the whole texts of their samples.

Gradients: every rank computes the same loss from the gathered output, and each weight's gradient on a rank is the part
that comes from the rank's rows. The gradient is the sum over ranks.

Legend: S all rows, R rows of this rank (S / ranks), H heads, E head width, K text rows.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from wan_model.dit.attention import Offsets

# Attention of packed rows: queries, keys, values, and the offsets of the samples' queries and keys.
Attend = Callable[[Tensor, Tensor, Tensor, Offsets, Offsets], Tensor]
# torch 2.13 renamed these functions and warns about the old names, which are the only ones in earlier versions.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Exchange(torch.autograd.Function):
    """All-to-all of [ranks, ...]: part i is sent to rank i, part i of the result is from rank i; its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(x.contiguous(), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad.contiguous(), ctx.group), None


class _GatherRows(torch.autograd.Function):
    """All-gather [R, ...] -> [S, ...]; the backward is a reduce-scatter, or takes this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: "ContextParallel", sum_gradients: bool) -> Tensor:
        ctx.context, ctx.sum_gradients = context, sum_gradients
        out = x.new_empty(x.shape[0] * context.ranks, *x.shape[1:])
        all_gather_single(out, x.contiguous(), group=context.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        context = ctx.context
        if not ctx.sum_gradients:
            return context.shard_rows(grad).contiguous(), None, None
        out = grad.new_empty(grad.shape[0] // context.ranks, *grad.shape[1:])
        reduce_scatter_single(out, grad.contiguous(), group=context.group)
        return out, None, None


class ContextParallel:
    """The ranks that share one pack's tokens.

    Args:
        group: a process group; None for all processes.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group if group is not None else dist.group.WORLD
        self.ranks: int = dist.get_world_size(self.group)
        self.rank: int = dist.get_rank(self.group)

    def shard_rows(self, x: Tensor) -> Tensor:
        """This rank's rows of a tensor that is replicated on every rank.

        Raises:
            ValueError: the rows cannot be divided evenly.
        """
        if x.shape[0] % self.ranks:
            raise ValueError(
                f"{x.shape[0]} tokens cannot be shared evenly by {self.ranks} context-parallel ranks; "
                "pad the pack to a multiple (pack_latents has multiple, PackLayout has padded_to)"
            )
        return x.chunk(self.ranks)[self.rank]

    def gather_rows(self, x: Tensor) -> Tensor:
        """All rows on every rank; each must compute the same loss from them."""
        whole: Tensor = _GatherRows.apply(x, self, False)
        return whole

    def self_attention(self, q_RHE: Tensor, k_RHE: Tensor, v_RHE: Tensor, offsets: Offsets, attend: Attend) -> Tensor:
        """Self-attention of all samples of the pack; input and output are this rank's rows.

        Args:
            q_RHE, k_RHE, v_RHE: this rank's rows, all heads.
            offsets: of the samples in the whole pack.
            attend: on one device.
        """
        if q_RHE.shape[1] % self.ranks:
            both = _GatherRows.apply(torch.stack((k_RHE, v_RHE), dim=1), self, True)
            k_SHE, v_SHE = both.unbind(dim=1)
            return self.cross_attention(q_RHE, k_SHE, v_SHE, offsets, offsets, attend)
        # One exchange for queries, keys and values.
        mine = rearrange(
            torch.stack((q_RHE, k_RHE, v_RHE)), "three r (ranks h) e -> ranks three r h e", ranks=self.ranks
        )
        q_SHE, k_SHE, v_SHE = rearrange(
            _Exchange.apply(mine, self.group), "ranks three r h e -> three (ranks r) h e"
        ).unbind(0)
        out = attend(q_SHE, k_SHE, v_SHE, offsets, offsets)
        back = _Exchange.apply(rearrange(out, "(ranks r) h e -> ranks r h e", ranks=self.ranks), self.group)
        return rearrange(back, "ranks r h e -> r (ranks h) e")

    def cross_attention(
        self,
        q_RHE: Tensor,
        k_KHE: Tensor,
        v_KHE: Tensor,
        q_offsets: Offsets,
        k_offsets: Offsets,
        attend: Attend,
    ) -> Tensor:
        """Cross-attention of this rank's rows to their samples' texts, which are replicated on every rank.

        Args:
            q_RHE: this rank's rows.
            k_KHE, v_KHE: all texts.
            q_offsets, k_offsets: of the samples in the whole pack, and of their texts.
            attend: on one device.
        """
        # Only samples with rows on this rank count; they are contiguous, and so are their keys.
        rows = q_RHE.shape[0]
        cut = [min(max(offset - self.rank * rows, 0), rows) for offset in q_offsets]
        here = [i for i, (start, stop) in enumerate(itertools.pairwise(cut)) if start < stop]
        first, end = (here[0], here[-1] + 1) if here else (0, 1)
        keys = slice(k_offsets[first], k_offsets[end])
        mine = tuple(cut[first : end + 1])
        theirs = tuple(offset - keys.start for offset in k_offsets[first : end + 1])
        return attend(q_RHE, k_KHE[keys], v_KHE[keys], mine, theirs)
