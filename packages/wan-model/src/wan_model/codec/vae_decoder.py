"""The decoder of Wan 2.1's autoencoder, latent frame by latent frame, with diffusers' parameter names.

This separate implementation exists because importing diffusers takes seconds, and because callers keep the cache of
previous frames (``FrameCache``) per tile.

Shapes: B videos, C channels, t frames of a step (1 latent frame, or the frames upsampled from it), H rows, W columns.

Source: the official ``vae.py`` (``Decoder3d``) and diffusers' ``AutoencoderKLWan``, with equal results.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model.config_checks import check_autoencoder
from wan_model.weights.model_folder import DIFFUSERS_STEM, read_json, read_tensors

_PREFIXES = ("decoder.", "post_quant_conv.")

# For each causal convolution the last two frames of its input.
FrameCache = dict[nn.Module, Tensor]


class CausalConv(nn.Conv3d):
    """A convolution over the current and the two previous frames; rows and columns are padded with zeros."""

    def __init__(self, channels_in: int, channels_out: int, frames: int = 1, side: int = 1) -> None:
        super().__init__(channels_in, channels_out, (frames, side, side), padding=(0, side // 2, side // 2))

    def reset_parameters(self) -> None:
        """No-op: the weights are loaded later."""

    def forward(self, x_BCtHW: Tensor, frame_cache: FrameCache | None = None) -> Tensor:
        """Convolve the next frames; zeros stand for the frames before the first."""
        if self.kernel_size[0] > 1:
            assert frame_cache is not None, "a convolution over frames needs a frame cache"
            before = frame_cache.get(self)
            if before is None:
                before = x_BCtHW.new_zeros(*x_BCtHW.shape[:2], 2, *x_BCtHW.shape[3:])
            x_BCtHW = torch.cat([before, x_BCtHW], dim=2)
            # A copy: a view of two frames would keep the storage of all.
            frame_cache[self] = x_BCtHW[:, :, -2:].clone()
        return super().forward(x_BCtHW)


class Conv2d(nn.Conv2d):
    """A 2D convolution without initialisation."""

    def reset_parameters(self) -> None:
        """No-op: the weights are loaded later."""


class ChannelNorm(nn.Module):
    """RMS norm over the channels of every position, with a weight for each channel."""

    def __init__(self, channels: int, *, frames: bool) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.empty(channels, *(1,) * (3 if frames else 2)))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, in fp32 for 16-bit inputs."""
        return F.normalize(x.float(), dim=1).to(x.dtype) * self.scale * self.gamma


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, with a skip connection."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(channels_in, frames=True), CausalConv(channels_in, channels_out, 3, 3)
        self.norm2, self.conv2 = ChannelNorm(channels_out, frames=True), CausalConv(channels_out, channels_out, 3, 3)
        self.conv_shortcut = CausalConv(channels_in, channels_out) if channels_in != channels_out else nn.Identity()

    def forward(self, x_BCtHW: Tensor, frame_cache: FrameCache) -> Tensor:
        """Apply the block; only the number of channels changes."""
        out = self.conv1(F.silu(self.norm1(x_BCtHW)), frame_cache)
        out = self.conv2(F.silu(self.norm2(out)), frame_cache)
        return out + self.conv_shortcut(x_BCtHW)


class FrameAttention(nn.Module):
    """Self-attention of one head within each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, frames=False)
        self.to_qkv, self.proj = Conv2d(channels, 3 * channels, 1), Conv2d(channels, channels, 1)

    def forward(self, x_BCtHW: Tensor) -> Tensor:
        """Attend, with a skip connection; the shape is kept."""
        batch, _, _, height, _ = x_BCtHW.shape
        frames = rearrange(x_BCtHW, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3)
        attended = F.scaled_dot_product_attention(q, k, v)
        out = self.proj(rearrange(attended, "n 1 (h w) c -> n c h w", h=height))
        return x_BCtHW + rearrange(out, "(b t) c h w -> b c t h w", b=batch)


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])

    def forward(self, x_BCtHW: Tensor, frame_cache: FrameCache) -> Tensor:
        """Apply the block; only the number of channels changes."""
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x_BCtHW, frame_cache)), frame_cache)
        return out


class Upsample(nn.Module):
    """Doubles rows and columns and halves the channels; with ``time`` also doubles all frames but a video's first."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv(channels, 2 * channels, 3) if time else None

    def forward(self, x_BCtHW: Tensor, frame_cache: FrameCache) -> Tensor:
        """Apply the block; the frames are upsampled."""
        batch = x_BCtHW.shape[0]
        if self.time_conv is not None:
            if self.time_conv in frame_cache:
                x_BCtHW = rearrange(
                    self.time_conv(x_BCtHW, frame_cache), "b (two c) t h w -> b c (t two) h w", two=2
                ).contiguous()
            else:
                # The first frame is not doubled, and zeros replace it in the cache of the next frames.
                frame_cache[self.time_conv] = torch.zeros_like(x_BCtHW[:, :, :1]).repeat(1, 1, 2, 1, 1)
        frames = rearrange(x_BCtHW, "b c t h w -> (b t) c h w")
        doubled = F.interpolate(frames.float(), scale_factor=(2.0, 2.0), mode="nearest-exact").to(frames.dtype)
        return rearrange(self.resample["1"](doubled), "(b t) c h w -> b c t h w", b=batch)


class UpBlock(nn.Module):
    """Residual blocks, followed by an upsampling in all blocks but the last."""

    def __init__(self, channels_in: int, channels_out: int, residuals: int, upsampling: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(residuals)]
        )
        self.upsamplers = None
        if upsampling is not None:
            self.upsamplers = nn.ModuleList([Upsample(channels_out, time=upsampling == "time")])

    def forward(self, x_BCtHW: Tensor, frame_cache: FrameCache) -> Tensor:
        """Apply the block; the frames are upsampled."""
        for residual in self.resnets:
            x_BCtHW = residual(x_BCtHW, frame_cache)
        return x_BCtHW if self.upsamplers is None else self.upsamplers[0](x_BCtHW, frame_cache)


class _Decoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        base = config.get("decoder_base_dim") or config["base_dim"]
        multiples = list(config["dim_mult"])
        widths = [base * multiple for multiple in [multiples[-1], *reversed(multiples)]]
        in_time = list(reversed(config["temperal_downsample"]))
        self.conv_in = CausalConv(config["z_dim"], widths[0], 3, 3)
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (channels_in, channels_out) in enumerate(itertools.pairwise(widths)):
            upsampling = None if i == len(multiples) - 1 else ("time" if in_time[i] else "space")
            # Each upsampling has halved the channels.
            halved = channels_in // 2 if i else channels_in
            self.up_blocks.append(UpBlock(halved, channels_out, config["num_res_blocks"] + 1, upsampling))
        self.norm_out = ChannelNorm(widths[-1], frames=True)
        self.conv_out = CausalConv(widths[-1], 3, 3, 3)


class VaeDecoder(nn.Module):
    """The modules that decode latents to pixels; ``wan_model.codec.tiled_decode`` calls them.

    Args:
        config: the content of diffusers' ``vae/config.json``.
        where: the beginning of messages about it, such as the file.

    Raises:
        ValueError: see ``check_autoencoder``.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "the autoencoder's configuration") -> None:
        super().__init__()
        check_autoencoder(config, where)
        self.post_quant_conv = CausalConv(config["z_dim"], config["z_dim"])
        self.decoder = _Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        """The weights' precision."""
        return self.post_quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """The weights' device."""
        return self.post_quant_conv.weight.device

    @classmethod
    def of_state(cls, config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> "VaeDecoder":
        """A decoder that uses these tensors without a copy; tensors of other parts are ignored.

        Raises:
            ValueError: missing or misshapen tensors.
        """
        with torch.device("meta"):
            made = cls(config)
        mine = {key: value for key, value in state.items() if key.startswith(_PREFIXES)}
        wanted = {key: value.shape for key, value in made.state_dict().items()}
        for key in sorted(wanted.keys() | mine.keys()):
            got, want = mine.get(key), wanted.get(key)
            if got is None or got.shape != want:
                found = "missing" if got is None else list(got.shape)
                expected = "none" if want is None else list(want)
                raise ValueError(
                    f"the weights in {where} are not those of Wan 2.1's decoder: {key} is {found}, expected {expected}"
                )
        made.load_state_dict(mine, assign=True)
        return made.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype = torch.float32) -> "VaeDecoder":
        """Load from a diffusers ``vae`` folder, on the CPU.

        Raises:
            ValueError: files that are missing or damaged, or weights of another model.
        """
        file = folder / "config.json"
        with torch.device("meta"):
            made = cls(read_json(file), str(file))
        shapes = {key: value.shape for key, value in made.state_dict().items()}
        made.load_state_dict(read_tensors(folder, DIFFUSERS_STEM, shapes, dtype=dtype, prefixes=_PREFIXES), assign=True)
        return made.eval().requires_grad_(False)
