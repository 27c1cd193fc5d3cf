"""The text encoder of Wan 2.1, UMT5's encoder, with transformers' parameter names.

This separate implementation exists because importing transformers takes seconds, and because it embeds a prompt at its
true length: masked positions contribute nothing, and a prompt of twenty tokens takes a twenty-fifth of the operations
of 512 tokens.

Shapes: L tokens of a prompt, D width, H heads, E head width.

Source: the official ``t5.py`` and transformers' ``UMT5EncoderModel``, with equal results.
"""

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model.config_checks import check_text_encoder
from wan_model.weights.model_folder import name_in_file, open_weights, read_json, stored_shape, text_weight_files


class _Linear(nn.Linear):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, bias=False)

    def reset_parameters(self) -> None:
        """No-op: the weights are loaded later."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """No-op: the weights are loaded later."""


class _Norm(nn.Module):
    """RMS norm with a weight and fp32 statistics."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x_LD: Tensor) -> Tensor:
        scale = torch.rsqrt(x_LD.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (x_LD * scale).to(self.weight.dtype)


class _Attention(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
        self.heads = config["num_heads"]
        self.buckets = config["relative_attention_num_buckets"]
        self.max_distance = config["relative_attention_max_distance"]
        self.q, self.k, self.v = (_Linear(width, inner) for _ in range(3))
        self.o = _Linear(inner, width)
        self.relative_attention_bias = _Embedding(self.buckets, self.heads)

    def forward(self, x_LD: Tensor) -> Tensor:
        q, k, v = (rearrange(to(x_LD), "l (h e) -> h l e", h=self.heads) for to in (self.q, self.k, self.v))
        buckets = distance_buckets(x_LD.shape[0], self.buckets, self.max_distance, x_LD.device)
        bias = rearrange(self.relative_attention_bias(buckets), "q k h -> h q k")
        # T5's scores are not divided by the root of the head's width.
        scores = q @ k.transpose(-1, -2) + bias
        attended = scores.float().softmax(dim=-1).to(scores.dtype) @ v
        out: Tensor = self.o(rearrange(attended, "h l e -> l (h e)"))
        return out


class _SelfAttention(nn.Module):
    def __init__(self, config: Mapping[str, Any], eps: float) -> None:
        super().__init__()
        self.SelfAttention = _Attention(config)
        self.layer_norm = _Norm(config["d_model"], eps)

    def forward(self, x_LD: Tensor) -> Tensor:
        out: Tensor = x_LD + self.SelfAttention(self.layer_norm(x_LD))
        return out


class _Gated(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = config["d_model"], config["d_ff"]
        self.wi_0, self.wi_1, self.wo = _Linear(width, inner), _Linear(width, inner), _Linear(inner, width)

    def forward(self, x_LD: Tensor) -> Tensor:
        out: Tensor = self.wo(F.gelu(self.wi_0(x_LD), approximate="tanh") * self.wi_1(x_LD))
        return out


class _FeedForward(nn.Module):
    def __init__(self, config: Mapping[str, Any], eps: float) -> None:
        super().__init__()
        self.DenseReluDense = _Gated(config)
        self.layer_norm = _Norm(config["d_model"], eps)

    def forward(self, x_LD: Tensor) -> Tensor:
        out: Tensor = x_LD + self.DenseReluDense(self.layer_norm(x_LD))
        return out


class _Block(nn.Module):
    def __init__(self, config: Mapping[str, Any], eps: float) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_SelfAttention(config, eps), _FeedForward(config, eps)])

    def forward(self, x_LD: Tensor) -> Tensor:
        for layer in self.layer:
            x_LD = layer(x_LD)
        return x_LD


class _Stack(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        eps = config["layer_norm_epsilon"]
        self.block = nn.ModuleList([_Block(config, eps) for _ in range(config["num_layers"])])
        self.final_layer_norm = _Norm(config["d_model"], eps)


def distance_buckets(
    length: int, buckets: int, max_distance: int, device: torch.device | None = None
) -> Int[Tensor, "length length"]:
    """T5's bucket of the relative position of each pair of tokens.

    Half of the buckets are for positive distances. Of each half one half counts single tokens; the other buckets grow
    logarithmically up to ``max_distance``.
    """
    places = torch.arange(length, device=device)
    distance = places[None, :] - places[:, None]
    half = buckets // 2
    exact = half // 2
    far = distance.abs()
    grown = exact + (
        (far.clamp(min=1).float() / exact).log() / math.log(max_distance / exact) * (half - exact)
    ).long().clamp(max=half - 1 - exact)
    return torch.where(far < exact, far, grown) + half * (distance > 0)


class TextEncoder(nn.Module):
    """Tokens to embeddings.

    Args:
        config: the content of transformers' ``text_encoder/config.json``.
        where: the beginning of messages about it, such as the file.

    Raises:
        ValueError: see ``check_text_encoder``.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "the text encoder's configuration") -> None:
        super().__init__()
        config = check_text_encoder(config, where)
        self.shared = _Embedding(config["vocab_size"], config["d_model"])
        self.encoder = _Stack(config)

    @torch.no_grad()
    def forward(self, ids_L: Int[Tensor, " L"]) -> Float[Tensor, "L D"]:
        """Embed one prompt at its true length."""
        x_LD = self.shared(ids_L)
        for block in self.encoder.block:
            x_LD = block(x_LD)
        out: Tensor = self.encoder.final_layer_norm(x_LD)
        return out

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return self.shared.weight.device

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "TextEncoder":
        """Load from a transformers ``text_encoder`` folder, on the CPU, tensor by tensor.

        Raises:
            ValueError: files that are missing or damaged, or weights of another model.
        """
        with torch.device("meta"):
            made = cls(read_json(folder / "config.json"), str(folder / "config.json"))
        files = text_weight_files(folder)
        shapes = {key: list(value.shape) for key, value in made.named_parameters()}
        if missing := sorted(shapes.keys() - files.keys()):
            raise ValueError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more of UMT5's weights")
        # Before anything is allocated: a configuration may claim any size.
        names = {}
        with contextlib.ExitStack() as stack:
            opened = {path: stack.enter_context(open_weights(path)) for path in {files[key] for key in shapes}}
            held = {path: set(file.keys()) for path, file in opened.items()}
            for key, shape in shapes.items():
                path = files[key]
                names[key] = name_in_file(key, held[path])
                if (found := list(stored_shape(opened[path], names[key], path))) != shape:
                    raise ValueError(f"{path} holds {key} of shape {found}; expected {shape}")
            made = made.to(dtype).to_empty(device="cpu").requires_grad_(False)
            for key, value in made.named_parameters():
                value.copy_(opened[files[key]].get_tensor(names[key]))
        return made.eval()
