"""Names in LoRA files: which weight of the transformer a key belongs to, and which part of its change it holds.

Every trainer has its own prefix and spelling. All of these are the same matrix A of one linear:

    transformer.blocks.0.attn1.to_q.lora_A.weight             diffusers
    base_model.model.blocks.0.attn1.to_q.lora_A.weight        peft
    diffusion_model.blocks.0.self_attn.q.lora_A.weight        ComfyUI, lightx2v, with the official release's names
    diffusion_model.blocks.0.self_attn.q.lora_down.weight
    lora_unet_blocks_0_self_attn_q.lora_down.weight           kohya, musubi-tuner

``wan_model.weights.lora_names`` has the table of the official names.

Source: the converters of diffusers' ``lora_conversion_utils.py``.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from wan_model.weights.lora_names import COMFYUI_PREFIX, DIFFUSERS_PREFIX, KOHYA_PREFIX, kohya_spelling, official_name

Part = Literal["down", "up", "up_bias", "alpha", "diff", "diff_b"]

_PREFIXES = ("base_model.model.", "_orig_mod.", DIFFUSERS_PREFIX, COMFYUI_PREFIX)
_PARTS: dict[str, Part] = {
    "lora_A.weight": "down",
    "lora_A.default.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_B.default.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_B.default.bias": "up_bias",
    "lora_up.bias": "up_bias",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
}

_SUPPORTED = "LoRA of Wan 2.1 text-to-video is supported"
_DORA = re.compile(r"(?:^|\.)(?:lora_magnitude_vector|dora_scale)(?:\.|$)")
_LYCORIS = re.compile(r"\.(?:hada_|lokr_|oft_|on_input|glora_|lora_mid|[ab][12]\.weight$)")
_OTHER_MODELS = (
    (re.compile(r"[._](?:k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k)[._]"), "an image-to-video model"),
    (re.compile(r"(?:^|[._])(?:img_emb|image_embedder)[._]"), "an image-to-video model"),
    (re.compile(r"^transformer_2\."), "Wan 2.2, which has a second transformer"),
    (re.compile(r"(?:^|[._])vace_"), "VACE"),
    (re.compile(r"^(?:text_encoder|lora_te)"), "a text encoder"),
)


def shown(key: str) -> str:
    """A key as it may stand in a message: without control characters, at most 200 characters."""
    return key if key.isprintable() and len(key) <= 200 else ascii(key[:200])


def refuse_other_kinds(keys: Iterable[str], where: str) -> None:
    """Refuse files that are no plain LoRA, or are one of another model, as their keys tell.

    Raises:
        ValueError: naming the kind and the first such key.
    """
    for key in keys:
        if _DORA.search(key):
            raise ValueError(f"{where} is a DoRA (it holds {shown(key)}), which is not supported; {_SUPPORTED}")
        if _LYCORIS.search(key):
            raise ValueError(
                f"{where} is a LoHa, LoKr or another kind of LyCORIS (it holds {shown(key)}), which is not supported; "
                f"{_SUPPORTED}"
            )
        for pattern, model in _OTHER_MODELS:
            if pattern.search(key):
                raise ValueError(f"{where} is for {model} (it holds {shown(key)}); {_SUPPORTED}")


def spellings(keys: Iterable[str]) -> dict[str, str]:
    """The weights' names (without ``.weight`` and ``.bias``) by all their spellings in LoRA files without a prefix.

    Args:
        keys: of the transformer's tensors.
    """
    found: dict[str, str] = {}
    for key in keys:
        name = key.removesuffix(".weight").removesuffix(".bias")
        for own in (name, official_name(name)):
            found[own] = found[kohya_spelling(own)] = name
    return found


def split_key(key: str) -> tuple[str, Part] | None:
    """A key's name without its prefix, and the part that it holds; None for keys that no LoRA has."""
    start = 0
    if not key.startswith(KOHYA_PREFIX):
        while prefix := next((prefix for prefix in _PREFIXES if key.startswith(prefix, start)), None):
            start += len(prefix)
    # The longest ending first: ``lora.down.weight`` before others that a name could end with.
    for ending in sorted(_PARTS, key=len, reverse=True):
        if key.endswith(f".{ending}"):
            return key[start : -len(ending) - 1], _PARTS[ending]
    return None


def made_by_peft(keys: Iterable[str]) -> bool:
    """Whether keys have the prefix that peft saves with, beside its ``adapter_config.json``."""
    return any(key.startswith("base_model.model.") for key in keys)


def refuse_stated_models(statements: Mapping[str, str], where: str) -> None:
    """Refuse a file that says that it was made for Wan 2.2 or for image-to-video.

    Args:
        statements: of the model that the file was trained on, by the name of the field.
        where: the file.

    Raises:
        ValueError: naming the field and its value.
    """
    for field, value in statements.items():
        text = value[:1000].lower()
        if re.search(r"wan[ _.-]?2[._]?2", text):
            model = "Wan 2.2"
        elif re.search(r"wan.*i2v", text) and "t2v" not in text:
            model = "an image-to-video model"
        else:
            continue
        raise ValueError(f"{where} is for {model} ({field} is {shown(value)}); {_SUPPORTED}")
