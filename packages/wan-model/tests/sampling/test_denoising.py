import torch
from torch import Tensor

from wan_model.pack import patchify
from wan_model.sampling.denoising import denoise_latents, draw_noise, guide
from wan_model.sampling.settings import Settings
from wan_model.sampling.solvers import Solver


def test_noise_depends_on_its_seed_alone() -> None:
    first = draw_noise((16, 1, 4, 4), seed=42)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert torch.equal(draw_noise((16, 1, 4, 4), seed=42), first)
    assert not torch.equal(draw_noise((16, 1, 4, 4), seed=43), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_videos_of_different_shapes_are_denoised_together_as_alone() -> None:
    settings, told = Settings(steps=4), list[tuple[int, int]]()
    noise = [draw_noise((16, *shape), seed) for seed, shape in enumerate([(3, 4, 6), (1, 8, 2), (2, 2, 2)])]

    def velocity(tokens: Tensor, timestep: float) -> Tensor:
        return (tokens * 1.5 + timestep / 300).sin()

    together = denoise_latents(velocity, noise, settings, on_step=lambda done, steps: told.append((done, steps)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for one, found in zip(noise, together, strict=True):
        assert found.shape == one.shape
        (alone,) = denoise_latents(velocity, [one], settings)
        assert torch.equal(found, alone)
        solver, tokens = Solver("unipc", 4, 5.0), patchify(one)
        for index, timestep in enumerate(solver.timesteps):
            tokens = solver.step(index, velocity(tokens, timestep), tokens)
        assert torch.equal(patchify(found), tokens)


def test_guidance_moves_away_from_the_unconditional_velocity() -> None:
    conditional, unconditional = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    assert guide(conditional, unconditional, 1.0).item() == 2
    assert guide(conditional, unconditional, 5.0).item() == 6
