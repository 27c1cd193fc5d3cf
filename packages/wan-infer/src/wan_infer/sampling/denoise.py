"""The sampling loop, on packs.

All videos of a call, and both branches of guidance, lie end to end in one pack: first every video with its prompt, then
every video again with the negative prompt. Where processes share the work (``sharing``), a pack holds one branch.

Shapes: B videos, C latent channels, F latent frames, h rows, w columns; S tokens of the B videos, K values of a token;
L text tokens, D text width.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from wan_infer.request.settings import Settings
from wan_infer.runtime.parallelism import Sharing
from wan_infer.sampling.solvers import Solver
from wan_model.dit.model import WanDiT
from wan_model.pack import PackLayout, latent_grid, pad_text, patchify, unpatchify

OnStep = Callable[[int, int], None]


def draw_noise(shape: tuple[int, ...], seed: int) -> Float[Tensor, "C F h w"]:
    """Standard normal noise of one video, on the CPU.

    A device's own generator depends on its make, and a shared one on who drew before; this is the same everywhere.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def denoise(
    model: WanDiT,
    noise_BCFHW: Float[Tensor, "B C F h w"],
    texts: Sequence[Float[Tensor, "_ D"]],
    negative_text: Float[Tensor, "_ D"] | None,
    settings: Settings,
    *,
    text_length: int = 512,
    sharing: Sharing | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C F h w"]:
    """Walk from noise to normalised latents.

    Args:
        model: on the device that the work is done on, built for the runtime of ``sharing``.
        noise_BCFHW: see ``draw_noise``.
        texts: embedded prompts, one a video.
        negative_text: embedded negative prompt; unused, and may be None, where the guidance is 1.
        settings: steps, shift, guidance, solver.
        text_length: tokens that texts are zero-padded to.
        sharing: this process's part; by default it does all.
        on_step: called with (steps done, steps) after each.

    Returns:
        Latents, fp32, on the model's device, on every process.

    Raises:
        ValueError: the model's output is not finite, or there is no guidance whose branches could be shared.
    """
    sharing = sharing or Sharing()
    device, patch_size = noise_BCFHW.device, model.config.patch_size
    grid = latent_grid(noise_BCFHW[0], patch_size)
    count = len(texts)
    prompts = _texts_of_branches(texts, negative_text, settings, sharing)
    branches = len(prompts) // count
    layout = PackLayout((grid,) * len(prompts)).padded_to(sharing.context.ranks if sharing.context else 1)
    # Keys and values of the texts are the same at every step.
    text = model.prepare_text(pad_text(prompts, text_length).to(device))
    solver = Solver(settings.solver, settings.steps, settings.shift)

    # The walk itself stays fp32; the model rounds what it is given to the precision of its weights.
    tokens_SK = torch.cat([patchify(latent, patch_size) for latent in noise_BCFHW.float()])
    padding = tokens_SK.new_zeros(layout.padding, tokens_SK.shape[1])
    for index, timestep in enumerate(solver.timesteps):
        timesteps_B = torch.full((len(prompts),), timestep, dtype=torch.float32, device=device)
        rows = torch.cat([*[tokens_SK] * branches, padding])
        velocity = model(rows, timesteps_B, text, layout)[: layout.valid].float()
        if settings.guidance != 1:
            if sharing.branch is None:
                both = rearrange(velocity, "(branch s) k -> branch s k", branch=2)
            else:
                both = sharing.both_branches(velocity)
            conditional, unconditional = both
            velocity = unconditional + settings.guidance * (conditional - unconditional)
        tokens_SK = solver.step(index, velocity, tokens_SK)
        if on_step is not None:
            on_step(index + 1, len(solver.timesteps))

    if not bool(torch.isfinite(tokens_SK).all()):
        raise ValueError(
            "the transformer's output is not finite: are its weights damaged, or too coarse for this dtype? "
            "Try --dtype float32"
        )
    videos = rearrange(tokens_SK, "(b s) k -> b s k", b=count)
    return torch.stack([unpatchify(video, grid, patch_size) for video in videos])


def _texts_of_branches(
    texts: Sequence[Tensor], negative_text: Tensor | None, settings: Settings, sharing: Sharing
) -> list[Tensor]:
    """What this process's samples are conditioned on, a branch after the other."""
    if settings.guidance == 1:
        if sharing.branch is not None:
            raise ValueError("the guidance scale is 1, which leaves no second branch; leave --cfg-parallel out")
        return list(texts)
    assert negative_text is not None, "guidance needs the negative prompt's embedding"
    both = [list(texts), [negative_text] * len(texts)]
    return both[0] + both[1] if sharing.branch is None else both[sharing.branch]
