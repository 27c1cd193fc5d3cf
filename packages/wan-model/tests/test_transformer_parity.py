"""The transformer equals diffusers' ``WanTransformer3DModel`` with the same weights: outputs and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from wan_model import PackLayout, WanDiT, patchify, unpatchify
from wan_model.pack import Grid

GRIDS: tuple[Grid, Grid] = ((2, 3, 4), (1, 2, 5))
# Above 512 bfloat16 keeps steps of 4 only.
TIMESTEPS = (900.4, 37.25)


@pytest.fixture
def twins(small_model: WanDiT, diffusers_model: Any) -> tuple[WanDiT, Any]:
    diffusers_model.load_state_dict(small_model.state_dict())
    return small_model, diffusers_model


def inputs(grids: tuple[Grid, ...], model: WanDiT, rng: torch.Generator) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Latents, output probes and texts; zeros behind the true length of each text."""
    shapes = [(model.config.in_channels, f, 2 * h, 2 * w) for f, h, w in grids]
    latents = [torch.randn(shape, generator=rng) for shape in shapes]
    probes = [torch.randn(shape, generator=rng) for shape in shapes]
    texts = torch.randn(len(grids), model.config.text_length, model.config.text_dim, generator=rng)
    for i, text in enumerate(texts):
        text[5 + i :] = 0
    return latents, probes, texts


@pytest.mark.parametrize("grids", [GRIDS[:1], GRIDS], ids=["one sample", "two grids in a pack"])
def test_forward_and_every_gradient(
    grids: tuple[Grid, ...], twins: tuple[WanDiT, Any], rng: torch.Generator, near: Any
) -> None:
    ours, theirs = twins
    latents, probes, texts = inputs(grids, ours, rng)
    timesteps = torch.tensor(TIMESTEPS[: len(grids)])
    assert ours.proj_out.weight.abs().min() > 0, "a zero head would hide everything before it"

    layout = PackLayout(grids)
    out = ours(torch.cat([patchify(latent) for latent in latents]), timesteps, texts, layout)
    (out * torch.cat([patchify(probe) for probe in probes])).sum().backward()
    for i, grid in enumerate(grids):
        wanted = theirs(latents[i][None], timesteps[i : i + 1], texts[i : i + 1], return_dict=False)[0]
        (wanted[0] * probes[i]).sum().backward()
        near(unpatchify(out[layout.offsets[i] : layout.offsets[i + 1]], grid), wanted[0], 1e-5, f"sample {i}")

    theirs_by_name = dict(theirs.named_parameters())
    assert theirs_by_name.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert theirs_by_name[name].grad.norm() > 0, name
        near(parameter.grad, theirs_by_name[name].grad, 1e-5, name)


def test_fractions_of_large_timesteps_count(twins: tuple[WanDiT, Any], rng: torch.Generator, near: Any) -> None:
    ours, theirs = twins
    (latent,), _, text = inputs(GRIDS[:1], ours, rng)
    exact, rounded = torch.tensor([900.4]), torch.tensor([900.4]).bfloat16().float()
    assert rounded.item() == 900.0
    with torch.no_grad():
        out, other = (ours(patchify(latent), t, text, PackLayout(GRIDS[:1])) for t in (exact, rounded))
        near(unpatchify(out, GRIDS[0]), theirs(latent[None], exact, text, return_dict=False)[0][0])
    assert (out - other).norm() > 1e-3 * out.norm()


def test_bfloat16_weights_leave_the_timestep_alone(small_model: WanDiT) -> None:
    embedder = small_model.bfloat16().condition_embedder
    exact, rounded = embedder.time(torch.tensor([900.4]))[0], embedder.time(torch.tensor([900.0]))[0]
    assert exact.dtype == torch.bfloat16
    assert (exact.float() - rounded.float()).norm() > 0.05 * rounded.float().norm()


def test_recomputed_blocks_give_the_same_gradients(small_model: WanDiT, rng: torch.Generator) -> None:
    (latent,), _, text = inputs(GRIDS[:1], small_model, rng)
    args = (patchify(latent), torch.tensor([412.5]), text, PackLayout(GRIDS[:1]))
    gradients = []
    for recompute in (False, True):
        small_model.zero_grad()
        small_model.recompute_blocks = recompute
        small_model.train()(*args).square().sum().backward()
        gradients.append([parameter.grad for parameter in small_model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert kept is not None
        assert torch.equal(kept, recomputed)
