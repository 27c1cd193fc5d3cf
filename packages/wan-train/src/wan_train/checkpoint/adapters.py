"""Adapters of a training checkpoint as a LoRA file, and LoRA merged into weights. Needs no Megatron."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan_model.dit.lora import merged_weight
from wan_model.dit.model import precision_of
from wan_model.weights.base_digest import joint_digest, tensor_digests
from wan_model.weights.lora_file import LoraOrigin, save_lora
from wan_model.weights.lora_reading import LoraWeights, read_lora
from wan_model.weights.model_folder import DIFFUSERS_STEM, open_weights, resolve_folder, weight_files
from wan_model.weights.training_adapters import TrainedAdapters, find_adapters, read_adapters
from wan_model.weights.training_checkpoint import find_checkpoint
from wan_model.weights.transformer import read_config, read_trained_spec, save_transformer
from wan_train.checkpoint.export import require_empty, require_undamaged, step_of


def export_lora(
    checkpoints: Path,
    file: Path,
    *,
    format: str = "diffusers",
    step: int | None = None,
    ema: bool = False,
    dtype: str = "stored",
) -> Path:
    """Write the adapters of a run as one safetensors file.

    The digest of every file of the checkpoint is verified first.

    Args:
        checkpoints: a run's checkpoint folder.
        file: to write.
        format: see ``wan_model.weights.lora_file``.
        step: the step to export; the newest complete one by default.
        ema: the EMA instead of the adapters.
        dtype: see ``save_lora``.

    Returns:
        The checkpoint that was read.

    Raises:
        ValueError: the step does not exist, is damaged or has no adapters or no EMA, or the file cannot be written so.
    """
    if file.exists():
        raise ValueError(f"{file} exists; choose another file")
    checkpoint = find_checkpoint(checkpoints, step)
    found = find_adapters(checkpoint)
    require_undamaged(checkpoint)
    origin = LoraOrigin(
        base=_writable("base", name_of_model(found.base)),
        base_digest=found.base_digest,
        run=_writable("run", checkpoint.resolve().parent.name),
        step=step_of(checkpoint),
        software=f"wan-train {version('wan-train')}",
    )
    tensors = read_adapters(checkpoint, ema=ema)
    save_lora(tensors, found.settings, found.config, file, format=format, origin=origin, dtype=dtype)
    return checkpoint


def name_of_model(model: str) -> str:
    """A hub id, or the last part of a path, which may be relative to another folder than the current one."""
    path = Path(model)
    if path.exists():
        return path.resolve().name
    is_path = path.is_absolute() or model.startswith(".") or model.count("/") != 1
    return path.name if is_path else model


def _writable(field: str, name: str) -> str | None:
    """A name for a file's metadata; None for one that these cannot have, such as one with a line break."""
    given: dict[str, Any] = {field: name}
    try:
        LoraOrigin(**given)
    except ValueError:
        return None
    return name


def merge(
    checkpoints: Path,
    out: Path,
    *,
    model: str | None = None,
    step: int | None = None,
    ema: bool = False,
    dtype: str = "stored",
) -> Path:
    """Write ``OUT/transformer``: the base with the changes of a run's adapters, each sum in fp32 and rounded once.

    Args:
        checkpoints: a run's checkpoint folder.
        out: a new or empty folder.
        model: the base, if it is not where it was in training.
        step: the step to merge; the newest complete one by default.
        ema: the EMA of the adapters.
        dtype: of the weights; ``stored`` for those of the base.

    Returns:
        The checkpoint that was read.

    Raises:
        ValueError: the output folder is not empty; the step does not exist, is damaged or has no adapters or no EMA; or
            the base is not the one that they were trained on.
    """
    require_empty(out)
    checkpoint = find_checkpoint(checkpoints, step)
    found = find_adapters(checkpoint)
    require_undamaged(checkpoint)
    base = base_folder(found, model, checkpoint)
    lora = LoraWeights.of_adapters(read_adapters(checkpoint, ema=ema), found.settings.factor)
    state = changed_state(base, lora, dtype)
    save_transformer(state, found.config, out / "transformer", spec=found.spec)
    return checkpoint


def merge_file(lora: Path, out: Path, model: str, *, dtype: str = "stored") -> str | None:
    """Write ``OUT/transformer``: a model with the changes of a LoRA file of any dialect, summed in fp32, rounded once.

    Args:
        lora: see ``wan_model.weights.lora_reading.read_lora``.
        out: a new or empty folder.
        model: whose transformer is changed: a folder or hub id.
        dtype: of the weights; ``stored`` for those of the model.

    Returns:
        A sentence if the file records that it was trained on other weights.

    Raises:
        ValueError: the output folder is not empty, the model is not found, or the file is no LoRA of its transformer.
    """
    require_empty(out)
    base = resolve_folder(model, ["transformer"]) / "transformer"
    config = read_config(base)
    found = read_lora(lora, config)
    save_transformer(changed_state(base, found, dtype), config, out / "transformer", spec=read_trained_spec(base))
    if found.base is None or found.base.digest == joint_digest(tensor_digests(base)):
        return None
    return f"{lora.name} was trained on {found.base.name}, whose weights are not those of {name_of_model(model)}"


def base_folder(found: TrainedAdapters, model: str | None, checkpoint: Path) -> Path:
    """The ``transformer`` folder of the model that adapters were trained on.

    Raises:
        ValueError: it is not found, or is another model.
    """
    name = model or found.base
    try:
        folder = resolve_folder(name, ["transformer"]) / "transformer"
    except ValueError as error:
        if model is not None:
            raise
        raise ValueError(f"the base of {checkpoint} is not found ({error}); give it with --model MODEL") from error
    digest = joint_digest(tensor_digests(folder))
    if digest != found.base_digest:
        raise ValueError(
            f"the weights of {name} are not those that the LoRA in {checkpoint} was trained on (digest {digest[:12]} "
            f"where it has {found.base_digest[:12]}); give the model that the run began with as --model"
        )
    return folder


@torch.no_grad()
def changed_state(base: Path, lora: LoraWeights, dtype: str) -> dict[str, Tensor]:
    """All tensors of a base with the changes of a LoRA, by key.

    Args:
        base: a ``transformer`` folder.
        lora: of this transformer.
        dtype: of the result; ``stored`` for that of each tensor.

    Raises:
        ValueError: files are damaged, or a sum is not finite.
    """
    state = {}
    files = weight_files(base, DIFFUSERS_STEM)
    for path in sorted(set(files.values())):
        with open_weights(path) as file:
            for key in (key for key, place in files.items() if place == path):
                weight = file.get_tensor(key)
                precision = weight.dtype if dtype == "stored" else precision_of(key, getattr(torch, dtype))
                changed = key in lora.products or key in lora.differences
                if changed:  # rounded once
                    weight = merged_weight(weight.float(), lora.change(key, tuple(weight.shape)))
                state[key] = weight.to(precision)
                if changed and not torch.isfinite(state[key]).all():
                    raise ValueError(f"the LoRA changes {key} to values that are not finite; the training diverged")
    return state
