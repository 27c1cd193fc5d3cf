"""Estimated time of a training step, from its operations and bytes. Imports no Megatron.

The formulae are in PLANNING.md. The times of sequential parts are added; the communication of gradients and weights
overlaps with the computation of blocks.
"""

import dataclasses
from typing import Self

from wan_model.config import WanConfig
from wan_model.dit.flops import pack_flops
from wan_model.dit.recompute import Recompute
from wan_model.pack import PackLayout
from wan_train.model.layout import Layout, layers_of_stages
from wan_train.planning.hardware import Hardware
from wan_train.planning.memory import parameters_of_stages

BF16, FP32 = 2, 4


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest rank, by part.

    Attributes:
        matmul: matrix products, including recomputation.
        attention: scores and weighted sums, including recomputation.
        elementwise: norms, gates and activations, by memory bandwidth.
        tensor: all-gathers and reduce-scatters of tensor parallelism that computation does not hide.
        context: all-to-alls of context parallelism.
        pipeline: sends between stages, and the pipeline bubble.
        data: gradient reduction and weight gathering that computation does not hide.
        optimizer: reading and writing its state.
        needed: required operations of all packs, of the whole run.
        world: number of GPUs.
    """

    matmul: float
    attention: float
    elementwise: float
    tensor: float
    context: float
    pipeline: float
    data: float
    optimizer: float
    needed: float
    world: int

    @property
    def total(self) -> float:
        """Seconds."""
        return (
            self.matmul + self.attention + self.elementwise + self.tensor + self.context + self.pipeline + self.data
            + self.optimizer
        )  # fmt: skip

    @property
    def rate(self) -> float:
        """Operations per second and GPU, recomputation not counted."""
        return self.needed / self.total / self.world

    @classmethod
    def of(
        cls,
        model: WanConfig,
        layout: Layout,
        pack: PackLayout,
        recompute: Recompute,
        hardware: Hardware,
        *,
        packs: int,
    ) -> Self:
        """Of a step on equal packs.

        Args:
            model: sizes.
            layout: of the run.
            pack: padded for the layout.
            recompute: what is computed again.
            hardware: of every GPU.
            packs: packs per data-parallel rank.
        """
        share = packs * max(layers_of_stages(model.num_layers, layout.pipeline)) / model.num_layers
        split = layout.tensor * layout.context
        flops = pack_flops(model, pack)
        speed = hardware.efficiency

        again = 0 if recompute == "none" else 1
        # The embedding and the head belong to one stage each, and are small.
        recomputes_products = recompute in ("block", "all_but_attention")
        products = share * (flops.block_linears * (3 + recomputes_products) + 3 * flops.ends) / split
        matmul = products / (hardware.matmul * speed)
        scores = share * (flops.self_attention * (recompute == "block") + flops.cross_attention * recomputes_products)
        once = share * (flops.self_attention + flops.cross_attention)
        attention = (
            (once + scores) / hardware.attention_forward + 2 * once / hardware.attention_backward
        ) / split / speed  # fmt: skip

        rows = _Rows.of(model, layout, pack)
        elementwise = share * model.num_layers * rows.touched * (3 + again) / (hardware.bandwidth * speed)
        passes = 2 + again
        ring = _ring(hardware, layout.tensor, 1)
        hidden = min(rows.tensor_sent_back / ring, rows.column_products / (hardware.matmul * speed))
        tensor = share * model.num_layers * (passes * rows.tensor_sent / ring - hidden)
        exchanged = share * model.num_layers * passes * rows.context_sent
        context = exchanged / _exchange(hardware, layout.context, layout.tensor)

        computing = matmul + attention + elementwise + tensor + context
        bubble = computing / packs * (layout.pipeline - 1)
        sent = 2 * packs * rows.stage_sent / (hardware.inter_node * speed) if layout.pipeline > 1 else 0.0
        parameters = max(parameters_of_stages(model, layout.tensor, layout.pipeline))
        return cls(
            matmul=matmul,
            attention=attention,
            elementwise=elementwise,
            tensor=tensor,
            context=context,
            pipeline=bubble + sent,
            data=_data(hardware, layout, parameters, packs, computing),
            # Moments and the fp32 weights read and written, gradients read, bf16 weights written.
            optimizer=parameters * 30 / (layout.data * layout.context) / (hardware.bandwidth * speed),
            needed=packs * layout.data * flops.training,
            world=layout.world,
        )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Bytes of one block's forward pass on a rank: memory traffic between matrix products, and communication.

    In the backward pass ``tensor_sent_back`` of ``tensor_sent`` travel while gradients of weights are computed, which
    take ``column_products`` operations.
    """

    touched: float
    tensor_sent: float
    tensor_sent_back: float
    column_products: float
    context_sent: float
    stage_sent: float

    @classmethod
    def of(cls, model: WanConfig, layout: Layout, pack: PackLayout) -> "_Rows":
        entered = pack.total / layout.context
        held = entered / (layout.tensor if layout.sequence else 1)
        h, part, ffn = model.hidden_size, model.hidden_size / layout.tensor, model.ffn_dim / layout.tensor
        # Two modulated norms (2 each), the norm with weights (2), two gates and a sum (3 each); three norms of queries
        # and keys (2 each) and two rotations (2 each); the activation (2).
        touched = (15 * held * h + 10 * entered * part + 2 * entered * ffn) * BF16
        others = (layout.tensor - 1) / layout.tensor
        # Three all-gathers and three reductions per block; an all-reduce is a reduce-scatter and an all-gather.
        collectives = 6
        tensor = collectives * others * entered * h * BF16
        back = tensor / 2 if layout.sequence else tensor  # three reduce-scatters of them, or three all-reduces
        products = 2 * entered * h * (4 * part + ffn)  # queries, keys and values, queries of the text, feed-forward
        context = 4 * entered * part * BF16 * (layout.context - 1) / layout.context
        return cls(touched, tensor, back, products, context, held * h * BF16)


def _inside(hardware: Hardware, ranks: int, stride: int) -> int:
    """Number of ranks of a group in one machine."""
    return max(1, min(ranks, hardware.gpus_per_node // stride))


def _ring(hardware: Hardware, ranks: int, stride: int) -> float:
    """Bandwidth of a ring of ranks; the ranks of a machine share their network cards."""
    inside = _inside(hardware, ranks, stride)
    slowest = hardware.intra_node if inside == ranks else min(hardware.intra_node, hardware.inter_node * inside)
    return slowest * hardware.efficiency


def _exchange(hardware: Hardware, ranks: int, stride: int) -> float:
    """Bandwidth of an all-to-all; each rank uses its own network card for ranks of other machines."""
    inside = _inside(hardware, ranks, stride)
    if inside == ranks:
        return hardware.intra_node * hardware.efficiency
    return hardware.inter_node * hardware.efficiency * (ranks - 1) / (ranks - inside)


def _data(hardware: Hardware, layout: Layout, parameters: int, packs: int, computing: float) -> float:
    ranks = layout.data * layout.context
    if ranks == 1:
        return 0.0
    bandwidth = _ring(hardware, ranks, layout.tensor)
    if layout.fully_sharded:
        # Weights twice and gradients once per pack, hidden by the pack's own computation.
        moved = packs * parameters * (2 * BF16 + FP32) * (ranks - 1) / ranks / bandwidth
        hidden = computing
    else:
        moved = parameters * (BF16 + FP32) * (ranks - 1) / ranks / bandwidth
        hidden = computing / packs  # the backward pass of the last pack and the forward pass of the first
    return max(0.0, moved - hidden)
