"""Bytes that a rank needs: what it holds between steps, and what a step adds. No torch and no Megatron.

The formulae are in PLANNING.md; tests compare them with what models on this machine really hold.
"""

import dataclasses
import functools
import math
from typing import Self

from wan_model.config import WanConfig
from wan_model.dit.recompute import Recompute
from wan_model.pack import PackLayout
from wan_model.weights.transformer import expected_shapes
from wan_train.model.layout import Layout, layers_of_stages, parameters_of_rank

FP32 = 4


@functools.cache
def parameters_of_stages(model: WanConfig, tensor: int, pipeline: int) -> tuple[int, ...]:
    """Parameters that a rank of each pipeline stage computes with."""
    layout = Layout(tensor * pipeline, tensor, pipeline=pipeline)
    return tuple(parameters_of_rank(_shapes(model), model.num_layers, layout, stage) for stage in range(pipeline))


def parameters_of_model(model: WanConfig) -> int:
    """All of them."""
    return sum(math.prod(shape) for shape in _shapes(model).values())


@functools.cache
def _shapes(model: WanConfig) -> dict[str, tuple[int, ...]]:
    return expected_shapes(model)


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds between two steps, without activations.

    Megatron keeps gradients in one buffer of the reduction's precision, and of the optimizer's state a data-parallel
    rank holds its share: two moments in fp32 and, where the weights are bf16, a copy of them in fp32.

    Attributes:
        weights, gradients, optimizer: bytes of a rank.
        average: of the weights' moving average.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float

    @classmethod
    def of(cls, parameters: int, layout: Layout, *, bf16: bool, fp32_gradients: bool = True, ema: bool = False) -> Self:
        """Of a rank that computes with that many parameters."""
        sharing = layout.data * layout.context
        held = sharing if layout.fully_sharded else 1
        return cls(
            weights=parameters * (2 if bf16 else 4) / held,
            gradients=parameters * (4 if fp32_gradients or not bf16 else 2) / held,
            optimizer=parameters * (12 if bf16 else 8) / sharing,
            average=parameters * 4 / sharing if ema else 0.0,
        )

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.average


@dataclasses.dataclass(frozen=True)
class ActivationBytes:
    """Bytes that the forward pass of one pack leaves for its backward pass on a rank of one pipeline stage.

    Attributes:
        block: what one block keeps when nothing is computed again.
        block_input: what is kept of a block that is computed again.
        attention: the results of its self-attention.
        ends: what is kept outside the blocks on any stage.
        head: what the last stage keeps besides, for the last norm and the velocity.
        rows: what travels between stages.
        transient: the most that the backward pass needs besides, at any time.
    """

    block: float
    block_input: float
    attention: float
    ends: float
    head: float
    rows: float
    transient: float

    @classmethod
    def of(cls, model: WanConfig, layout: Layout, pack: PackLayout, *, bf16: bool) -> Self:
        """Of a pack; padding counts like tokens."""
        size = 2 if bf16 else FP32
        samples, h = pack.num_samples, model.hidden_size
        entered = pack.total / layout.context  # rows between entering a parallel region and leaving it
        held = entered / (layout.tensor if layout.sequence else 1)  # and elsewhere
        texts = samples * model.text_length
        part, ffn, heads = h / layout.tensor, model.ffn_dim / layout.tensor, model.num_heads / layout.tensor

        # Attention of several samples is joined, and rows come back to the ranks that share the context: copies.
        copies = (samples > 1) + (layout.context > 1)
        attention = entered * (part * size + heads * FP32)
        block = (
            4 * held * h * size  # inputs of both modulated norms, and both gated updates
            + held * h * FP32  # the input of the norm with weights, which is computed in fp32
            + 3 * entered * h * size  # inputs of the projections
            + (3 * entered + texts) * part * FP32  # inputs of the norms of queries and keys
            + (3 + copies)
            * entered
            * part
            * size  # self-attention's queries, keys and values, and copies of its result
            + (1 + (samples > 1)) * entered * part * size  # cross-attention's queries, and the copy of its result
            + 2 * texts * part * size  # its keys and values
            + 2 * attention  # the results of both attentions
            + 2 * entered * ffn * size  # before and behind the activation
            + (6 * held + 3 * entered + texts) * FP32  # statistics of the norms
            + samples * 8 * h * FP32  # modulation
        )
        if layout.tensor > 1:  # a norm that several ranks share keeps what its weight multiplies
            block += (3 * entered + texts) * part * FP32
        ends = (
            held * h * size  # the last block's result
            + pack.total * model.token_in * 3 * FP32  # noise, clean and noisy tokens
            + texts * (model.text_dim + 3 * h) * size  # the text embedder
            + samples * 8 * h * FP32  # the timestep's
            + entered * model.head_dim * FP32  # the rotary table
        )
        rows = held * h * size
        head = rows + pack.total * model.token_out * FP32  # the last norm's result, the velocity
        return cls(block, rows, attention, ends, head, rows, max(2 * held * h, entered * ffn) * size)

    def kept(self, recompute: Recompute, layers: int, *, last: bool = True) -> float:
        """Between the two passes of one pack, with that many layers; of the last stage or another."""
        of_layer = {
            "none": self.block,
            "block": self.block_input,
            "all_but_attention": self.block_input + self.attention,
        }[recompute]
        return layers * of_layer + self.ends + (self.head if last else 0.0)

    def peak(
        self, recompute: Recompute, layers: int, in_flight: int = 1, *, last: bool = True, piped: bool = False
    ) -> float:
        """The most at any time, with so many packs between their passes; of a stage among several, if ``piped``."""
        again = {
            "none": 0.0,
            "block": self.block - self.block_input,
            "all_but_attention": self.block - self.block_input - self.attention,
        }[recompute]
        # One pack's rows arrive, and another's leave, while a third is computed.
        travelling = 2 * self.rows if piped else 0.0
        return in_flight * self.kept(recompute, layers, last=last) + again + self.transient + travelling


@dataclasses.dataclass(frozen=True)
class RankBytes:
    """What the fullest rank needs.

    Attributes:
        parameters: that it computes with.
        state: between steps.
        activations: at the most.
        gathered: with fully sharded weights, those of the blocks at work.
    """

    parameters: int
    state: StateBytes
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        """All of it; what the driver and the communication library take comes on top."""
        return self.state.total + self.activations + self.gathered


def rank_bytes(
    model: WanConfig,
    layout: Layout,
    pack: PackLayout,
    recompute: Recompute,
    *,
    packs: int,
    bf16: bool = True,
    fp32_gradients: bool = True,
    ema: bool = False,
) -> RankBytes:
    """Of the rank that needs most.

    Args:
        model: sizes.
        layout: of the run.
        pack: the largest one, padded for the layout.
        recompute: what is computed again.
        packs: of a data-parallel rank in a step.
        bf16: whether weights and activations are; fp32 otherwise.
        fp32_gradients: whether gradients are summed in fp32.
        ema: whether an average of the weights is kept.
    """
    activations = ActivationBytes.of(model, layout, pack, bf16=bf16)
    found = []
    of_stages = parameters_of_stages(model, layout.tensor, layout.pipeline)
    layers_of = layers_of_stages(model.num_layers, layout.pipeline)
    for stage, (layers, parameters) in enumerate(zip(layers_of, of_stages, strict=True)):
        state = StateBytes.of(parameters, layout, bf16=bf16, fp32_gradients=fp32_gradients, ema=ema)
        # One-forward-one-backward: the first stage has as many packs under way as there are stages.
        in_flight = min(layout.pipeline - stage, packs)
        gathered = 0.0
        if layout.fully_sharded:  # the block at work and the next one, and a block's gradients
            gathered = parameters / model.num_layers * (2 * (2 if bf16 else FP32) + FP32)
        peak = activations.peak(
            recompute, layers, in_flight, last=stage == layout.pipeline - 1, piped=layout.pipeline > 1
        )
        found.append(RankBytes(parameters, state, peak, gathered))
    return max(found, key=lambda rank: rank.total)
