"""Memory of a rank: model state and activations. Imports no Megatron.

The formulae are in PLANNING.md; tests compare them with the tensors of real runs.
"""

import dataclasses
import functools
import math
from typing import Self

from wan_model.config import WanConfig
from wan_model.dit.attention import equal_segments
from wan_model.dit.lora import LINEARS, LoraSettings, adapter_shapes
from wan_model.dit.recompute import Recompute
from wan_model.pack import PackLayout
from wan_model.weights.transformer import expected_shapes
from wan_train.model.layout import Layout, layers_of_stages, parameters_of_rank
from wan_train.planning.linear_inputs import FP32, TrainedLinears


@functools.cache
def parameters_of_stages(model: WanConfig, tensor: int, pipeline: int) -> tuple[int, ...]:
    """Number of parameters of a rank of each pipeline stage."""
    return _of_stages(_shapes(model), model, tensor, pipeline)


@functools.cache
def _parameters_of_blocks(model: WanConfig, tensor: int, pipeline: int, endings: tuple[str, ...]) -> tuple[int, ...]:
    """Of a rank of each stage: the parameters of the blocks whose keys end so."""
    shapes = {key: shape for key, shape in _shapes(model).items() if key[:7] == "blocks." and key.endswith(endings)}
    return _of_stages(shapes, model, tensor, pipeline)


def _of_stages(shapes: dict[str, tuple[int, ...]], model: WanConfig, tensor: int, pipeline: int) -> tuple[int, ...]:
    layout = Layout(tensor * pipeline, tensor, pipeline=pipeline)
    return tuple(parameters_of_rank(shapes, model.num_layers, layout, stage) for stage in range(pipeline))


def parameters_of_model(model: WanConfig) -> int:
    """Number of parameters of the model."""
    return sum(math.prod(shape) for shape in _shapes(model).values())


@functools.cache
def adapter_parameters_of_stages(model: WanConfig, lora: LoraSettings, tensor: int, pipeline: int) -> tuple[int, ...]:
    """Number of parameters of a rank's adapters, of each pipeline stage."""
    return _of_stages(dict[str, tuple[int, ...]](adapter_shapes(model, lora)), model, tensor, pipeline)


def adapter_parameters_of_model(model: WanConfig, lora: LoraSettings) -> int:
    """Number of parameters of all adapters."""
    return sum(math.prod(shape) for shape in adapter_shapes(model, lora).values())


@functools.cache
def _shapes(model: WanConfig) -> dict[str, tuple[int, ...]]:
    return expected_shapes(model)


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of model state of a rank: everything that persists between steps.

    Megatron keeps gradients in one buffer of the reduction's precision. The optimizer state is sharded over the
    data-parallel ranks: two moments in fp32 and, for bf16 weights, a copy of them in fp32. Frozen weights have neither.
    FSDP keeps that copy of adapters too, which are fp32 already.

    Attributes:
        weights, gradients, optimizer: bytes of a rank.
        average: bytes of the EMA.
    """

    weights: float
    gradients: float
    optimizer: float
    average: float

    @classmethod
    def of(
        cls,
        parameters: int,
        layout: Layout,
        *,
        bf16: bool,
        fp32_gradients: bool = True,
        ema: bool = False,
        adapters: int | None = None,
        frozen: float | None = None,
    ) -> Self:
        """Of a rank with that many parameters; they are frozen if those of adapters are given, which are fp32.

        ``frozen`` is the bytes of frozen weights that are not all on the device in their precision.
        """
        replicas = layout.data * layout.context
        shards = replicas if layout.fully_sharded else 1
        weights = parameters * (2 if bf16 else FP32)
        if adapters is not None:
            of_base = weights if frozen is None else frozen
            return cls(
                weights=(of_base + adapters * FP32) / shards,
                gradients=adapters * FP32 / shards,
                optimizer=adapters * (12 if layout.fully_sharded else 8) / replicas,
                average=adapters * FP32 / replicas if ema else 0.0,
            )
        return cls(
            weights=weights / shards,
            gradients=parameters * (4 if fp32_gradients or not bf16 else 2) / shards,
            optimizer=parameters * (12 if bf16 else 8) / replicas,
            average=parameters * 4 / replicas if ema else 0.0,
        )

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.average


@dataclasses.dataclass(frozen=True)
class ActivationBytes:
    """Bytes that the forward pass of one pack saves for its backward pass on a rank of one pipeline stage.

    Attributes:
        block: saved by one block without recomputation.
        block_input: saved by a recomputed block.
        attention: output of its self-attention.
        products: outputs of its matrix products and of both attentions.
        ends: saved outside the blocks on any stage.
        head: saved additionally by the last stage, for the last norm and the velocity.
        rows: sent between stages.
        transient: temporary peak of the backward pass.
        absent: not saved by the first block of the model, whose input has no gradient if what makes it is frozen.
    """

    block: float
    block_input: float
    attention: float
    products: float
    ends: float
    head: float
    rows: float
    transient: float
    absent: float = 0.0

    @classmethod
    def of(
        cls,
        model: WanConfig,
        layout: Layout,
        pack: PackLayout,
        *,
        bf16: bool,
        kernels: bool = True,
        lora: LoraSettings | None = None,
    ) -> Self:
        """Of a pack, padding included.

        Args:
            model: sizes.
            layout: of the run.
            pack: padded for the layout.
            bf16: activations in bf16; fp32 otherwise.
            kernels: with the kernels of ``wan_model.kernels``, as on CUDA; if not, in fp32 only.
            lora: adapters that are trained on frozen weights; None if all weights are trained.
        """
        assert kernels or not bf16, "torch's operations keep copies in fp32, which are not counted"
        size = 2 if bf16 else FP32
        samples, h = pack.num_samples, model.hidden_size
        entered = pack.total / layout.context  # rows inside a tensor-parallel region
        held = entered / (layout.tensor if layout.sequence else 1)  # rows elsewhere
        texts = samples * model.text_length
        part, ffn, heads = h / layout.tensor, model.ffn_dim / layout.tensor, model.num_heads / layout.tensor

        # Copies: the outputs of several launches and the zeros of padding are concatenated; context ranks receive rows.
        concatenated = len(equal_segments(pack.offsets, pack.offsets)) > 1 or pack.padding > 0
        copies = concatenated + (layout.context > 1)
        attention = entered * (part * size + heads * FP32)
        block = (
            3 * held * h * size  # inputs of the three norms of rows
            + 3 * entered * part * size  # inputs of the norms of queries and of the tokens' keys
            + 4 * entered * part * size  # self-attention's queries, keys and values, cross-attention's queries
            + 2 * texts * part * size  # its keys and values
            + 2 * attention  # outputs of both attentions
            + entered * ffn * size  # input of the activation
            + samples * 6 * h * FP32  # modulation
        )
        trained = TrainedLinears.of(model, layout, pack, lora, size)
        block += trained.inputs(own_copies={"attn1.to_out.0": copies, "attn2.to_out.0": int(concatenated)})
        if lora is None:
            block += 2 * held * h * size  # both gated updates
        if trained.texts_have_keys:
            block += texts * part * size  # input of the norm of the text's keys
        # The kernels compute the statistics of norms again, except those of which each rank has a part.
        if not kernels:
            block += (6 * held + 3 * entered + texts) * FP32 + samples * 2 * h * FP32  # statistics; 1 + scale
        if layout.tensor > 1:  # sums of squares; normalised values, for the gradients of weights
            block += (3 * entered + texts) * (1 if kernels or lora is not None else part) * FP32
        products = (
            (4 * entered + 2 * texts) * part * size  # queries, keys and values of both attentions
            + 3 * entered * h * size  # the two projections of attended values, and the feed-forward output
            + entered * ffn * size
            + 2 * attention
        )
        ends = (
            held * h * size  # the last block's output
            + pack.total * model.token_in * 2 * FP32  # noisy tokens and target
            + texts * (model.text_dim + (3 if lora is None else 1) * h) * size  # the text embedder
            + samples * 8 * h * FP32  # the timestep's
            + entered * model.head_dim * FP32  # the rotary table
        )
        rows = held * h * size
        # Velocity, and the output of the last norm.
        head = pack.total * model.token_out * FP32 + (rows if lora is None else 0.0)
        transient = max(2 * held * h, entered * ffn) * size
        absent = 0.0 if lora is None else rows + trained.first_masks()
        return cls(block, rows, attention, products, ends, head, rows, transient, absent)

    def _kept_by_block(self, recompute: Recompute) -> float:
        return {
            "none": self.block,
            "elementwise": self.block_input + self.products,
            "all_but_attention": self.block_input + self.attention,
            "block": self.block_input,
        }[recompute]

    def kept(self, recompute: Recompute, layers: int, *, first: bool = True, last: bool = True) -> float:
        """Saved between the two passes of one pack, with that many layers; on the first stage, the last or another."""
        absent = self.absent if first and recompute == "none" else 0.0
        return layers * self._kept_by_block(recompute) - absent + self.ends + (self.head if last else 0.0)

    def peak(
        self,
        recompute: Recompute,
        layers: int,
        in_flight: int = 1,
        *,
        first: bool = True,
        last: bool = True,
        piped: bool = False,
    ) -> float:
        """Peak with ``in_flight`` packs between their passes; ``piped``: with several pipeline stages."""
        recomputed = max(0.0, self.block - self._kept_by_block(recompute))
        # One pack's rows are received and another's sent while a third is computed.
        transferred = 2 * self.rows if piped else 0.0
        kept = self.kept(recompute, layers, first=first, last=last)
        return in_flight * kept + recomputed + self.transient + transferred


@dataclasses.dataclass(frozen=True)
class RankBytes:
    """Memory of the rank that needs most.

    Attributes:
        parameters: number of its parameters, without adapters.
        adapters: number of parameters of its adapters.
        state: model state.
        activations: peak.
        gathered: with FSDP, the gathered weights and gradients of blocks.
    """

    parameters: int
    adapters: int
    state: StateBytes
    activations: float
    gathered: float

    @property
    def total(self) -> float:
        """Sum of all parts, without the driver and communication buffers."""
        return self.state.total + self.activations + self.gathered


def frozen_bytes(model: WanConfig, layout: Layout, stage: int, size: int, *, fp8: bool, offload: bool) -> float:
    """Bytes on the device of the frozen weights of a rank of a pipeline stage, without sharding.

    Args:
        model: sizes.
        layout: of the run.
        stage: the pipeline stage.
        size: bytes of a weight in the precision of the run.
        fp8: whether the weights of the blocks' linears take a byte, and each of their rows a scale in fp32.
        offload: whether the blocks are in main memory, but for the one that computes and the one that follows.
    """

    every = parameters_of_stages(model, layout.tensor, layout.pipeline)[stage]
    blocks, linears, rows = (
        _parameters_of_blocks(model, layout.tensor, layout.pipeline, endings)[stage]
        for endings in (("",), *(tuple(f".{name}.{kind}" for name in LINEARS) for kind in ("weight", "bias")))
    )
    of_blocks = float(blocks * size)
    if fp8:
        of_blocks += linears * (1 - size) + rows * FP32
    if offload:
        of_blocks *= min(1.0, 2 / layers_of_stages(model.num_layers, layout.pipeline)[stage])
    return (every - blocks) * size + of_blocks


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
    lora: LoraSettings | None = None,
    fp8_base: bool = False,
    offload_base: bool = False,
) -> RankBytes:
    """Memory of the rank that needs most.

    Args:
        model: sizes.
        layout: of the run.
        pack: the largest one, padded for the layout.
        recompute: activation recomputation.
        packs: packs per data-parallel rank and step.
        bf16: weights and activations in bf16; fp32 otherwise.
        fp32_gradients: whether gradients are accumulated in fp32.
        ema: whether an EMA is kept.
        lora: adapters that are trained on frozen weights; None if all weights are trained.
        fp8_base, offload_base: see ``wan_train.config.lora``.
    """
    activations = ActivationBytes.of(model, layout, pack, bf16=bf16, lora=lora)
    found = []
    of_stages = parameters_of_stages(model, layout.tensor, layout.pipeline)
    adapters_of: tuple[int | None, ...] = (None,) * layout.pipeline
    if lora is not None:
        adapters_of = adapter_parameters_of_stages(model, lora, layout.tensor, layout.pipeline)
    layers_of = layers_of_stages(model.num_layers, layout.pipeline)
    for stage, (layers, parameters, adapters) in enumerate(zip(layers_of, of_stages, adapters_of, strict=True)):
        state = StateBytes.of(
            parameters, layout, bf16=bf16, fp32_gradients=fp32_gradients, ema=ema, adapters=adapters,
            frozen=frozen_bytes(model, layout, stage, 2 if bf16 else FP32, fp8=fp8_base, offload=offload_base),
        )  # fmt: skip
        # One-forward-one-backward: the first stage has as many packs in flight as there are stages.
        in_flight = min(layout.pipeline - stage, packs)
        gathered = 0.0
        if layout.fully_sharded:  # the current block and the next one, and the gradients of one
            weights = parameters * (2 if bf16 else FP32) + (adapters or 0) * FP32
            trained = parameters if adapters is None else adapters
            gathered = (2 * weights + trained * FP32) / model.num_layers
        peak = activations.peak(
            recompute, layers, in_flight, first=stage == 0, last=stage == layout.pipeline - 1, piped=layout.pipeline > 1
        )
        found.append(RankBytes(parameters, adapters or 0, state, peak, gathered))
    return max(found, key=lambda rank: rank.total)
