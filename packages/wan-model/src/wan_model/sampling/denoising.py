"""The denoising loop, from noise to latents; the caller evaluates the model.

Shapes: C latent channels, F latent frames, h rows, w columns; S tokens of all videos, K values of a token.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wan_model.config import PatchSize
from wan_model.pack import latent_grid, patchify, unpatchify
from wan_model.sampling.settings import Settings
from wan_model.sampling.solvers import Solver

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, int], None]


def draw_noise(shape: tuple[int, ...], seed: int) -> Float[Tensor, "C F h w"]:
    """Standard normal noise of one video, from a CPU generator of its own.

    It is the same on every device, and does not depend on earlier draws as a shared generator's would.
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def guide(
    conditional_SK: Float[Tensor, "S K"], unconditional_SK: Float[Tensor, "S K"], guidance: float
) -> Float[Tensor, "S K"]:
    """The velocity of classifier-free guidance."""
    return unconditional_SK + guidance * (conditional_SK - unconditional_SK)


@torch.no_grad()
def denoise_latents(
    velocity: Velocity,
    noise: Sequence[Float[Tensor, "C _ _ _"]],
    settings: Settings,
    *,
    patch_size: PatchSize = (1, 2, 2),
    on_step: OnStep | None = None,
) -> list[Float[Tensor, "C _ _ _"]]:
    """Denoise videos of any shapes together.

    Args:
        velocity: called with the tokens [S, K] of all videos, one after another, fp32, and with the timestep, 1000 *
            sigma; returns the guided velocity of each token, fp32.
        noise: see ``draw_noise``; one a video, on the device.
        settings: steps, shift, solver. Guidance is the caller's.
        patch_size: latent positions (frames, rows, columns) of a token.
        on_step: called with (steps done, steps) after each.

    Returns:
        Normalised latents, fp32, on the device; they may not be finite.
    """
    solver = Solver(settings.solver, settings.steps, settings.shift)
    # The sample stays fp32; the model rounds its input to the precision of its weights.
    rows = [patchify(latent.float(), patch_size) for latent in noise]
    tokens_SK = torch.cat(rows)
    for index, timestep in enumerate(solver.timesteps):
        tokens_SK = solver.step(index, velocity(tokens_SK, timestep), tokens_SK)
        if on_step is not None:
            on_step(index + 1, len(solver.timesteps))
    videos = tokens_SK.split([len(one) for one in rows])
    grids = [latent_grid(latent, patch_size) for latent in noise]
    return [unpatchify(video, grid, patch_size) for video, grid in zip(videos, grids, strict=True)]
