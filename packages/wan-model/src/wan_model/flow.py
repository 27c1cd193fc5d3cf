"""The flow-matching objective: sigmas, noisy packs, targets and the loss.

With clean latents x0 and noise eps, x_t = (1 - sigma) * x0 + sigma * eps and the model learns eps - x0. Every sample of
a pack has its own sigma. Source: the official Wan 2.1 release and NVIDIA's recipe.

Shapes: B samples, S tokens, C values of a token.
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from wan_model.dit import per_token
from wan_model.pack import LatentPack, PackLayout, sample_index

Density = Literal["uniform", "logit_normal", "mode", "lognorm"]
Weighting = Literal["shift_sigma", "none"]
TIMESTEPS = 1000.0
_MODE_SCALE = 1.29


@dataclasses.dataclass
class NoisyPack:
    """What the model sees of a pack, and what it should say.

    Attributes:
        tokens_SC: x_t; padding rows are zero.
        target_SC: eps - x0.
        timesteps_B: 1000 * sigma, fp32.
        weights_B: factor of each sample's loss.
    """

    tokens_SC: Float[Tensor, "S C"]
    target_SC: Float[Tensor, "S C"]
    timesteps_B: Float[Tensor, "B"]
    weights_B: Float[Tensor, "B"]


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """Settings of the objective; the defaults are those of the ``pretrain`` preset.

    Attributes:
        density: distribution of u before the shift. ``mode`` is u <- 1 - u - 1.29 (cos²(pi u / 2) - 1 + u);
            ``lognorm`` is sigmoid(N(0, 1)); ``logit_normal`` has the mean and deviation below.
        logit_mean, logit_std: of ``logit_normal``.
        uniform_mix: probability with which a sample's u is uniform instead.
        shift: s in sigma = s / (s + 1/u - 1).
        sigma_min, sigma_max: bounds that sigma is clamped to.
        weighting: ``shift_sigma`` is 1 + s * sigma, unnormalised, as in NVIDIA's recipe; ``none`` is 1.
    """

    density: Density = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.5
    uniform_mix: float = 0.2
    shift: float = 2.5
    sigma_min: float = 0.0
    sigma_max: float = 1.0
    weighting: Weighting = "shift_sigma"

    def __post_init__(self) -> None:
        if self.density not in ("uniform", "logit_normal", "mode", "lognorm"):
            raise ValueError(f"density is {self.density!r}; expected uniform, logit_normal, mode or lognorm")
        if self.weighting not in ("shift_sigma", "none"):
            raise ValueError(f"weighting is {self.weighting!r}; expected shift_sigma or none")
        if not 0 <= self.uniform_mix <= 1:
            raise ValueError(f"uniform_mix is {self.uniform_mix}; a probability lies between 0 and 1")
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

    def draw_u(self, count: int, generator: torch.Generator) -> Float[Tensor, "B"]:
        """u of each sample in [1e-5, 1], fp32, on the generator's device.

        Every density draws the same amount of randomness, so that changing it leaves the noise that follows alone.
        """
        device = generator.device
        uniform = torch.rand(count, generator=generator, device=device)
        normal = torch.randn(count, generator=generator, device=device)
        coin = torch.rand(count, generator=generator, device=device)
        match self.density:
            case "uniform":
                u = uniform
            case "logit_normal":
                u = torch.sigmoid(self.logit_mean + self.logit_std * normal)
                u = torch.where(coin < self.uniform_mix, uniform, u)
            case "lognorm":
                u = torch.sigmoid(normal)
            case "mode":
                u = 1 - uniform - _MODE_SCALE * (torch.cos(torch.pi * uniform / 2) ** 2 - 1 + uniform)
        return u.clamp(1e-5, 1.0)

    def shift_sigma(self, u_B: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """sigma = s / (s + 1/u - 1), clamped."""
        return (self.shift / (self.shift + 1 / u_B - 1)).clamp(self.sigma_min, self.sigma_max)

    def corrupt(self, pack: LatentPack, generator: torch.Generator) -> NoisyPack:
        """Draw sigma and noise for a pack.

        Noise is drawn for the samples' tokens only, so padding changes nothing.

        Args:
            pack: clean latents, on the generator's device.
            generator: the only source of randomness.
        """
        sigma_B = self.shift_sigma(self.draw_u(pack.layout.num_samples, generator))
        clean = pack.tokens_SC.float()
        noise = torch.zeros_like(clean)
        valid = pack.layout.valid
        noise[:valid] = torch.randn(valid, clean.shape[1], generator=generator, device=generator.device)
        sigma_S1 = per_token(sigma_B[:, None], sample_index(pack.layout, clean.device))
        weights_B = 1 + self.shift * sigma_B if self.weighting == "shift_sigma" else torch.ones_like(sigma_B)
        return NoisyPack(
            tokens_SC=(1 - sigma_S1) * clean + sigma_S1 * noise,
            target_SC=noise - clean,
            timesteps_B=TIMESTEPS * sigma_B,
            weights_B=weights_B,
        )


def loss_sum(predicted_SC: Float[Tensor, "S C"], noisy: NoisyPack, layout: PackLayout) -> tuple[Float[Tensor, ""], int]:
    """Weighted squared error, summed over the pack's tokens, and the number of those tokens.

    A token's error is the mean over its values, in fp32; the objective is sum / tokens over everything a step sees,
    which is why the two are returned apart.
    """
    error_S = (predicted_SC.float() - noisy.target_SC).square().mean(dim=-1)
    weights_S = noisy.weights_B.index_select(0, sample_index(layout, error_S.device))
    return (error_S * weights_S)[: layout.valid].sum(), layout.valid
