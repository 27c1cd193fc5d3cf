"""Where the transformer and the latent codec come from: a model in diffusers' layout, a training checkpoint, or both.

A source is looked at before anything large is read, so that what does not fit together is refused at once.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from wan_infer.loading.lora import LoraWeights
from wan_infer.runtime.parallelism import Sharing
from wan_model.codec.latent_codec import LatentCodec
from wan_model.config import WAN_1_3B, WAN_14B, WanConfig
from wan_model.dit.model import WanDiT
from wan_model.latent_spec import LatentSpec
from wan_model.weights.model_folder import resolve_folder
from wan_model.weights.transformer import load_weights, read_config

ModelName = str | os.PathLike[str]

_TASKS = {"t2v-1.3B": WAN_1_3B, "t2v-14B": WAN_14B}


@dataclasses.dataclass(frozen=True)
class TransformerSource:
    """A transformer that can be loaded, and what is known of it.

    Attributes:
        path: diffusers' ``transformer`` folder, or one training checkpoint.
        config: its sizes.
        origin: what it came from, for messages and records: the last part of a path, or a hub id.
        step: of the training checkpoint; None for released weights.
        spec: the latent space that it was trained in, where that is recorded.
        ema: the average of the weights instead of the weights.
    """

    path: Path
    config: WanConfig
    origin: str
    step: int | None = None
    spec: LatentSpec | None = None
    ema: bool = False

    @classmethod
    def of_model(cls, model: ModelName, *, revision: str | None = None) -> "TransformerSource":
        """The transformer of a folder in diffusers' layout, or of a hub id.

        Raises:
            ValueError: it is missing, or is not Wan 2.1 text-to-video.
        """
        with readable(model):
            folder = resolve_folder(model, ["transformer"], revision=revision) / "transformer"
            return cls(folder, read_config(folder), _origin(model))

    @classmethod
    def of_checkpoint(cls, folder: ModelName, step: int | None = None, *, ema: bool = False) -> "TransformerSource":
        """The transformer of a training run's checkpoint; the newest complete one where no step is given.

        Raises:
            ValueError: there is none, or the one asked for is partial or damaged.
        """
        # Half a second of imports that released weights do without.
        from wan_model.weights.training_checkpoint import find_checkpoint, read_run_config

        path = find_checkpoint(Path(folder), step)
        config, spec = read_run_config(path)
        name = path.name.removeprefix("iter_")
        return cls(path, config, _origin(folder), int(name) if name.isdecimal() else None, spec, ema)

    @property
    def from_training(self) -> bool:
        """Whether it is a training checkpoint."""
        return self.path.name != "transformer"

    @property
    def text_length(self) -> int:
        """Tokens that prompts are cut to: no property of the model folder; what it was trained with counts."""
        return self.spec.text_length if self.spec else self.config.text_length

    def load(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        sharing: Sharing | None = None,
        lora: LoraWeights | None = None,
    ) -> WanDiT:
        """Read the weights, tensor by tensor, in evaluation mode.

        Args:
            dtype: see ``WanDiT.to_precision``.
            device: of the weights.
            sharing: the runtime, and whether each process keeps only its share of them.
            lora: merged into them.

        Raises:
            ValueError: damaged files, or other weights than the model's.
        """
        sharing = sharing or Sharing()
        with torch.device("meta"):
            model = WanDiT(self.config, sharing.ops)
        model.to_precision(dtype).requires_grad_(False)
        sharing.spread_weights(model, torch.device(device))
        model.to_empty(device=device)
        if self.from_training:
            from wan_model.weights.training_checkpoint import read_training_checkpoint

            read_training_checkpoint(self.path, into=dict(model.named_parameters()), ema=self.ema)
        else:
            with readable(self.path.parent):
                load_weights(model, self.path)
        if lora is not None:
            lora.merge_into(model)
        return model.eval()


def _origin(model: ModelName) -> str:
    # A full path says more of the machine than of the model.
    return Path(model).resolve().name if Path(model).is_dir() else os.fspath(model)


@contextlib.contextmanager
def readable(*models: ModelName | None) -> Iterator[None]:
    """Damaged files fail inside libraries, in words that do not say which model is meant: say it.

    Raises:
        ValueError: in place of what a library raised.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, ImportError, SafetensorError) as error:
        names = [os.fspath(model) for model in models if model is not None]
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) and any(name in reason for name in names):
            raise
        reason = f"no {error} in its configuration" if isinstance(error, KeyError) else reason[:300]
        raise ValueError(f"the model in {' and '.join(names)} cannot be read: {reason}") from error


def look_at_codec(source: TransformerSource, parts: "CodecSource") -> LatentSpec:
    """The latent space of the autoencoder and the text encoder, from their small files.

    Raises:
        ValueError: they are missing, or span another space than the one that the transformer was trained in.
    """
    with readable(*parts.names):
        spec: LatentSpec = parts.look(source.text_length)
    if source.spec is not None:
        source.spec.require_same(spec, f"the checkpoint {source.origin}", "the given text encoder and autoencoder")
    for name, has, needs in (
        ("latent channels", spec.channels, source.config.in_channels),
        ("text width", spec.text_dim, source.config.text_dim),
    ):
        if has != needs:
            raise ValueError(
                f"the transformer {source.origin} was made for {name} of {needs}; "
                f"the given text encoder and autoencoder have {has}"
            )
    return spec


@dataclasses.dataclass(frozen=True)
class CodecSource:
    """Where the autoencoder and the text encoder are.

    Attributes:
        model: a folder in diffusers' layout or a hub id; None where both of the following are given.
        vae_model: another model to take the autoencoder from.
        text_model: another model to take the text encoder and the tokenizer from.
        revision: of hub ids.
    """

    model: ModelName | None
    vae_model: ModelName | None = None
    text_model: ModelName | None = None
    revision: str | None = None

    @property
    def names(self) -> list[ModelName | None]:
        """Of the models, each once."""
        return list(dict.fromkeys((self.vae_model or self.model, self.text_model or self.model)))

    def look(self, text_length: int) -> LatentSpec:
        """The space that they span, by their small files."""
        return self._codec(text_length, load_vae=False, load_text=False).spec

    def load_text(self, text_length: int, dtype: torch.dtype) -> LatentCodec:
        """The half that embeds prompts.

        Raises:
            ValueError: damaged files.
        """
        with readable(*self.names):
            return self._codec(text_length, load_vae=False, text_dtype=dtype)

    def load_decoder(self, text_length: int) -> LatentCodec:
        """The half that decodes latents, in fp32 as in the official code.

        Raises:
            ValueError: damaged files.
        """
        with readable(*self.names):
            return self._codec(text_length, load_vae=False, load_text=False, load_decoder=True)

    def _codec(self, text_length: int, **halves: Any) -> LatentCodec:
        codec: LatentCodec = LatentCodec.from_pretrained(
            self.model,
            vae_model=self.vae_model,
            text_model=self.text_model,
            revision=self.revision,
            text_length=text_length,
            **halves,
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
