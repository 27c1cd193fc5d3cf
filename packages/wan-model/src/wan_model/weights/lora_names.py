"""Names of the transformer's weights in LoRA files: those of diffusers, of the official release and of kohya.

ComfyUI and most trainers have the official names. kohya's programs write underscores for dots, and a prefix. Imports no
torch.

Source: the official release's ``model.py``; the converters of diffusers' ``lora_conversion_utils.py``; musubi-tuner.
"""

import re

# Before the name of a weight.
DIFFUSERS_PREFIX, COMFYUI_PREFIX, KOHYA_PREFIX = "transformer.", "diffusion_model.", "lora_unet_"
# Where a safetensors file's metadata have peft's configuration as JSON; diffusers writes and reads it.
METADATA_KEY = "lora_adapter_metadata"

# The official names by those of diffusers, each before the next dot or the end.
_OFFICIAL_IN_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
_OFFICIAL_OUTSIDE = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")


def official_name(name: str) -> str:
    """The official release's name of a weight, without ``.weight`` and ``.bias``, from that of diffusers."""
    if block := _BLOCK.fullmatch(name):
        return block[1] + _OFFICIAL_IN_BLOCK.get(block[2], block[2])
    return _OFFICIAL_OUTSIDE.get(name, name)


def kohya_spelling(name: str) -> str:
    """How kohya's programs write a name, which is the official one in their own files."""
    return KOHYA_PREFIX + name.replace(".", "_")
