"""LoRA in diffusers' format, merged into the weights when they are loaded.

A file holds, for a linear of the transformer, ``transformer.NAME.lora_A.weight`` [r, in],
``transformer.NAME.lora_B.weight`` [out, r] and, in some files, ``transformer.NAME.alpha`` (or ``lora_alpha`` in the
file's metadata). The merged weight is W + scale * alpha / r * B A, with alpha = r where the file gives none. Anything
else (changed biases or norms) is refused. Source: peft's ``LoraLayer``, diffusers'
``load_lora_weights``.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wan_model.config import WanConfig
from wan_model.dit.model import WanDiT
from wan_model.weights.model_folder import open_weights
from wan_model.weights.transformer import expected_shapes, local_slices, local_tensor

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_KEY = re.compile(r"(?:transformer\.)?(?P<name>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)")


@dataclasses.dataclass(frozen=True)
class LoraWeights:
    """The adapters of one file, by the key of the weight that each is added to.

    Attributes:
        down, up: A [r, in] and B [out, r].
        factors: of the products B A: scale * alpha / r.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    factors: dict[str, float]

    @torch.no_grad()
    def merge_into(self, model: WanDiT) -> None:
        """Add the adapters to a model's weights; sums are fp32, rounded once to the weight's precision."""
        for key, down in self.down.items():
            parameter = model.get_parameter(key)
            delta = (self.up[key].float() @ down.float()).view(parameter.shape) * self.factors[key]
            held = local_tensor(parameter)
            held.copy_(held.float() + delta[local_slices(model, parameter)].to(held.device))


def read_lora(path: str | os.PathLike[str], config: WanConfig, scale: float = 1.0) -> LoraWeights:
    """Read a file, or a folder with ``pytorch_lora_weights.safetensors`` in it.

    Args:
        path: of either.
        config: of the transformer.
        scale: factor of B A in addition to alpha / r; 0 leaves the weights unchanged.

    Raises:
        ValueError: no such file, or tensors that are not a LoRA of this transformer, naming the first.
    """
    path = Path(path)
    path = path / WEIGHTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no LoRA at {path}: expected a safetensors file in diffusers' format")
    with open_weights(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  the file is no mapping
        alpha = _alpha_of(file.metadata() or {})
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{path} holds {key}, which is no part of a LoRA in diffusers' format "
                "(transformer.NAME.lora_A.weight and lora_B.weight); convert it with diffusers first"
            )
        parts.setdefault(f"{match['name']}.weight", {})[match["part"]] = tensor
    shapes, found = expected_shapes(config), LoraWeights({}, {}, {})
    for key, own in parts.items():
        down, up = own.get("lora_A.weight"), own.get("lora_B.weight")
        if down is None or up is None:
            raise ValueError(f"{path} holds only one of lora_A and lora_B for {key}; expected both")
        wanted = shapes.get(key)
        if wanted is None:
            raise ValueError(f"{path} changes {key}, which this transformer does not have; is it for another model?")
        got = (up.shape[0], down[0].numel())
        if down.shape[0] != up.shape[1] or got != (wanted[0], torch.Size(wanted[1:]).numel()):
            raise ValueError(
                f"{path} changes {key} of shape {list(wanted)} by {list(up.shape)} times {list(down.shape)}, "
                "which does not fit; is it for another model?"
            )
        rank = down.shape[0]
        own_alpha = float(own["alpha"]) if "alpha" in own else alpha
        found.down[key], found.up[key] = down.flatten(1), up.flatten(1)
        found.factors[key] = scale * (rank if own_alpha is None else own_alpha) / rank
    if not found.down:
        raise ValueError(f"{path} changes nothing; expected a LoRA in diffusers' format")
    return found


def _alpha_of(metadata: Mapping[str, str]) -> float | None:
    """``lora_alpha`` in peft's configuration, which diffusers writes into the metadata as JSON."""
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError:
        return None
    alpha = content.get("transformer.lora_alpha") if isinstance(content, dict) else None
    return float(alpha) if isinstance(alpha, int | float) else None
