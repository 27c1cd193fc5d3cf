"""LoRA files of the tiny model as trainers write them, and what diffusers makes of them. Only tests import this."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wan_model.testing import lora_reference
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.transformer import expected_shapes

Tensors = dict[str, Tensor]

# Of the tiny transformer.
base_weights = functools.partial(lora_reference.drawn_weights, TINY_CONFIG)
diffusers_transformer = functools.partial(lora_reference.diffusers_transformer, TINY_CONFIG)
pipeline_with_adapters = functools.partial(lora_reference.pipeline_with_adapters, TINY_CONFIG)
fused_by_diffusers = functools.partial(lora_reference.fused_by_diffusers, TINY_CONFIG)

_WIDTH, _INNER = TINY_CONFIG.hidden_size, TINY_CONFIG.ffn_dim
# [out, in] of the linears, by the official release's names.
IN_BLOCK = {
    **{f"{kind}_attn.{name}": (_WIDTH, _WIDTH) for kind in ("self", "cross") for name in "qkvo"},
    "ffn.0": (_INNER, _WIDTH),
    "ffn.2": (_WIDTH, _INNER),
}
BLOCK_LINEARS = {f"blocks.{i}.{name}": shape for i in range(TINY_CONFIG.num_layers) for name, shape in IN_BLOCK.items()}
OTHER_LINEARS = {
    "text_embedding.0": (_WIDTH, TINY_CONFIG.text_dim),
    "text_embedding.2": (_WIDTH, _WIDTH),
    "time_embedding.0": (_WIDTH, TINY_CONFIG.freq_dim),
    "time_embedding.2": (_WIDTH, _WIDTH),
    "time_projection.1": (6 * _WIDTH, _WIDTH),
}
HEAD = (TINY_CONFIG.token_out, _WIDTH)

# Linears that the LoRA changes, of the blocks and outside of them.
CHANGED = (
    *("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj"),
    *("condition_embedder.text_embedder.linear_2", "proj_out"),
)


class Drawn:
    """Random tensors of a seed."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """The next one."""
        return torch.randn(shape, generator=self._generator) * 0.1


def tiny_lora(rank: int = 3, *, alpha: float | None = None, seed: int = 2) -> Tensors:
    """Random changes of some linears, in diffusers' format."""
    generator, shapes = torch.Generator().manual_seed(seed), expected_shapes(TINY_CONFIG)
    tensors = {}
    for name in CHANGED:
        out, width = shapes[f"{name}.weight"]
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
        if alpha is not None:
            tensors[f"transformer.{name}.alpha"] = torch.tensor(alpha)
    return tensors


def comfy(*, ab: bool, alpha: float | None, ranks: Sequence[int] = (4,)) -> Tensors:
    """``diffusion_model.`` with ``lora_A`` and ``lora_B``, or ``lora_down`` and ``lora_up``."""
    draw, found = Drawn(1), {}
    down, up = ("lora_A", "lora_B") if ab else ("lora_down", "lora_up")
    for i, (name, (out, width)) in enumerate({**BLOCK_LINEARS, **OTHER_LINEARS}.items()):
        rank = ranks[i % len(ranks)]
        found[f"diffusion_model.{name}.{down}.weight"] = draw(rank, width)
        found[f"diffusion_model.{name}.{up}.weight"] = draw(out, rank)
        if alpha is not None and name in BLOCK_LINEARS:  # diffusers reads no alpha of the others
            found[f"diffusion_model.{name}.alpha"] = torch.tensor(alpha)
    return found


def kohya(alpha: float = 2.0, rank: int = 4) -> Tensors:
    """``lora_unet_`` with underscores, as musubi-tuner writes it; diffusers wants all linears of the blocks."""
    draw, found = Drawn(2), {}
    for name, (out, width) in BLOCK_LINEARS.items():
        own = f"lora_unet_{name.replace('.', '_')}"
        found[f"{own}.lora_down.weight"] = draw(rank, width)
        found[f"{own}.lora_up.weight"] = draw(out, rank)
        found[f"{own}.alpha"] = torch.tensor(alpha)
    return found


def lightx2v(alpha: float | None = None) -> Tensors:
    """A distillation: products, changes of biases and of the head, and changes of norms, which are zero."""
    draw, found = Drawn(3), comfy(ab=False, alpha=alpha)
    for name, (out, _) in {**BLOCK_LINEARS, **OTHER_LINEARS}.items():
        found[f"diffusion_model.{name}.diff_b"] = draw(out)
    found["diffusion_model.head.head.diff"] = draw(*HEAD)
    found["diffusion_model.head.head.diff_b"] = draw(HEAD[0])
    for name in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k", "norm3"):
        found[f"diffusion_model.blocks.0.{name}.diff"] = torch.zeros(_WIDTH)
    found["diffusion_model.blocks.0.norm3.diff_b"] = torch.zeros(_WIDTH)
    return found


def train_with_peft(weights: Tensors, wrap: Callable[[Any], Any]) -> Any:
    """diffusers' transformer with an adapter of peft whose matrices are random."""
    model = diffusers_transformer(weights)
    with torch.random.fork_rng(devices=[]):
        model = wrap(model)
    draw = Drawn(5)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(draw(*parameter.shape))
    return model
