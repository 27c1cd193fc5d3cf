"""Parallel layouts and their validation. Imports no torch and no Megatron."""

import dataclasses
import math
from typing import Any, Self

from wan_model.config import WanConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the process groups.

    Attributes:
        world: number of processes.
        tensor, context, pipeline: sizes of the model-parallel groups; the data-parallel size follows.
        sequence: sequence parallelism: tensor-parallel ranks split the tokens outside their parallel regions.
        fully_sharded: whether the data-parallel ranks shard the weights (FSDP).
    """

    world: int
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    sequence: bool = False
    fully_sharded: bool = False

    @classmethod
    def of(cls, config: Any, world: int) -> Self:
        """The layout of a configuration."""
        model = config.model
        return cls(
            world,
            tensor=model.tensor_model_parallel_size,
            context=model.context_parallel_size,
            pipeline=model.pipeline_model_parallel_size,
            sequence=model.sequence_parallel,
            fully_sharded=config.dist.use_megatron_fsdp,
        )

    @property
    def replica(self) -> int:
        """Processes that share one pack: the model-parallel size."""
        return self.tensor * self.context * self.pipeline

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return self.world // self.replica

    @property
    def pad_multiple(self) -> int:
        """Packs are padded to a multiple of this many tokens."""
        return self.context * (self.tensor if self.sequence else 1)

    def check(self, model: WanConfig, *, packs: int, capacity: int) -> None:
        """Validate the layout.

        Args:
            model: sizes of the transformer.
            packs: packs per step, over all data-parallel ranks.
            capacity: tokens of a pack.

        Raises:
            ValueError: the layout is invalid; the message names the setting.
        """
        for name in ("world", "tensor", "context", "pipeline"):
            if getattr(self, name) < 1:
                raise ValueError(f"the {name} size is {getattr(self, name)}; it must be at least 1")
        if self.world % self.replica:
            raise ValueError(
                f"{self.world} processes cannot be laid out as tensor {self.tensor} x pipeline {self.pipeline} x "
                f"context {self.context}: their number must be a multiple of {self.replica} (--nproc-per-node, or "
                "--world-size of a dry run)"
            )
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "model.sequence_parallel is true and there is one tensor-parallel rank; set "
                "model.tensor_model_parallel_size, or leave it out"
            )
        if model.num_heads % self.tensor:
            raise ValueError(
                f"{model.num_heads} attention heads cannot be split over tensor_model_parallel_size {self.tensor}; set "
                "it to a divisor"
            )
        if packs % self.data:
            raise ValueError(
                f"train.global_batch_size is {packs} packs, which {self.data} data-parallel ranks cannot share "
                "equally; set it to a multiple"
            )
        if self.pipeline > model.num_layers:
            raise ValueError(f"{model.num_layers} layers cannot be spread over {self.pipeline} pipeline stages")
        if self.fully_sharded and self.pipeline > 1:
            raise ValueError(
                "dist.use_megatron_fsdp can be combined with tensor and context parallelism, not with pipeline "
                "parallelism; set pipeline_model_parallel_size to 1"
            )
        if capacity < self.pad_multiple:
            raise ValueError(
                f"dataset.capacity is {capacity} tokens, less than the {self.pad_multiple} that {self.tensor} x "
                f"{self.context} ranks share"
            )


def layers_of_stages(layers: int, stages: int) -> list[int]:
    """The number of layers of each pipeline stage, as even as possible; remaining layers go to the middle stages first.

    Raises:
        ValueError: more stages than layers.
    """
    if stages > layers:
        raise ValueError(f"{layers} layers cannot be spread over {stages} pipeline stages")
    share, extra = divmod(layers, stages)
    sizes = [share] * stages
    # The first and the last stage also hold the embedding and the head.
    for place in sorted(range(stages), key=lambda stage: stage in (0, stages - 1))[:extra]:
        sizes[place] += 1
    return sizes


_ROW_PARALLEL = tuple(f"{linear}{matrix}.weight" for linear in (".to_out.0", "ffn.net.2") for matrix in ("", ".lora_A"))


def shard_of(key: str) -> int | None:
    """The axis along which tensor parallelism splits a tensor, by its diffusers key; None for replicated tensors.

    The projections of both attentions and the first layer of the feed-forward are column-parallel, with their biases
    and the norms across heads; the layers that follow them are row-parallel. Of their adapters, B of a column-parallel
    layer and A of a row-parallel one are split as the weight is, and the other matrix is whole on every rank.
    """
    if not key.startswith("blocks."):
        return None
    name = key.split(".", 2)[2]
    if any(part in name for part in (".to_q.", ".to_k.", ".to_v.", ".norm_q.", ".norm_k.", "ffn.net.0.proj.")):
        return None if name.endswith(".lora_A.weight") else 0
    if name.endswith(_ROW_PARALLEL):
        return 1
    return None


def parameters_of_rank(shapes: dict[str, tuple[int, ...]], layers: int, layout: Layout, stage: int) -> int:
    """The number of parameters of a rank of a pipeline stage, before any data-parallel sharding.

    Args:
        shapes: tensor shapes of the whole model, by diffusers key.
        layers: number of layers of the whole model.
        layout: the parallel layout.
        stage: the pipeline stage.
    """
    sizes = layers_of_stages(layers, layout.pipeline)
    first = sum(sizes[:stage])
    mine = range(first, first + sizes[stage])
    total = 0
    for key, shape in shapes.items():
        count = math.prod(shape)
        if key.startswith("blocks."):
            if int(key.split(".")[1]) not in mine:
                continue
            total += count // layout.tensor if shard_of(key) is not None else count
        elif key.startswith("condition_embedder."):
            total += count  # replicated on every stage
        elif key.startswith("patch_embedding."):
            total += count if stage == 0 else 0
        else:  # the head
            total += count if stage == layout.pipeline - 1 else 0
    return total
