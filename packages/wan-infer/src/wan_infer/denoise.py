"""The sampling loop, on packs.

All videos of a call, and both branches of guidance, lie end to end in one pack: first every video with its prompt, then
every video again with the negative prompt.

Shapes: B videos, C latent channels, F latent frames, h rows, w columns; S tokens of the B videos, K values of a token;
L text tokens, D text width.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from wan_infer.requests import Settings
from wan_infer.solvers import Solver
from wan_model.dit import WanDiT
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
    on_step: OnStep | None = None,
) -> Float[Tensor, "B C F h w"]:
    """Walk from noise to normalised latents.

    Args:
        model: on the device that the work is done on.
        noise_BCFHW: see ``draw_noise``.
        texts: embedded prompts, one a video.
        negative_text: embedded negative prompt; unused, and may be None, where the guidance is 1.
        settings: steps, shift, guidance, solver.
        text_length: tokens that texts are zero-padded to.
        on_step: called with (steps done, steps) after each.

    Returns:
        Latents, fp32, on the model's device.

    Raises:
        ValueError: the model's output is not finite.
    """
    device = model.scale_shift_table.device
    patch_size = model.config.patch_size
    grid = latent_grid(noise_BCFHW[0], patch_size)
    count = len(texts)
    guided = settings.guidance != 1
    if guided:
        assert negative_text is not None, "guidance needs the negative prompt's embedding"
        texts = [*texts, *[negative_text] * count]
    branches = 2 if guided else 1
    layout = PackLayout((grid,) * len(texts))
    text_BTD = pad_text(texts, text_length).to(device)
    solver = Solver(settings.solver, settings.steps, settings.shift, device)

    # The walk itself stays fp32; the model rounds what it is given to the precision of its weights.
    tokens_SK = torch.cat([patchify(latent, patch_size) for latent in noise_BCFHW.float()]).to(device)
    for index, timestep in enumerate(solver.timesteps):
        timesteps_B = torch.full((len(texts),), timestep, dtype=torch.float32, device=device)
        both = repeat(tokens_SK, "s k -> (branch s) k", branch=branches)
        velocity = model(both, timesteps_B, text_BTD, layout).float()
        if guided:
            conditional, unconditional = rearrange(velocity, "(branch s) k -> branch s k", branch=2)
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
