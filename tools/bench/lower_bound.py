"""A lower bound on time: only the matrix products and the attention of a forward pass.

The shapes and weights are the model's. The input of each product is the output of the one before, so that autograd runs
exactly their backward passes. Products include their biases, as in one call of torch; norms, modulation, gates, rotary
embedding and activations are omitted.
"""

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from wan_model import PackLayout, WanDiT


def _attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, q_offsets: tuple[int, ...], k_offsets: tuple[int, ...]
) -> Tensor:
    def segments(x: Tensor, offsets: tuple[int, ...]) -> list[Tensor]:
        return [x[a:b].view(1, b - a, heads, -1).transpose(1, 2) for a, b in itertools.pairwise(offsets)]

    parts = [
        F.scaled_dot_product_attention(*triple).transpose(1, 2).flatten(2)[0]
        for triple in zip(segments(q, q_offsets), segments(k, k_offsets), segments(v, k_offsets), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def products_only(model: WanDiT, tokens_SC: Tensor, text_BTD: Tensor, layout: PackLayout) -> Tensor:
    """The products of one forward pass on a pack without padding, except the embedding of the timesteps."""
    weights = dict(model.named_parameters())
    heads = model.config.num_heads

    def product(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"].flatten(1), weights[f"{name}.bias"])

    text = product(text_BTD.flatten(0, 1), "condition_embedder.text_embedder.linear_1")
    text = product(text, "condition_embedder.text_embedder.linear_2")
    text_offsets = tuple(i * text_BTD.shape[1] for i in range(layout.num_samples + 1))
    x = product(tokens_SC, "patch_embedding")
    for i in range(model.config.num_layers):
        for name, source, offsets in (("attn1", None, layout.offsets), ("attn2", text, text_offsets)):
            source = x if source is None else source
            q, k, v = (
                product(x, f"blocks.{i}.{name}.to_q"),
                product(source, f"blocks.{i}.{name}.to_k"),
                product(source, f"blocks.{i}.{name}.to_v"),
            )
            x = product(_attend(q, k, v, heads, layout.offsets, offsets), f"blocks.{i}.{name}.to_out.0")
        x = product(product(x, f"blocks.{i}.ffn.net.0.proj"), f"blocks.{i}.ffn.net.2")
    return product(x, "proj_out")
