"""A step of a training run as a model in diffusers' layout; needs no Megatron."""

from pathlib import Path

import torch

from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_model.weights.transformer import save_transformer
from wan_train.checkpoint.record import RECORD_NAME, changed_files, read_record

DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def export(checkpoints: Path, out: Path, *, step: int | None = None, ema: bool = False, dtype: str = "stored") -> Path:
    """Write ``OUT/transformer`` as diffusers' ``WanTransformer3DModel`` reads it.

    Every file of the checkpoint is compared with its digest first.

    Args:
        checkpoints: a run's checkpoint folder.
        out: a new or empty folder.
        step: which; the newest complete one by default.
        ema: the average of the weights instead of the weights.
        dtype: ``stored`` keeps every tensor as it is saved, to the bit; ``float32`` and ``bfloat16`` convert (what
            diffusers keeps in fp32 stays fp32).

    Returns:
        The checkpoint that was read.

    Raises:
        ValueError: a folder that is not empty, a step that is not there or not whole, no average in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not an empty folder; name another one")
    checkpoint = find_checkpoint(checkpoints, step)
    if (checkpoint / RECORD_NAME).is_file():
        files = read_record(checkpoint, int(checkpoint.name.removeprefix("iter_")))
        if changed := changed_files(checkpoint, files, files):
            raise ValueError(
                f"{checkpoint / changed[0]} is not what was saved: its sha256 differs from {RECORD_NAME}'s"
            )
    config, _, state = read_training_checkpoint(checkpoint, dtype=DTYPES[dtype], ema=ema)
    save_transformer(state, config, out / "transformer")
    return checkpoint
