"""The velocity of the sampling loop, on packs.

All videos of a call and both branches of classifier-free guidance are concatenated in one pack: every video with its
prompt, then every video with the negative prompt. With ``cfg_parallel`` a pack holds one branch.

Shapes: B videos, C latent channels, F latent frames, h rows, w columns; S tokens of the B videos, K values of a token;
L text tokens, D text width.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from wan_infer.runtime.parallelism import Parallelism
from wan_model.dit.model import WanDiT
from wan_model.pack import PackLayout, latent_grid, pad_text
from wan_model.sampling.denoising import OnStep, denoise_latents, guide
from wan_model.sampling.settings import Settings


@torch.no_grad()
def denoise(
    model: WanDiT,
    noise_BCFHW: Float[Tensor, "B C F h w"],
    texts: Sequence[Float[Tensor, "_ D"]],
    negative_text: Float[Tensor, "_ D"] | None,
    settings: Settings,
    *,
    parallelism: Parallelism | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C F h w"]:
    """Denoise to normalised latents.

    Args:
        model: on the execution device, built with the operations of ``parallelism``.
        noise_BCFHW: see ``draw_noise``.
        texts: embedded prompts, one a video; zero-padded to the model's ``text_length``.
        negative_text: embedded negative prompt; unused, and may be None, where the guidance is 1.
        settings: steps, shift, guidance, solver.
        parallelism: the part of this process; by default it computes everything.
        on_step: called with (steps done, steps) after each.

    Returns:
        Latents, fp32, on the model's device, on every process.

    Raises:
        ValueError: the model's output is not finite, or guidance is to be split and is 1.
    """
    parallelism = parallelism or Parallelism()
    device, patch_size = noise_BCFHW.device, model.config.patch_size
    grid = latent_grid(noise_BCFHW[0], patch_size)
    count = len(texts)
    prompts = _texts_of_branches(texts, negative_text, settings, parallelism)
    branches = len(prompts) // count
    context = parallelism.context
    layout = PackLayout((grid,) * len(prompts)).padded_to(context.ranks if context else 1)
    # Keys and values of the texts do not depend on the step.
    text = model.prepare_text(pad_text(prompts, model.config.text_length).to(device))

    def velocity(tokens_SK: Tensor, timestep: float) -> Tensor:
        timesteps_B = torch.full((len(prompts),), timestep, dtype=torch.float32, device=device)
        padding = tokens_SK.new_zeros(layout.padding, tokens_SK.shape[1])
        rows = torch.cat([*[tokens_SK] * branches, padding])
        predicted = model(rows, timesteps_B, text, layout)[: layout.valid].float()
        if not settings.guided:
            return predicted
        if parallelism.branch is None:
            both = rearrange(predicted, "(branch s) k -> branch s k", branch=2)
        else:
            both = parallelism.gather_branches(predicted)
        conditional, unconditional = both
        return guide(conditional, unconditional, settings.guidance)

    latents = denoise_latents(velocity, list(noise_BCFHW), settings, patch_size=patch_size, on_step=on_step)
    if not all(bool(torch.isfinite(latent).all()) for latent in latents):
        raise ValueError(
            "the transformer's output is not finite: are its weights damaged, or too coarse for this dtype? "
            "Try --dtype float32"
        )
    return torch.stack(latents)


def _texts_of_branches(
    texts: Sequence[Tensor], negative_text: Tensor | None, settings: Settings, parallelism: Parallelism
) -> list[Tensor]:
    """The texts that the samples of this process's pack are conditioned on."""
    if not settings.guided:
        if parallelism.branch is not None:
            raise ValueError("the guidance scale is 1, so there is no second branch; leave --cfg-parallel out")
        return list(texts)
    assert negative_text is not None, "guidance needs the negative prompt's embedding"
    both = [list(texts), [negative_text] * len(texts)]
    return both[0] + both[1] if parallelism.branch is None else both[parallelism.branch]
