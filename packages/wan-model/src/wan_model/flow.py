"""The flow-matching objective: sigmas, noisy packs, targets and the loss.

With clean latents x0 and noise eps, x_t = (1 - sigma) * x0 + sigma * eps and the model learns eps - x0. Every sample of
a pack has its own sigma. Source: the official Wan 2.1 release and NVIDIA's recipe.

Shapes: B samples, S tokens, C values of a token.
"""

import dataclasses
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from wan_model.pack import LatentPack, PackLayout, pad_text, sample_index

Density = Literal["uniform", "logit_normal", "mode", "lognorm"]
Weighting = Literal["shift_sigma", "none"]
TIMESTEPS = 1000.0
_MODE_SCALE = 1.29


@dataclasses.dataclass
class NoisyPack:
    """The noisy input of the model, and its target.

    Attributes:
        tokens_SC: x_t; padding rows are zero.
        target_SC: eps - x0.
        timesteps_B: 1000 * sigma, fp32.
        weights_B: factor of each sample's loss.
        text_BTD: the texts, with the empty prompt in place of dropped ones.
    """

    tokens_SC: Float[Tensor, "S C"]
    target_SC: Float[Tensor, "S C"]
    timesteps_B: Float[Tensor, " B"]
    weights_B: Float[Tensor, " B"]
    text_BTD: Float[Tensor, "B T D"]


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Settings of the objective; the defaults are those of the ``pretrain`` preset.

    Attributes:
        density: distribution of u before the shift. ``mode`` is u <- 1 - u - 1.29 (cos²(pi u / 2) - 1 + u);
            ``lognorm`` is sigmoid(N(0, 1)); ``logit_normal`` has the mean and deviation below.
        logit_mean, logit_std: of ``logit_normal``.
        uniform_mix: probability that a sample's u is uniform instead, with every density.
        shift: s in sigma = s / (s + 1/u - 1).
        sigma_min, sigma_max: bounds that sigma is clamped to.
        weighting: ``shift_sigma`` is 1 + s * sigma, unnormalised, as in NVIDIA's recipe; ``none`` is 1.
        caption_dropout: probability that a sample is trained with the empty prompt instead of its own, as needed for
            classifier-free guidance.
    """

    density: Density = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.5
    uniform_mix: float = 0.2
    shift: float = 2.5
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    weighting: Weighting = "shift_sigma"
    caption_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.density not in ("uniform", "logit_normal", "mode", "lognorm"):
            raise ValueError(f"density is {self.density!r}; expected uniform, logit_normal, mode or lognorm")
        if self.weighting not in ("shift_sigma", "none"):
            raise ValueError(f"weighting is {self.weighting!r}; expected shift_sigma or none")
        for field in ("uniform_mix", "caption_dropout"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; a probability lies between 0 and 1")
        if self.shift <= 0 or self.logit_std <= 0:
            raise ValueError(f"shift is {self.shift} and logit_std is {self.logit_std}; both must be positive")
        if not 0 <= self.sigma_min < self.sigma_max <= 1:
            raise ValueError(f"sigma runs from {self.sigma_min} to {self.sigma_max}; expected 0 <= min < max <= 1")

    @classmethod
    def pretrain(cls) -> "FlowMatching":
        """``--training-mode pretrain`` of NVIDIA's recipe."""
        return cls()

    @classmethod
    def finetune(cls) -> "FlowMatching":
        """``--training-mode finetune`` of NVIDIA's recipe: uniform, shift 3."""
        return cls(density="uniform", shift=3.0, logit_std=1.0, uniform_mix=0.1)

    def draw_u(self, count: int, generator: torch.Generator) -> Float[Tensor, " B"]:
        """u of each sample in [1e-5, 1], fp32, on the generator's device.

        Every density draws the same number of random values, so that changing it does not change the noise drawn after.
        """
        device = generator.device
        uniform = torch.rand(count, generator=generator, device=device)
        normal = torch.randn(count, generator=generator, device=device)
        mix = torch.rand(count, generator=generator, device=device)
        match self.density:
            case "uniform":
                u = uniform
            case "logit_normal":
                u = torch.sigmoid(self.logit_mean + self.logit_std * normal)
            case "lognorm":
                u = torch.sigmoid(normal)
            case "mode":
                u = 1 - uniform - _MODE_SCALE * (torch.cos(torch.pi * uniform / 2) ** 2 - 1 + uniform)
        u = torch.where(mix < self.uniform_mix, uniform, u)
        return u.clamp(1e-5, 1.0)

    def shift_sigma(self, u_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """sigma = s / (s + 1/u - 1), clamped."""
        return (self.shift / (self.shift + 1 / u_B - 1)).clamp(self.sigma_min, self.sigma_max)

    def drop_captions(
        self,
        text_BTD: Float[Tensor, "B T D"],
        empty_text_LD: Float[Tensor, "L D"] | None,
        generator: torch.Generator,
    ) -> Float[Tensor, "B T D"]:
        """Replace each text by the empty prompt with probability ``caption_dropout``.

        One number per sample is drawn for any probability, so that changing it does not change the noise drawn after.

        Args:
            text_BTD: texts, zero-padded.
            empty_text_LD: the embedding of the empty prompt (``LatentCodec.encode_text([""])``), of its true length.
            generator: the only source of randomness.

        Raises:
            ValueError: captions are to be dropped, and the embedding is missing or longer than the texts.
        """
        uniform_B = torch.rand(text_BTD.shape[0], generator=generator, device=generator.device)
        if self.caption_dropout == 0:
            return text_BTD
        if empty_text_LD is None:
            raise ValueError(
                f"caption_dropout is {self.caption_dropout} and no embedding of the empty prompt was given; "
                'give LatentCodec.encode_text([""])[0], or set it to 0'
            )
        empty_1TD = pad_text([empty_text_LD.to(text_BTD.device, text_BTD.dtype)], text_BTD.shape[1])
        return torch.where(rearrange(uniform_B < self.caption_dropout, "b -> b 1 1"), empty_1TD, text_BTD)

    def corrupt(
        self,
        pack: LatentPack,
        generator: torch.Generator,
        empty_text_LD: Float[Tensor, "L D"] | None = None,
    ) -> NoisyPack:
        """Draw sigma, dropped captions and noise for a pack.

        Noise is drawn for the samples' tokens only, so padding changes nothing.

        Args:
            pack: clean latents, on the generator's device.
            generator: the only source of randomness.
            empty_text_LD: see ``drop_captions``; needed if captions are dropped.
        """
        sigma_B = self.shift_sigma(self.draw_u(pack.layout.num_samples, generator))
        text_BTD = self.drop_captions(pack.text_BTD, empty_text_LD, generator)
        clean = pack.tokens_SC.float()
        noise = torch.zeros_like(clean)
        valid = pack.layout.valid
        noise[:valid] = torch.randn(valid, clean.shape[1], generator=generator, device=generator.device)
        sigma_S1 = sigma_B[sample_index(pack.layout, clean.device), None]
        weights_B = 1 + self.shift * sigma_B if self.weighting == "shift_sigma" else torch.ones_like(sigma_B)
        return NoisyPack(
            tokens_SC=(1 - sigma_S1) * clean + sigma_S1 * noise,
            target_SC=noise - clean,
            timesteps_B=TIMESTEPS * sigma_B,
            weights_B=weights_B,
            text_BTD=text_BTD,
        )


def _token_errors(predicted_SC: Float[Tensor, "S C"], noisy: NoisyPack) -> Float[Tensor, " S"]:
    return (predicted_SC.float() - noisy.target_SC).square().mean(dim=-1)


def loss_sum(predicted_SC: Float[Tensor, "S C"], noisy: NoisyPack, layout: PackLayout) -> tuple[Float[Tensor, ""], int]:
    """Weighted squared error, summed over the pack's tokens, and the number of those tokens.

    A token's error is the mean over its values, in fp32. The objective is sum / tokens over all packs and ranks of a
    step, so the two are returned separately.
    """
    error_S = _token_errors(predicted_SC, noisy)
    weights_S = noisy.weights_B.index_select(0, sample_index(layout, error_S.device))
    return (error_S * weights_S)[: layout.valid].sum(), layout.valid


@torch.no_grad()
def sample_losses(predicted_SC: Float[Tensor, "S C"], noisy: NoisyPack, layout: PackLayout) -> Float[Tensor, " B"]:
    """Mean squared error of each sample, unweighted, fp32; independent of the other samples."""
    error_S = _token_errors(predicted_SC, noisy)[: layout.valid]
    return torch.stack([part.mean() for part in error_S.split(layout.lengths)])
