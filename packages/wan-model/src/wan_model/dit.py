"""The Wan 2.1 diffusion transformer, written as single-device mathematics against ``Ops``.

Legend: S tokens of the pack (this rank's rows between shard and gather), B samples, T text length, D hidden width,
H heads on this rank, E head width, C values of a token.

State-dict keys are those of diffusers' ``WanTransformer3DModel``; released weights need no renaming.
Source: the official Wan 2.1 ``model.py`` and diffusers' ``transformer_wan.py``.
"""

import dataclasses
import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model.config import WanConfig
from wan_model.ops import Ops, TorchOps
from wan_model.pack import PackLayout, sample_index
from wan_model.rope import rotary_tables, rotate


@dataclasses.dataclass(frozen=True)
class Stage:
    """The part of the model that one pipeline stage holds: layers ``first`` to ``last`` (excluded), and its ends."""

    first: int
    last: int
    is_first: bool
    is_last: bool

    @classmethod
    def whole(cls, config: WanConfig) -> "Stage":
        """All layers and both ends."""
        return cls(0, config.num_layers, True, True)


def timestep_features(timesteps_B: Float[Tensor, "B"], width: int) -> Float[Tensor, "B width"]:
    """[cos, sin] of t * 10000^(-2i/width), fp32: bf16 would round a timestep by up to 2."""
    half = width // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps_B.device) / half
    angles = timesteps_B.float()[:, None] * exponent.exp()
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def layer_norm(x_SD: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm in fp32; the caller rounds."""
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    return F.layer_norm(x_SD.float(), x_SD.shape[-1:], weight, bias, eps)


def per_token(rows_BD: Tensor, index_S: Tensor) -> Tensor:
    """Each token's row of a per-sample table; one sample needs no copy, it broadcasts."""
    return rows_BD if rows_BD.shape[0] == 1 else rows_BD.index_select(0, index_S)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias, in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_SD: Tensor) -> Tensor:
        """Normalise the last axis; the result has the input's precision."""
        return layer_norm(x_SD, self.eps, self.weight, self.bias).to(x_SD.dtype)


class Attention(nn.Module):
    """Queries from the tokens; keys and values from the tokens (self) or from the text (cross)."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        width = config.hidden_size
        self.ops = ops
        self.heads = ops.local_heads(config.num_heads)
        self.to_q = ops.column_linear(width, width)
        self.to_k = ops.column_linear(width, width)
        self.to_v = ops.column_linear(width, width)
        self.norm_q = ops.norm_across_heads(width, config.eps)
        self.norm_k = ops.norm_across_heads(width, config.eps)
        self.to_out = nn.ModuleList([ops.row_linear(width, width)])

    def forward(
        self,
        x_SD: Tensor,
        source_KD: Tensor,
        tables: tuple[Tensor, Tensor] | None,
        q_offsets: tuple[int, ...],
        k_offsets: tuple[int, ...],
    ) -> Tensor:
        """Attend; both inputs have entered (see ``Ops``), the result is this rank's rows."""
        q = rearrange(self.norm_q(self.to_q(x_SD)), "s (h e) -> s h e", h=self.heads)
        k = rearrange(self.norm_k(self.to_k(source_KD)), "k (h e) -> k h e", h=self.heads)
        v = rearrange(self.to_v(source_KD), "k (h e) -> k h e", h=self.heads)
        if tables is not None:
            q, k = rotate(q, tables), rotate(k, tables)
        attended = self.ops.attention(q, k, v, q_offsets, k_offsets)
        out: Tensor = self.to_out[0](rearrange(attended, "s h e -> s (h e)"))
        return out


class FeedForwardIn(nn.Module):
    """The first linear with its tanh-GELU; a module of its own because diffusers' keys have it so."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.proj = ops.column_linear(config.hidden_size, config.ffn_dim)

    def forward(self, x_SD: Tensor) -> Tensor:
        """Expand and activate."""
        return F.gelu(self.proj(x_SD), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        # diffusers has a dropout at 1; the numbers are part of the keys.
        self.net = nn.ModuleDict(
            {"0": FeedForwardIn(config, ops), "2": ops.row_linear(config.ffn_dim, config.hidden_size)}
        )

    def forward(self, x_SD: Tensor) -> Tensor:
        """Apply to tokens that have entered; the result is this rank's rows."""
        out: Tensor = self.net["2"](self.net["0"](x_SD))
        return out


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, modulated by the sample's timestep."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.eps, self.ops = config.eps, ops
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, config.hidden_size))
        self.attn1 = Attention(config, ops)
        self.norm2 = LayerNorm(config.hidden_size, config.eps)
        self.attn2 = Attention(config, ops)
        self.ffn = FeedForward(config, ops)

    def forward(
        self,
        x_SD: Tensor,
        time_B6D: Tensor,
        text_TD: Tensor,
        index_S: Tensor,
        tables: tuple[Tensor, Tensor],
        offsets: tuple[int, ...],
        text_offsets: tuple[int, ...],
    ) -> Tensor:
        """One layer. Modulation and residual gating are fp32, as in the official code."""
        modulation = self.scale_shift_table.float() + time_B6D.float()
        shift1, scale1, gate1, shift2, scale2, gate2 = (per_token(row, index_S) for row in modulation.unbind(dim=1))
        dtype = x_SD.dtype

        normed = (layer_norm(x_SD, self.eps) * (1 + scale1) + shift1).to(dtype)
        whole = self.ops.enter_tokens(normed)
        attended = self.attn1(whole, whole, tables, offsets, offsets)
        x_SD = (x_SD.float() + attended * gate1).to(dtype)

        whole = self.ops.enter_tokens(self.norm2(x_SD))
        x_SD = x_SD + self.attn2(whole, self.ops.enter_text(text_TD), None, offsets, text_offsets)

        normed = (layer_norm(x_SD, self.eps) * (1 + scale2) + shift2).to(dtype)
        hidden = self.ffn(self.ops.enter_tokens(normed))
        return (x_SD.float() + hidden.float() * gate2).to(dtype)


class TwoLayers(nn.Module):
    """Linear, activation, linear: the shape of both embedders; its names are part of diffusers' keys."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)


class ConditionEmbedder(nn.Module):
    """Timesteps and text to the width of the model."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLayers(config.freq_dim, config.hidden_size)
        self.time_proj = nn.Linear(config.hidden_size, 6 * config.hidden_size)
        self.text_embedder = TwoLayers(config.text_dim, config.hidden_size)
        # Time reaches the loss through each rank's own rows only; text enters every rank's heads whole.
        ops.on_token_rows(self.time_embedder)
        ops.on_token_rows(self.time_proj)

    def time(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """(embedding [B, D], projection [B, 6, D])."""
        mlp = self.time_embedder
        features = timestep_features(timesteps_B, self.freq_dim).to(mlp.linear_1.weight.dtype)
        embedding = mlp.linear_2(F.silu(mlp.linear_1(features)))
        projection = self.time_proj(F.silu(embedding).to(self.time_proj.weight.dtype))
        return embedding, rearrange(projection, "b (six d) -> b six d", six=6)

    def text(self, text_BTD: Tensor) -> Tensor:
        """Embedded text rows of all samples, [B*T, D]; zero rows go through the biases too, as in the official code."""
        mlp = self.text_embedder
        rows = rearrange(text_BTD, "b t d -> (b t) d").to(mlp.linear_1.weight.dtype)
        out: Tensor = mlp.linear_2(F.gelu(mlp.linear_1(rows), approximate="tanh"))
        return out


class PatchEmbedding(nn.Module):
    """The patch convolution as a linear on tokens; the weight keeps the convolution's shape [D, c, pf, ph, pw]."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.in_channels, *config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, tokens_SC: Tensor) -> Tensor:
        """Embed tokens whose values run (pf, ph, pw, c)."""
        weight = rearrange(self.weight, "d c f h w -> d (f h w c)")
        return F.linear(tokens_SC.to(weight.dtype), weight, self.bias)


class WanDiT(nn.Module):
    """Wan 2.1's velocity field on packs of samples.

    Args:
        config: sizes.
        ops: the runtime; ``TorchOps`` by default.
        stage: the part to build; all of it by default.

    The parameters are uninitialised until ``init_weights`` or a loader of ``wan_model.weights`` fills them.
    """

    def __init__(self, config: WanConfig, ops: Ops | None = None, stage: Stage | None = None) -> None:
        super().__init__()
        self.config = config
        self.ops: Ops = ops or TorchOps()
        self.stage = stage or Stage.whole(config)
        self.recompute_blocks = False
        self.condition_embedder = ConditionEmbedder(config, self.ops)
        if self.stage.is_first:
            self.patch_embedding = PatchEmbedding(config)
            self.ops.on_token_rows(self.patch_embedding)
        # Numbered by their place in the whole model, so that a stage's keys are the whole model's.
        self.blocks = nn.ModuleDict()
        for i in range(self.stage.first, self.stage.last):
            block = Block(config, self.ops)
            self.ops.on_token_rows(block.norm2)
            self.ops.on_token_rows(nn.ParameterList([block.scale_shift_table]))
            self.blocks[str(i)] = block
        if self.stage.is_last:
            self.proj_out = nn.Linear(config.hidden_size, config.token_out)
            self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.hidden_size))
            self.ops.on_token_rows(self.proj_out)
            self.ops.on_token_rows(nn.ParameterList([self.scale_shift_table]))

    def forward(
        self,
        x: Tensor,
        timesteps_B: Float[Tensor, "B"],
        text_BTD: Float[Tensor, "B T D"],
        layout: PackLayout,
    ) -> Tensor:
        """Predict the velocity ``noise - clean`` of every token.

        Args:
            x: tokens [S, C] on the first stage; elsewhere the previous stage's output, this rank's rows [S, D].
            timesteps_B: 1000 * sigma of each sample, fp32.
            text_BTD: text embeddings, zero behind their true length.
            layout: where each sample lies.

        Returns:
            Tokens [S, C] in the weights' precision on the last stage (all rows, on every rank); else hidden rows.
        """
        assert timesteps_B.shape[0] == text_BTD.shape[0] == layout.num_samples, "one timestep and one text a sample"
        embedding_BD, time_B6D = self.condition_embedder.time(timesteps_B)
        text_TD = self.condition_embedder.text(text_BTD)
        text_offsets = tuple(i * text_BTD.shape[1] for i in range(layout.num_samples + 1))
        index_S = self.ops.local_index(sample_index(layout, text_BTD.device))
        tables = rotary_tables(layout, self.config.head_dim, text_BTD.device)

        x_SD = self.patch_embedding(self.ops.shard_tokens(x)) if self.stage.is_first else x
        for block in self.blocks.values():
            args = (x_SD, time_B6D, text_TD, index_S, tables, layout.offsets, text_offsets)
            x_SD = self.ops.checkpoint(block, *args) if self.recompute_blocks and self.training else block(*args)
        if not self.stage.is_last:
            return x_SD

        modulation = self.scale_shift_table.float() + embedding_BD.float()[:, None]
        shift, scale = (per_token(row, index_S) for row in modulation.unbind(dim=1))
        normed = (layer_norm(x_SD, self.config.eps) * (1 + scale) + shift).to(x_SD.dtype)
        return self.ops.gather_tokens(self.proj_out(normed))
