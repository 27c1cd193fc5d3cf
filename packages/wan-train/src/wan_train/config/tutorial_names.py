"""Setting names of NVIDIA's Wan recipe and its tutorial. Imports no torch and no Megatron.

Source: the commands in the documents of NVIDIA's DFM and of Megatron-Bridge's diffusion recipes.
"""

from typing import Any

# Their name, and the equivalent setting here.
SAME = {
    "model.seq_length": "dataset.capacity",
    "dataset.seq_length": "dataset.capacity",
    "dataset.task_encoder_seq_length": "dataset.capacity",
    "dataset.packing_buffer_size": "dataset.packing_buffer",
    "dataset.global_batch_size": "train.global_batch_size",
    "dataset.micro_batch_size": "train.micro_batch_size",
    "model.crossattn_emb_size": "model.hidden_size",
}
# Their settings that have a fixed value here.
_ALWAYS: dict[str, tuple[Any, str]] = {"model.qkv_format": ("thd", "every batch is a pack")}


def translate(key: str, value: Any) -> str | None:
    """The equivalent key here; None if there is nothing to set.

    Raises:
        ValueError: the value is not supported.
    """
    if key in _ALWAYS:
        only, because = _ALWAYS[key]
        if value != only:
            raise ValueError(f"{key} is {value!r}; {because}, so set it to {only} or leave it out")
        return None
    return SAME.get(key, key)
