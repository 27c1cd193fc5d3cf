"""Against diffusers' ``WanTransformer3DModel`` with the same weights: outputs and every gradient, in fp32 and bf16."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan_model import (
    PackLayout,
    WanConfig,
    WanDiT,
    init_weights,
    load_transformer,
    patchify,
    save_transformer,
    unpatchify,
)
from wan_model.pack import Grid

GRIDS: tuple[Grid, Grid] = ((2, 3, 4), (1, 2, 5))
# Above 512 bfloat16 keeps steps of 4 only.
TIMESTEPS = (900.4, 37.25)
TRUE_WIDTHS = {
    "1.3B": WanConfig(num_layers=2),
    "14B": WanConfig(num_heads=40, ffn_dim=13824, num_layers=1),
}


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


class Run:
    """Inputs, and what a model makes of them: its output and every gradient of one probed number."""

    def __init__(self, grids: tuple[Grid, ...], model: WanDiT, rng: torch.Generator) -> None:
        self.layout = PackLayout(grids)
        self.latents, self.probes, self.texts = inputs(grids, model, rng)
        self.timesteps = torch.tensor(TIMESTEPS[: len(grids)])

    def ours(self, model: WanDiT) -> tuple[Tensor, dict[str, Tensor]]:
        dtype = model.proj_out.weight.dtype
        tokens, probes = (torch.cat([patchify(x) for x in xs]).to(dtype) for xs in (self.latents, self.probes))
        out = model(tokens, self.timesteps, self.texts.to(dtype), self.layout)
        (out * probes).sum().backward()
        return out.detach(), taken_gradients(model)

    def theirs(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        parts = []
        for i, (latent, probe) in enumerate(zip(self.latents, self.probes, strict=True)):
            one = slice(i, i + 1)
            out = model(latent[None], self.timesteps[one], self.texts[one], return_dict=False)[0][0]
            (out * probe).sum().backward()
            parts.append(patchify(out.detach()))
        return torch.cat(parts), taken_gradients(model)


def taken_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name], parameter.grad = parameter.grad, None
    return gradients


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("grids", [GRIDS[:1], GRIDS], ids=["one sample", "two grids in a pack"])
def test_forward_and_every_gradient(
    grids: tuple[Grid, ...], twins: tuple[WanDiT, Any], rng: torch.Generator, near: Any, same: Any
) -> None:
    ours, theirs = twins
    assert ours.proj_out.weight.abs().min() > 0, "a zero head would hide everything before it"
    run = Run(grids, ours, rng)
    truth, true_gradients = run.ours(copy.deepcopy(ours).double())
    (out, gradients), (wanted, wanted_gradients) = run.ours(ours), run.theirs(theirs)
    near(out, wanted, 1e-5)
    near(out, truth, 1e-6, "against fp64")
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        assert wanted_gradients[name].norm() > 0, name
        same(gradient, wanted_gradients[name], true_gradients[name], name)


@pytest.mark.parametrize("width", TRUE_WIDTHS)
def test_true_widths(width: str, near: Any) -> None:
    from diffusers import WanTransformer3DModel

    config = TRUE_WIDTHS[width]
    ours, generator = WanDiT(config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # As large as the official initialisation, which leaves biases and head at zero.
            bound = (6 / sum(parameter.shape)) ** 0.5 if parameter.ndim == 2 else 0.05
            parameter.uniform_(-bound, bound, generator=generator).add_("norm" in name and name.endswith("weight"))
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(config.to_diffusers())
    theirs.load_state_dict(ours.state_dict(), assign=True)
    # The one buffer that is in no state dict.
    theirs.rope = type(theirs.rope)(config.head_dim, config.patch_size, 1024)

    run = Run(((2, 4, 5),), ours, generator)
    (out, gradients), (wanted, wanted_gradients) = run.ours(ours), run.theirs(theirs.train().requires_grad_())
    near(out, wanted, 1e-5)
    for name, gradient in gradients.items():
        near(gradient, wanted_gradients[name], 1e-5, name)


@pytest.mark.parametrize("width", [None, "1.3B"], ids=["small", "1.3B"])
def test_bfloat16_is_no_further_from_fp32_than_diffusers(
    width: str | None, small_model: WanDiT, rng: torch.Generator, tmp_path: Path
) -> None:
    from diffusers import WanTransformer3DModel

    exact = small_model
    if width is not None:
        exact = WanDiT(dataclasses.replace(TRUE_WIDTHS[width], num_layers=1))
        init_weights(exact, seed=1)
        with torch.no_grad():
            exact.proj_out.weight.normal_(std=0.02, generator=rng)
    save_transformer(exact.state_dict(), exact.config, tmp_path)
    ours = load_transformer(tmp_path, dtype=torch.bfloat16)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    errors = []
    for seed in range(3):
        run = Run(((2, 3, 6),), exact, rng.manual_seed(seed))
        tokens, half = patchify(run.latents[0]), run.latents[0][None].bfloat16()
        with torch.no_grad():
            wanted = exact(tokens, run.timesteps, run.texts, run.layout)
            out = ours(tokens, run.timesteps, run.texts, run.layout)
            other = theirs(half, run.timesteps, run.texts.bfloat16(), return_dict=False)[0][0]
        assert out.dtype == other.dtype == torch.bfloat16
        errors.append((relative(out, wanted), relative(patchify(other), wanted)))
    mine, diffusers = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    assert mine <= 1.02 * diffusers, f"{mine:.3e} against {diffusers:.3e}"


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
    embedder = small_model.bfloat16().condition_embedder  # even where everything is rounded
    exact, rounded = embedder.time(torch.tensor([900.4]))[0], embedder.time(torch.tensor([900.0]))[0]
    assert exact.dtype == torch.bfloat16
    assert (exact.float() - rounded.float()).norm() > 0.05 * rounded.float().norm()
