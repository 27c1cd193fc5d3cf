"""The models and inputs of the benchmarks: ours and diffusers' with the same weights, on the same samples."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wan_model import PackLayout, WanConfig, WanDiT, init_weights, patchify
from wan_model.pack import Grid


@dataclasses.dataclass
class Samples:
    """Latents of any shapes with their timesteps and texts, as a pack and in diffusers' format."""

    latents: list[Tensor]
    timesteps: Tensor
    texts: Tensor
    layout: PackLayout

    @classmethod
    def draw(cls, config: WanConfig, grids: Sequence[Grid], device: torch.device, dtype: torch.dtype) -> "Samples":
        """Noise of the given grids."""
        rng = torch.Generator().manual_seed(0)
        pf, ph, pw = config.patch_size
        latents = [torch.randn(config.in_channels, f * pf, h * ph, w * pw, generator=rng) for f, h, w in grids]
        texts = torch.randn(len(grids), config.text_length, config.text_dim, generator=rng)
        return cls(
            [latent.to(device, dtype) for latent in latents],
            (1000 * torch.rand(len(grids), generator=rng)).to(device),
            texts.to(device, dtype),
            PackLayout(tuple(grids)),
        )

    @property
    def tokens(self) -> Tensor:
        """The pack's tokens."""
        return torch.cat([patchify(latent) for latent in self.latents])

    def padded(self) -> Tensor:
        """One batch, every latent padded to the largest frames, rows and columns."""
        sizes = [max(latent.shape[axis] for latent in self.latents) for axis in (1, 2, 3)]
        batch = self.latents[0].new_zeros(len(self.latents), self.latents[0].shape[0], *sizes)
        for row, latent in zip(batch, self.latents, strict=True):
            row[:, : latent.shape[1], : latent.shape[2], : latent.shape[3]] = latent
        return batch


def ours_and_diffusers(config: WanConfig, device: torch.device, dtype: torch.dtype) -> tuple[WanDiT, Any]:
    """Ours and diffusers', sharing the same weights."""
    ours = WanDiT(config)
    init_weights(ours, seed=0)
    with torch.no_grad():
        # With a zero head most gradients would be zero.
        ours.proj_out.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    ours.to_precision(dtype).to(device)
    return ours.train(), diffusers_model_of(ours, device)


def diffusers_model_of(ours: WanDiT, device: torch.device) -> Any:
    """Diffusers' model with the weights of ours, which are not copied."""
    # Here, so that what needs no comparison runs without it.
    from diffusers import WanTransformer3DModel

    config = ours.config
    with torch.device("meta"):
        # Its own initialisation takes longer than a benchmark.
        theirs = WanTransformer3DModel.from_config(config.to_diffusers())
    theirs.rope = type(theirs.rope)(config.head_dim, config.patch_size, 1024)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    theirs.to(device)
    return theirs.train().requires_grad_()
