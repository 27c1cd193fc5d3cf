"""Options of the sampler: which models are loaded, on which devices, over how many processes. Imports no torch."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any, TypedDict, cast

from wan_model.precision import VAE_PRECISIONS

ModelName = str | os.PathLike[str]
Lora = ModelName | tuple[ModelName, float]
LORA_MODES = ("merged", "unmerged")


def scales_of(given: float | Sequence[float], files: int) -> tuple[float, ...]:
    """The scale of each LoRA file.

    Args:
        given: one for all, or one each.
        files: their number.

    Raises:
        ValueError: another number of scales, or one that is not finite.
    """
    scales = [given] if isinstance(given, int | float) else list(given)
    if len(scales) not in (1, files):
        raise ValueError(f"got {len(scales)} scales of {files} LoRA; expected one for all or one each")
    for scale in scales:
        if not math.isfinite(scale):
            raise ValueError(f"the scale of a LoRA is {scale}; expected a finite number")
    return tuple(float(scales[i % len(scales)]) for i in range(files))


@dataclasses.dataclass(frozen=True)
class ModelSources:
    """The models that are loaded.

    Attributes:
        model: a folder in diffusers' layout or a hub id: text encoder, autoencoder and, without ``checkpoint``, the
            transformer. None where ``checkpoint``, ``vae_model`` and ``text_model`` are given.
        checkpoint: checkpoint folder of a training run, to take the transformer from.
        step: step of the checkpoint; the newest complete one by default.
        ema: load the EMA of the checkpoint's weights instead of the weights.
        revision: of hub ids.
        vae_model: another model to take the autoencoder from.
        text_model: another model to take the text encoder and the tokenizer from.
        lora: a LoRA for the transformer, or several: a file, or a file and its scale (1 by default).
        lora_mode: ``merged`` adds them to the weights when these are loaded; ``unmerged`` computes them beside the
            weights, so that the scales of each call may differ.

    Raises:
        ValueError: the scale of a LoRA is not finite, or an unknown mode.
    """

    model: ModelName | None = None
    checkpoint: ModelName | None = None
    step: int | None = None
    ema: bool = False
    revision: str | None = None
    vae_model: ModelName | None = None
    text_model: ModelName | None = None
    lora: Lora | Sequence[Lora] | None = None
    lora_mode: str = "merged"

    def __post_init__(self) -> None:
        if self.lora_mode not in LORA_MODES:
            raise ValueError(f"there is no LoRA mode {self.lora_mode!r}; expected {' or '.join(LORA_MODES)}")
        for path, scale in self.loras:
            if not math.isfinite(scale):
                raise ValueError(f"the scale of the LoRA {os.fspath(path)} is {scale}; expected a finite number")

    @property
    def loras(self) -> list[tuple[ModelName, float]]:
        """The LoRA files with their scales, in the order in which they were given."""
        given = self.lora
        if given is None:
            return []
        is_pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float)
        several = [given] if is_pair or isinstance(given, str | os.PathLike) else given
        pairs = [(one, 1.0) if isinstance(one, str | os.PathLike) else one for one in cast("Sequence[Lora]", several)]
        return [(path, float(scale)) for path, scale in pairs]


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """Devices, precision and memory.

    Attributes:
        device: ``auto`` (CUDA where there is a CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of the transformer and the text encoder: ``auto`` (bfloat16 on CUDA, else float32), ``float32`` or
            ``bfloat16``.
        vae_dtype: of the autoencoder: ``float32``, ``tf32`` (float32 whose convolutions a GPU may round to TF32, as in
            the official code) or ``bfloat16``.
        t5_cpu: embed prompts on the CPU.
        offload: keep each part in main memory, and on the device only while it computes.
        tiles: into which each process divides frames to decode them; more tiles need less memory.

    Raises:
        ValueError: fewer than one tile, or an unknown precision of the autoencoder.
    """

    device: str = "auto"
    dtype: str = "auto"
    vae_dtype: str = "tf32"
    t5_cpu: bool = False
    offload: bool = False
    tiles: int = 1

    def __post_init__(self) -> None:
        if self.tiles < 1:
            raise ValueError(f"{self.tiles} tiles; expected at least 1")
        if self.vae_dtype not in VAE_PRECISIONS:
            expected = ", ".join(VAE_PRECISIONS)
            raise ValueError(f"there is no precision {self.vae_dtype!r} of the autoencoder; expected {expected}")


class SamplerOptions(TypedDict, total=False):
    """Keyword arguments of ``WanSampler``'s constructors; see ``ModelSources`` and ``ComputeOptions``."""

    revision: str | None
    vae_model: ModelName | None
    text_model: ModelName | None
    lora: Lora | Sequence[Lora] | None
    lora_mode: str
    device: str
    dtype: str
    vae_dtype: str
    t5_cpu: bool
    offload: bool
    tiles: int


def parse_options(options: SamplerOptions, **sources: Any) -> tuple[ModelSources, ComputeOptions]:
    """Keyword arguments as the two dataclasses.

    Args:
        options: of the caller.
        sources: further fields of ``ModelSources``.

    Raises:
        TypeError: an option that does not exist.
    """
    if unknown := sorted(options.keys() - SamplerOptions.__annotations__.keys()):
        raise TypeError(
            f"there is no option {', '.join(unknown)}; expected some of {', '.join(SamplerOptions.__annotations__)}"
        )
    fields = {field.name for field in dataclasses.fields(ComputeOptions)}
    compute: dict[str, Any] = {name: value for name, value in options.items() if name in fields}
    models: dict[str, Any] = {name: value for name, value in options.items() if name not in fields}
    return ModelSources(**sources, **models), ComputeOptions(**compute)


@dataclasses.dataclass(frozen=True)
class ParallelOptions:
    """How several processes divide the computation of a video.

    Attributes:
        cfg_parallel: compute the two branches of classifier-free guidance in one half of the processes each.
        shard_weights: shard the transformer's weights over all processes.
    """

    cfg_parallel: bool = False
    shard_weights: bool = False

    def check(self, world_size: int) -> None:
        """Refuse a number of processes that these options do not allow.

        Raises:
            ValueError: the message says how many there should be.
        """
        if self.cfg_parallel and world_size % 2:
            raise ValueError(
                f"--cfg-parallel divides the processes into two halves and there are {world_size}; "
                "start an even number (--nproc-per-node 2), or leave --cfg-parallel out"
            )
        if self.shard_weights and world_size == 1:
            raise ValueError("--shard-weights needs several processes and there is one; add --nproc-per-node N")
