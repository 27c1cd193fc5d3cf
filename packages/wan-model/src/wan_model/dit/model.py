"""The Wan 2.1 diffusion transformer, written as single-device mathematics against ``Ops``.

Legend: S tokens of the pack (this rank's rows between shard and gather), B samples, T text length, D hidden width,
H heads on this rank, E head width, C values of a token.

State-dict keys are those of diffusers' ``WanTransformer3DModel``; released weights need no renaming.
Source: the official Wan 2.1 ``model.py`` and diffusers' ``transformer_wan.py``.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model.config import WanConfig
from wan_model.dit.attention import Offsets
from wan_model.dit.elementwise import add_, at_least_fp32, gate_add_, layer_norm, norm_modulate, tanh_gelu_
from wan_model.dit.fp8 import FP8
from wan_model.dit.frozen import StreamedWeights
from wan_model.dit.lora import DOWN, UP, DropoutRows, dropout_over
from wan_model.dit.ops import Linear, Ops, TorchOps
from wan_model.dit.recompute import Recompute, check_recompute
from wan_model.dit.rope import rotary_table
from wan_model.pack import PackLayout, TokenRows

# As in diffusers' ``_keep_in_fp32_modules``, and adapters.
KEPT_IN_FP32 = (".time_embedder.", ".scale_shift_table", ".norm2.", f".{DOWN}.", f".{UP}.")


def precision_of(key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in a model of dtype ``dtype``."""
    kept = dtype.itemsize < 4 and any(part in f".{key}" for part in KEPT_IN_FP32)
    return torch.float32 if kept else dtype


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


@functools.lru_cache(maxsize=8)
def _frequencies(width: int, device: torch.device) -> Float[Tensor, " half"]:
    # The result is cached, and a tensor created in inference mode could not be used in training later.
    with torch.inference_mode(False):
        half = width // 2
        return 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=device) / half)


def timestep_features(timesteps_B: Float[Tensor, " B"], width: int) -> Float[Tensor, "B width"]:
    """[cos, sin] of t * 10000^(-2i/width), rounded to fp32.

    The angles are in fp64, as in Wan 2.1's ``sinusoidal_embedding_1d``: bf16 would round a timestep by up to 2, and
    fp32, which diffusers uses, an angle by up to 3e-5.
    """
    angles = timesteps_B.double()[:, None] * _frequencies(width, timesteps_B.device)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def modulation(table_1ND: Tensor, time_BND: Tensor) -> tuple[Tensor, ...]:
    """The N modulation vectors of each sample (table plus time embedding), fp32, [B, D] each."""
    return (at_least_fp32(table_1ND) + at_least_fp32(time_BND)).unbind(1)


class LayerNorm(nn.Module):
    """Layer norm with weight and bias, in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_SD: Tensor) -> Tensor:
        """Normalise the last axis; the result has the input's precision."""
        return layer_norm(x_SD, self.weight, self.bias, self.eps)


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

    def keys_values(self, text_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of texts: [rows, heads, width] each."""
        k_TD, v_TD = self.ops.project_text(text_TD, self.to_k, self.to_v)
        return self._by_head(self.norm_k(k_TD, None)), self._by_head(v_TD)

    def _by_head(self, x_SD: Tensor) -> Tensor:
        # A plain view, because small models are bound by call overhead.
        return x_SD.view(x_SD.shape[0], self.heads, -1)

    def attend_to_tokens(self, x_SD: Tensor, table_S1P: Tensor, offsets: Offsets) -> Tensor:
        """Self-attention, from and to the rows that this rank holds."""
        q_SD, k_SD, v_SD = self.ops.project_tokens(x_SD, self.to_q, self.to_k, self.to_v)
        q_SHE, k_SHE = self._by_head(self.norm_q(q_SD, table_S1P)), self._by_head(self.norm_k(k_SD, table_S1P))
        return self._out(self.ops.self_attention(q_SHE, k_SHE, self._by_head(v_SD), offsets))

    def attend_to_text(
        self, x_SD: Tensor, text: tuple[Tensor, Tensor], offsets: Offsets, text_offsets: Offsets
    ) -> Tensor:
        """Cross-attention to keys and values, from and to the rows that this rank holds."""
        (q_SD,) = self.ops.project_tokens(x_SD, self.to_q)
        q_SHE = self._by_head(self.norm_q(q_SD, None))
        return self._out(self.ops.cross_attention(q_SHE, *text, offsets, text_offsets))

    def _out(self, attended_SHE: Tensor) -> Tensor:
        out: Tensor = self.to_out[0](attended_SHE.flatten(1))
        return out


class FeedForwardIn(nn.Module):
    """The first linear with its tanh-GELU; a separate module because of diffusers' keys."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.proj = ops.column_linear(config.hidden_size, config.ffn_dim)

    def forward(self, x_SD: Tensor) -> Tensor:
        """Expand and activate; entered rows (see ``Ops``) of held ones."""
        (wide_SF,) = self.ops.project_tokens(x_SD, self.proj)
        return tanh_gelu_(wide_SF)


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        # diffusers has a dropout at 1; the numbers are part of the keys.
        self.net = nn.ModuleDict(
            {"0": FeedForwardIn(config, ops), "2": ops.row_linear(config.ffn_dim, config.hidden_size)}
        )

    def forward(self, x_SD: Tensor) -> Tensor:
        """From and to the rows that this rank holds."""
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

    def text_keys(self, text_TD: Tensor, dropout_seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of embedded texts for this layer's cross-attention."""
        rows = text_TD.shape[0]
        with dropout_over(None if dropout_seed is None else DropoutRows(dropout_seed, 0, rows, rows)):
            return self.attn2.keys_values(text_TD)

    def forward(
        self,
        x_SD: Tensor,
        time_B6D: Tensor,
        text: Tensor | tuple[Tensor, Tensor],
        held: TokenRows,
        table_S1P: Tensor,
        text_offsets: Offsets,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """One layer, on this rank's rows. Modulation and residual gating are fp32, as in the official code.

        ``text`` is the embedded texts, or the keys and values that ``text_keys`` returned for them. ``dropout_seed`` is
        of the dropout of adapters.
        """
        dropped = None
        if dropout_seed is not None:
            rows = self.ops.entered_rows(held.layout)
            dropped = DropoutRows(dropout_seed, rows.start, rows.stop, held.layout.total)
        with dropout_over(dropped):
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation(self.scale_shift_table, time_B6D)
            offsets = held.layout.offsets

            normed_SD = norm_modulate(x_SD, shift1, scale1, held, self.eps)
            x_SD = gate_add_(x_SD, self.attn1.attend_to_tokens(normed_SD, table_S1P, offsets), gate1, held)

            keys_values = self.text_keys(text, dropout_seed) if isinstance(text, Tensor) else text
            x_SD = add_(x_SD, self.attn2.attend_to_text(self.norm2(x_SD), keys_values, offsets, text_offsets))

            return gate_add_(x_SD, self.ffn(norm_modulate(x_SD, shift2, scale2, held, self.eps)), gate2, held)


class TwoLayers(nn.Module):
    """Linear, activation, linear: the shape of both embedders; its names are part of diffusers' keys."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width_in, width)
        self.linear_2 = Linear(width, width)


class ConditionEmbedder(nn.Module):
    """Timesteps and text to the width of the model."""

    def __init__(self, config: WanConfig, ops: Ops) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = TwoLayers(config.freq_dim, config.hidden_size)
        self.time_proj = Linear(config.hidden_size, 6 * config.hidden_size)
        self.text_embedder = TwoLayers(config.text_dim, config.hidden_size)
        # The time embedding affects the loss only through a rank's own rows; the text is an input of all ranks' heads.
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
        out: Tensor = mlp.linear_2(tanh_gelu_(mlp.linear_1(rows)))
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


@dataclasses.dataclass(frozen=True)
class PreparedText:
    """Keys and values of the texts, which do not depend on the timestep; see ``WanDiT.prepare_text``.

    Attributes:
        keys_values: of each block, by its name: [B * T, H, E] twice.
        samples: B.
        length: T.
    """

    keys_values: dict[str, tuple[Tensor, Tensor]]
    samples: int
    length: int


class WanDiT(nn.Module):
    """Wan 2.1's velocity field on packs of samples.

    Args:
        config: sizes.
        ops: the runtime; ``TorchOps`` by default.
        stage: the part to build; all of it by default.

    The parameters are uninitialised until ``init_weights`` or a loader of ``wan_model.weights.transformer`` fills them.
    """

    def __init__(self, config: WanConfig, ops: Ops | None = None, stage: Stage | None = None) -> None:
        super().__init__()
        self.config = config
        self.ops: Ops = ops or TorchOps()
        self.stage = stage or Stage.whole(config)
        self.recompute: Recompute = "none"
        self.streamed: StreamedWeights | None = None  # of frozen weights in main memory
        self.condition_embedder = ConditionEmbedder(config, self.ops)
        if self.stage.is_first:
            self.patch_embedding = PatchEmbedding(config)
            self.ops.on_token_rows(self.patch_embedding)
        # Layers are numbered over the whole model, so that a stage has the keys of the whole model.
        self.blocks = nn.ModuleDict()
        for i in range(self.stage.first, self.stage.last):
            block = Block(config, self.ops)
            self.ops.on_token_rows(block.norm2)
            self.ops.on_token_rows(nn.ParameterList([block.scale_shift_table]))
            self.blocks[str(i)] = block
        if self.stage.is_last:
            self.proj_out = Linear(config.hidden_size, config.token_out)
            self.scale_shift_table = nn.Parameter(torch.empty(1, 2, config.hidden_size))
            self.ops.on_token_rows(self.proj_out)
            self.ops.on_token_rows(nn.ParameterList([self.scale_shift_table]))

    def to_precision(self, dtype: torch.dtype) -> "WanDiT":
        """Convert the weights to a precision in place, except those that diffusers keeps in fp32.

        These are the time embedder, the modulation tables and the affine norm, 0.2 % of the released weights, and
        adapters. Weights in fp8 stay so.
        """
        for key, parameter in self.named_parameters():
            if parameter.dtype != FP8:
                parameter.data = parameter.data.to(precision_of(key, dtype))
        return self

    def prepare_text(self, text_BTD: Float[Tensor, "B T D"]) -> PreparedText:
        """Compute the keys and values of the texts, once for all sampling steps.

        Memory: two tensors of B * T rows of the hidden width for every block.

        Raises:
            ValueError: the embeddings do not have the model's text width.
        """
        assert self.streamed is None, "the blocks' weights are in main memory; give the texts to every call"
        self._check_text(text_BTD)
        text_TD = self.condition_embedder.text(text_BTD)
        keys_values = {name: block.text_keys(text_TD) for name, block in self._named_blocks()}
        return PreparedText(keys_values, text_BTD.shape[0], text_BTD.shape[1])

    def _named_blocks(self) -> Iterator[tuple[str, Block]]:
        for name, block in self.blocks.items():
            assert isinstance(block, Block)
            yield name, block

    def forward(
        self,
        x: Tensor,
        timesteps_B: Float[Tensor, " B"],
        text: Float[Tensor, "B T D"] | PreparedText,
        layout: PackLayout,
        dropout_seed: int | None = None,
    ) -> Tensor:
        """Predict the velocity ``noise - clean`` of every token.

        Args:
            x: tokens [S, C] on the first stage; elsewhere the previous stage's output, this rank's rows [S, D].
            timesteps_B: 1000 * sigma of each sample, fp32.
            text: zero-padded embeddings, or the result of ``prepare_text``.
            layout: the position of each sample.
            dropout_seed: of the dropout of adapters (``wan_model.dit.lora``); None drops nothing.

        Returns:
            Tokens [S, C] in the weights' precision on the last stage (all rows, on every rank); else hidden rows.

        Raises:
            ValueError: the inputs do not match the layout or the model's widths.
        """
        self._check_inputs(x, timesteps_B, text, layout)
        check_recompute(self.recompute)
        embedding_BD, time_B6D = self.condition_embedder.time(timesteps_B)
        # Once and not in each block, so that its gradient is summed over the blocks in fp32.
        time_B6D = at_least_fp32(time_B6D)
        texts: Mapping[str, Tensor | tuple[Tensor, Tensor]]
        if isinstance(text, PreparedText):
            length, texts = text.length, text.keys_values
        else:
            length, texts = text.shape[1], dict.fromkeys(self.blocks, self.condition_embedder.text(text))
        text_offsets = tuple(i * length for i in range(layout.num_samples + 1))
        held = self.ops.held_rows(layout)
        table_S1P = rotary_table(self.ops.entered_rows(layout), self.config.head_dim, x.device)

        x_SD = self.patch_embedding(self.ops.shard_tokens(x)) if self.stage.is_first else x
        recompute = self.recompute != "none" and torch.is_grad_enabled()
        for name, block in self.blocks.items():
            args = (x_SD, time_B6D, texts[name], held, table_S1P, text_offsets, dropout_seed)
            call = block if self.streamed is None else functools.partial(self.streamed.call, name, block)
            x_SD = self.ops.checkpoint(call, *args, mode=self.recompute) if recompute else call(*args)
        if not self.stage.is_last:
            return x_SD

        shift, scale = modulation(self.scale_shift_table, embedding_BD[:, None])
        normed = norm_modulate(x_SD, shift, scale, held, self.config.eps)
        return self.ops.gather_tokens(self.proj_out(normed))

    def _check_text(self, text_BTD: Tensor) -> None:
        if text_BTD.shape[2] != self.config.text_dim:
            raise ValueError(f"got text embeddings of width {text_BTD.shape[2]}; expected {self.config.text_dim}")

    def _check_inputs(self, x: Tensor, timesteps_B: Tensor, text: Tensor | PreparedText, layout: PackLayout) -> None:
        samples, config = layout.num_samples, self.config
        texts = text.samples if isinstance(text, PreparedText) else text.shape[0]
        if timesteps_B.shape[0] != samples or texts != samples:
            raise ValueError(
                f"got {timesteps_B.shape[0]} timesteps and {texts} texts; "
                f"expected one of each for every one of the layout's {samples} samples"
            )
        if isinstance(text, Tensor):
            self._check_text(text)
        if self.stage.is_first and tuple(x.shape) != (layout.total, config.token_in):
            raise ValueError(
                f"got tokens of shape {tuple(x.shape)}; expected {(layout.total, config.token_in)}: the layout's rows, "
                "padding included, and a patch's values"
            )
