"""Loading of the transformer and the latent codec from a model in diffusers' layout, a training checkpoint, or both.

Small files are read first, so that models that do not match are refused before large files are read.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from wan_infer.loading.lora_unmerged import UnmergedLoras
from wan_infer.request.options import ModelName, ModelSources
from wan_infer.runtime.parallelism import Parallelism
from wan_model.codec.latent_codec import LatentCodec
from wan_model.config import WAN_1_3B, WAN_14B, WanConfig
from wan_model.dit.lora import is_adapter_key
from wan_model.dit.model import WanDiT
from wan_model.latent_spec import LatentSpec
from wan_model.weights.base_digest import joint_digest, tensor_digests
from wan_model.weights.lora_reading import LoraBase, LoraWeights, merge_loras
from wan_model.weights.model_folder import MissingPartsError, resolve_folder
from wan_model.weights.transformer import load_weights, read_config, read_trained_spec

# Each computes some 1 to 2 GB/s; a disk has not more for more of them.
_HASHING_THREADS = 8
_TASKS = {"t2v-1.3B": WAN_1_3B, "t2v-14B": WAN_14B}


@dataclasses.dataclass(frozen=True)
class TransformerSource:
    """A transformer whose configuration has been read, and whose weights have not.

    Attributes:
        path: diffusers' ``transformer`` folder, or one training checkpoint.
        config: its sizes.
        origin: its name in messages and records: the last part of a path, or a hub id.
        step: of the training checkpoint; None for released weights.
        spec: the latent space that it was trained in, where that is recorded.
        ema: load the EMA of the weights instead of the weights.
        adapters: a training checkpoint of a LoRA, which is merged into the weights at ``path``.
        base_name: the name of these weights.
    """

    path: Path
    config: WanConfig
    origin: str
    step: int | None = None
    spec: LatentSpec | None = None
    ema: bool = False
    adapters: Path | None = None
    base_name: str = ""

    @classmethod
    def find(cls, sources: ModelSources) -> "TransformerSource":
        """The transformer of a training checkpoint where one is given, else of the model.

        Raises:
            ValueError: it is missing, partial or damaged, or is not Wan 2.1 text-to-video.
        """
        if sources.checkpoint is not None:
            # Half a second of imports that released weights do not need.
            from wan_model.weights.training_adapters import has_adapters
            from wan_model.weights.training_checkpoint import find_checkpoint, read_run_config

            path = find_checkpoint(Path(sources.checkpoint), sources.step)
            name = path.name.removeprefix("iter_")
            step = int(name) if name.isdecimal() else None
            if has_adapters(path):
                return cls._with_adapters(path, step, sources)
            config, spec = read_run_config(path)
            return cls(path, config, _origin(sources.checkpoint), step, spec, sources.ema)
        if sources.model is None:
            raise ValueError("no model was given to take the transformer from")
        with naming_models(sources.model):
            folder = resolve_folder(sources.model, ["transformer"], revision=sources.revision) / "transformer"
            name = _origin(sources.model)
            return cls(folder, read_config(folder), name, spec=read_trained_spec(folder), base_name=name)

    @classmethod
    def _with_adapters(cls, checkpoint: Path, step: int | None, sources: ModelSources) -> "TransformerSource":
        """A model's transformer, changed by the LoRA of a checkpoint."""
        from wan_model.weights.training_adapters import find_adapters

        found = find_adapters(checkpoint)
        if sources.model is None:
            raise ValueError(
                f"{checkpoint} holds a LoRA, which was trained on {found.base}; give that model as --model, from which "
                "the transformer is taken"
            )
        with naming_models(sources.model):
            folder = resolve_folder(sources.model, ["transformer"], revision=sources.revision) / "transformer"
            base = read_config(folder)
        # Texts are padded as in the training of the LoRA.
        if dataclasses.replace(base, text_length=found.config.text_length) != found.config:
            raise ValueError(
                f"the LoRA in {checkpoint} was trained on {found.base}, whose transformer has other sizes than that of "
                f"{os.fspath(sources.model)}; give the model that it was trained on as --model"
            )
        assert sources.checkpoint is not None, "the caller has found it"
        name = _origin(sources.model)
        origin = f"{_origin(sources.checkpoint)} on {name}"
        return cls(folder, found.config, origin, step, found.spec, sources.ema, checkpoint, name)

    @property
    def from_training(self) -> bool:
        """Whether all weights are those of a training checkpoint."""
        return self.path.name != "transformer"

    def own_base(self) -> tuple[Path, LoraBase] | None:
        """The checkpoint of the LoRA and what it was trained on; None if there is none."""
        from wan_model.weights.training_adapters import find_adapters

        if self.adapters is None:
            return None
        found = find_adapters(self.adapters)
        return self.adapters, LoraBase(_origin(found.base), found.base_digest)

    def base_digest(self) -> str | None:
        """The digest of all weights that a LoRA changes; None if they are those of a training checkpoint.

        Raises:
            ValueError: damaged files.
        """
        if self.from_training:
            return None
        with naming_models(self.path.parent):
            return joint_digest(tensor_digests(self.path, threads=min(_HASHING_THREADS, os.cpu_count() or 1)))

    def own_lora(self) -> LoraWeights:
        """The LoRA of the checkpoint.

        Raises:
            ValueError: its files are damaged.
        """
        from wan_model.weights.training_adapters import find_adapters, read_adapters

        assert self.adapters is not None, "there is one"
        factor = find_adapters(self.adapters).settings.factor
        return LoraWeights.of_adapters(read_adapters(self.adapters, ema=self.ema), factor)

    @property
    def text_length(self) -> int:
        """Tokens that prompts are truncated to, as the captions of the training data were; padding is of ``config``."""
        return self.spec.text_length if self.spec else self.config.text_length

    def load(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        parallelism: Parallelism | None = None,
        loras: Sequence[LoraWeights] | UnmergedLoras = (),
    ) -> WanDiT:
        """The model in evaluation mode; weights are read tensor by tensor.

        Args:
            dtype: see ``WanDiT.to_precision``.
            device: of the weights.
            parallelism: of the model, and of its weights.
            loras: merged into the weights, or added beside them.

        Raises:
            ValueError: damaged files, or other weights than the model's.
        """
        parallelism = parallelism or Parallelism()
        with torch.device("meta"):
            model = WanDiT(self.config, parallelism.ops)
        model.to_precision(dtype)
        if isinstance(loras, UnmergedLoras):
            loras.add_to(model)
        model.requires_grad_(False)
        parallelism.shard(model, torch.device(device))
        model.to_empty(device=device)
        if self.from_training:
            from wan_model.weights.training_checkpoint import read_training_checkpoint

            base = {key: parameter for key, parameter in model.named_parameters() if not is_adapter_key(key)}
            read_training_checkpoint(self.path, into=base, ema=self.ema)
        else:
            with naming_models(self.path.parent):
                load_weights(model, self.path)
        if self.adapters is not None:
            merge_loras([self.own_lora()], model)
        if isinstance(loras, UnmergedLoras):
            loras.fill(model)
        else:
            merge_loras(loras, model)
        return model.eval()


def _origin(model: ModelName) -> str:
    # Without the rest of the path, which belongs to the machine.
    return Path(model).resolve().name if Path(model).is_dir() else os.fspath(model)


@contextlib.contextmanager
def naming_models(*models: ModelName | None) -> Iterator[None]:
    """Name the models in errors about damaged files that do not, such as those of a library.

    Raises:
        ValueError: in place of the library's error.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        names = [os.fspath(model) for model in models if model is not None]
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) and any(name in reason for name in names):
            raise
        raise ValueError(f"the model in {' and '.join(names)} cannot be read: {reason[:300]}") from error


def check_latent_space(source: TransformerSource, codec: "CodecSource") -> LatentSpec:
    """The latent space of the autoencoder and the text encoder, from their small files; the transformer adds its fps.

    Raises:
        ValueError: files are missing, or the space is not the one that the transformer was trained in.
    """
    if source.text_length > source.config.text_length:
        raise ValueError(
            f"the transformer {source.origin} takes texts of {source.config.text_length} tokens and the captions of "
            f"its data were cut to {source.text_length}, which no training allows; restore the record that was changed"
        )
    spec = codec.latent_spec(source.text_length)
    if source.spec is not None:
        source.spec.require_same(spec, f"the transformer {source.origin}", "the given text encoder and autoencoder")
        spec = spec.completed(source.spec)
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


class CodecSource:
    """An autoencoder and a text encoder that have not been loaded.

    Args:
        sources: of the models.
    """

    def __init__(self, sources: ModelSources) -> None:
        self._sources = sources
        names = (sources.vae_model or sources.model, sources.text_model or sources.model)
        self._names: list[ModelName | None] = list(dict.fromkeys(names))

    def latent_spec(self, text_length: int) -> LatentSpec:
        """Their latent space, from small files.

        Raises:
            ValueError: missing or damaged files.
        """
        return self._load(text_length).spec

    def load_text(self, text_length: int, dtype: torch.dtype) -> LatentCodec:
        """A codec that embeds prompts.

        Raises:
            ValueError: damaged files.
        """
        return self._load(text_length, load_text=True, text_dtype=dtype)

    def load_decoder(self, text_length: int, dtype: torch.dtype, *, tf32: bool) -> LatentCodec:
        """A codec that decodes latents; see ``LatentCodec``.

        Raises:
            ValueError: damaged files.
        """
        return self._load(text_length, load_decoder=True, vae_dtype=dtype, tf32=tf32)

    def _load(self, text_length: int, *, load_text: bool = False, **parts: Any) -> LatentCodec:
        sources = self._sources
        with naming_models(*self._names), self._advising():
            codec: LatentCodec = LatentCodec.from_pretrained(
                sources.model,
                vae_model=sources.vae_model,
                text_model=sources.text_model,
                revision=sources.revision,
                text_length=text_length,
                load_vae=False,
                load_text=load_text,
                **parts,
            )
        return codec

    @contextlib.contextmanager
    def _advising(self) -> Iterator[None]:
        # A model that has only a transformer, as `wan-train export` writes it, is completed by two flags.
        try:
            yield
        except MissingPartsError as error:
            others = {"--vae-checkpoint-dir": self._sources.vae_model, "--t5-checkpoint-dir": self._sources.text_model}
            needed = "--vae-checkpoint-dir" if "vae" in error.parts else "--t5-checkpoint-dir"
            if others[needed] is not None:
                raise
            flags = " and ".join(flag for flag, model in others.items() if model is None)
            raise ValueError(
                f"{error.folder} has no {', '.join(error.parts)} folder; take it from another model with {flags}"
            ) from error


def check_task(task: str, config: WanConfig, origin: str) -> None:
    """Refuse a transformer that is not of the task.

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
