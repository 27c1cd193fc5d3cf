"""Where the transformer and the latent codec come from: a model in diffusers' layout, a training checkpoint, or both.

Everything is loaded into main memory first and goes to its device once.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from wan_model.codec import LatentCodec
from wan_model.config import WAN_1_3B, WAN_14B, WanConfig
from wan_model.dit import WanDiT
from wan_model.latent_spec import LatentSpec
from wan_model.model_folder import resolve_folder
from wan_model.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_model.weights import load_transformer

ModelName = str | os.PathLike[str]

_TASKS = {"t2v-1.3B": WAN_1_3B, "t2v-14B": WAN_14B}


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A loaded transformer and what is known of it.

    Attributes:
        model: on the CPU, in evaluation mode.
        origin: what it came from, for messages and records: the last part of a path, or a hub id.
        step: of the training checkpoint; None for released weights.
        spec: the latent space that it was trained in, where that is recorded.
    """

    model: WanDiT
    origin: str
    step: int | None = None
    spec: LatentSpec | None = None


def _origin(model: ModelName) -> str:
    # A full path says more of the machine than of the model.
    return Path(model).resolve().name if Path(model).is_dir() else os.fspath(model)


@contextlib.contextmanager
def _readable(*models: ModelName | None) -> Iterator[None]:
    # Damaged files fail inside libraries, in words that do not say which model is meant.
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, ImportError, SafetensorError) as error:
        names = [os.fspath(model) for model in models if model is not None]
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) and any(name in reason for name in names):
            raise
        reason = f"no {error} in its configuration" if isinstance(error, KeyError) else reason[:300]
        raise ValueError(f"the model in {' and '.join(names)} cannot be read: {reason}") from error


def transformer_of_model(model: ModelName, *, dtype: torch.dtype, revision: str | None = None) -> Transformer:
    """The transformer of a folder in diffusers' layout, or of a hub id.

    Raises:
        ValueError: it is missing, or is not Wan 2.1 text-to-video.
    """
    with _readable(model):
        folder = resolve_folder(model, ["transformer"], revision=revision)
        return Transformer(load_transformer(folder / "transformer", dtype=dtype), _origin(model))


def transformer_of_checkpoint(folder: ModelName, step: int | None, *, dtype: torch.dtype) -> Transformer:
    """The transformer of a training run's checkpoint; the newest complete one where no step is given.

    Raises:
        ValueError: there is none, or the one asked for is partial or damaged.
    """
    path = find_checkpoint(Path(folder), step)
    config, spec, state = read_training_checkpoint(path, dtype=dtype)
    with torch.device("meta"):
        model = WanDiT(config)
    model.load_state_dict(state, assign=True)
    name = path.name.removeprefix("iter_")
    return Transformer(
        model.requires_grad_(False).eval(), _origin(folder), int(name) if name.isdecimal() else None, spec
    )


def load_codec(
    model: ModelName | None,
    transformer: Transformer,
    *,
    vae_model: ModelName | None = None,
    text_model: ModelName | None = None,
    text_dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> LatentCodec:
    """The autoencoder and the text encoder that belong to a transformer.

    Raises:
        ValueError: they span another latent space than the one that the transformer was trained in.
    """
    spec = transformer.spec
    with _readable(*dict.fromkeys((vae_model or model, text_model or model))):
        codec: LatentCodec = LatentCodec.from_pretrained(
            model,
            vae_model=vae_model,
            text_model=text_model,
            revision=revision,
            text_dtype=text_dtype,
            # How long prompts are is no property of the model folder; what the transformer was trained with counts.
            text_length=spec.text_length if spec else transformer.model.config.text_length,
        )
    if spec is not None:
        spec.require_same(codec.spec, f"the checkpoint {transformer.origin}", "the given text encoder and autoencoder")
    config = transformer.model.config
    for name, has, needs in (
        ("latent channels", codec.spec.channels, config.in_channels),
        ("text width", codec.spec.text_dim, config.text_dim),
    ):
        if has != needs:
            raise ValueError(
                f"the transformer {transformer.origin} was made for {name} of {needs}; "
                f"the given text encoder and autoencoder have {has}"
            )
    return codec


def check_task(task: str, config: WanConfig, origin: str) -> None:
    """Refuse a transformer that is not the task's.

    Raises:
        ValueError: its sizes differ from the released model's.
    """
    wanted: dict[str, Any] = dataclasses.asdict(_TASKS[task])
    differing = [
        f"{name} {value} where {task} has {wanted[name]}"
        for name, value in dataclasses.asdict(config).items()
        if value != wanted[name]
    ]
    if differing:
        raise ValueError(
            f"the transformer {origin} is not {task}: {'; '.join(differing)}; leave --task out to sample it"
        )
