"""Export of a training checkpoint to diffusers' layout. Needs no Megatron."""

from pathlib import Path

import torch

from wan_model.weights.training_adapters import has_adapters
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_model.weights.transformer import save_transformer
from wan_train.checkpoint.record import RECORD_NAME, changed_files, read_record


def require_empty(out: Path) -> None:
    """Refuse a folder that has something in it.

    Raises:
        ValueError: naming it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another one")


def step_of(checkpoint: Path) -> int:
    """The step of ``.../iter_0000010``."""
    return int(checkpoint.name.removeprefix("iter_"))


def require_undamaged(checkpoint: Path) -> None:
    """Verify the digest of every file of a checkpoint, if it has a record of them.

    Raises:
        ValueError: naming the first file that differs.
    """
    if (checkpoint / RECORD_NAME).is_file():
        files = read_record(checkpoint, step_of(checkpoint))
        if changed := changed_files(checkpoint, files, files):
            raise ValueError(f"{checkpoint / changed[0]} is damaged: its SHA-256 differs from {RECORD_NAME}'s")


def export(checkpoints: Path, out: Path, *, step: int | None = None, ema: bool = False, dtype: str = "stored") -> Path:
    """Write ``OUT/transformer``, which diffusers' ``WanTransformer3DModel`` loads.

    With it goes what the checkpoint records of its data: the text length in ``config.json`` (where it is not 512), and
    the latent space.

    The digest of every file of the checkpoint is verified first.

    Args:
        checkpoints: a run's checkpoint folder.
        out: a new or empty folder.
        step: the step to export; the newest complete one by default.
        ema: export the EMA instead of the weights.
        dtype: ``stored`` keeps every bit of the weights that the model computes with; ``float32`` takes the optimizer's
            fp32 weights, of which those are rounded; ``bfloat16`` converts (modules that diffusers keeps in fp32 stay
            fp32).

    Returns:
        The checkpoint that was read.

    Raises:
        ValueError: the output folder is not empty, the step does not exist or is damaged, or it has no EMA.
    """
    require_empty(out)
    checkpoint = find_checkpoint(checkpoints, step)
    if has_adapters(checkpoint):
        raise ValueError(
            f"{checkpoint} holds a LoRA; write it with --lora FILE, or merge it with its base: wan-train merge "
            f"{checkpoints} {out}"
        )
    require_undamaged(checkpoint)
    masters = dtype == "float32" and not ema
    config, spec, state = read_training_checkpoint(
        checkpoint, dtype=None if dtype == "stored" else getattr(torch, dtype), ema=ema, masters=masters
    )
    save_transformer(state, config, out / "transformer", spec=spec)
    return checkpoint
