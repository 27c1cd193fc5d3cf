"""The adapters of a checkpoint of wan-train's that was trained with a ``lora`` section."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_model.config import WanConfig
from wan_model.dit.lora import LoraSettings, adapter_shapes
from wan_model.latent_spec import LatentSpec
from wan_model.weights.run_settings import RUN_CONFIG, read_run_settings
from wan_model.weights.training_checkpoint import entries_of_model, open_checkpoint, prefix_of_model, read_into


@dataclasses.dataclass(frozen=True)
class TrainedAdapters:
    """What a checkpoint says of its adapters; their tensors have not been read.

    Attributes:
        settings: of the adapters.
        config: sizes of the transformer.
        spec: the latent space of the training data; None for mock data.
        base: the model that they were trained on, as it was given.
        base_digest: of its weights, see ``wan_model.weights.base_digest``.
    """

    settings: LoraSettings
    config: WanConfig
    spec: LatentSpec | None
    base: str
    base_digest: str


def has_adapters(path: Path) -> bool:
    """Whether a checkpoint is one of adapters, by its settings.

    Raises:
        ValueError: they cannot be read.
    """
    return _section(read_run_settings(path)) is not None


def _section(record: dict[str, Any]) -> dict[str, Any] | None:
    """The ``lora`` section of a run's settings; None if it trained the weights."""
    section = record.get("lora")
    return section if isinstance(section, dict) and section.get("rank") else None


def find_adapters(path: Path) -> TrainedAdapters:
    """What the configuration of a complete checkpoint says of its adapters.

    Raises:
        ValueError: the checkpoint is partial, or has no adapters.
    """
    path = Path(path)
    _, config, spec = open_checkpoint(path)
    return _described(path, config, spec)


def _described(path: Path, config: WanConfig, spec: LatentSpec | None) -> TrainedAdapters:
    record = read_run_settings(path)
    section, model = _section(record), record.get("model")
    if section is None:
        raise ValueError(f"{path} holds the weights of a model, not a LoRA; export it with wan-train export")
    try:
        settings = LoraSettings(
            rank=_of_type(section, "rank", int),
            alpha=None if section.get("alpha") is None else float(_of_type(section, "alpha", int | float)),
            use_rslora=_of_type(section, "use_rslora", bool),
            dropout=float(_of_type(section, "dropout", int | float)),
            targets=tuple(str(target) for target in _of_type(section, "targets", list)),
        )
        settings.linears(config)
        base, digest = (_of_type(model, name, str) for name in ("init_from", "base_digest"))
    except ValueError as error:
        raise ValueError(f"{path / RUN_CONFIG} does not describe a LoRA: {error}") from error
    return TrainedAdapters(settings, config, spec, base, digest)


def _of_type(section: Any, name: str, kind: Any) -> Any:
    value = section.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r:.60}")
    return value


def read_adapters(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """A and B of all adapters of a checkpoint, whole, fp32, by diffusers' keys; needs no process group.

    Args:
        path: of the checkpoint itself, ``.../iter_0000010``.
        ema: read the EMA instead.

    Raises:
        ValueError: the checkpoint is partial or damaged, has no adapters or other ones than its settings say, or has no
            EMA.
    """
    path = Path(path)
    index, config, spec = open_checkpoint(path)
    settings = _described(path, config, spec).settings
    prefix = prefix_of_model(index, config, path, ema=ema, masters=False)
    entries = entries_of_model(index, config, path, prefix, adapter_shapes(config, settings))
    state = {key: torch.empty(entry.size, dtype=torch.float32) for key, entry in entries.items()}
    read_into({prefix + key: value for key, value in state.items()}, path, index)
    return state
