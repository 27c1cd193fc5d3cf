"""Against diffusers' ``WanTransformer3DModel`` with the same weights: outputs and every gradient, in fp32 and bf16."""

import copy
from collections.abc import Callable
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
)
from wan_model.pack import Grid
from wan_model.testing import assert_all_within, assert_within, rounding_scale
from wan_model.testing.rounding import FACTOR

GRIDS: tuple[Grid, Grid] = ((2, 3, 4), (1, 2, 5))
WIDE_GRID: tuple[Grid] = ((2, 4, 5),)
# Above 512 bfloat16 keeps steps of 4 only.
TIMESTEPS = (900.4, 37.25)
# Texts are short, because the widths are what counts.
TRUE_WIDTHS = {
    "1.3B": WanConfig(num_layers=1, text_length=16),
    "14B": WanConfig(num_heads=40, ffn_dim=13824, num_layers=1, text_length=16),
}
NARROW = WanConfig(num_heads=3, ffn_dim=2240, num_layers=1, text_length=16)


@pytest.fixture
def ours_and_diffusers(small_model: WanDiT, diffusers_model: Any) -> tuple[WanDiT, Any]:
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

    def ours(self, model: WanDiT) -> dict[str, Tensor]:
        dtype = model.proj_out.weight.dtype
        tokens, probes = (torch.cat([patchify(x) for x in xs]).to(dtype) for xs in (self.latents, self.probes))
        out = model(tokens, self.timesteps, self.texts.to(dtype), self.layout)
        (out * probes).sum().backward()
        return {"output": out.detach(), **taken_gradients(model)}

    def theirs(self, model: Any) -> dict[str, Tensor]:
        parts = []
        for i, (latent, probe) in enumerate(zip(self.latents, self.probes, strict=True)):
            one = slice(i, i + 1)
            out = model(latent[None], self.timesteps[one], self.texts[one], return_dict=False)[0][0]
            (out * probe).sum().backward()
            parts.append(patchify(out.detach()))
        return {"output": torch.cat(parts), **taken_gradients(model)}


def taken_gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            gradients[name], parameter.grad = parameter.grad, None
    return gradients


def relative(got: Tensor, wanted: Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.rounding
@pytest.mark.parametrize("grids", [GRIDS[:1], GRIDS], ids=["one sample", "two grids in a pack"])
def test_forward_and_every_gradient(
    grids: tuple[Grid, ...], ours_and_diffusers: tuple[WanDiT, Any], rng: torch.Generator
) -> None:
    ours, theirs = ours_and_diffusers
    assert ours.proj_out.weight.abs().min() > 0, "a zero head would hide everything before it"
    run, double = Run(grids, ours, rng), copy.deepcopy(ours).double()
    scale, got = rounding_scale(lambda: run.ours(double)), run.ours(ours)
    assert all(value.norm() > 0 for value in got.values())
    assert_all_within(got, run.theirs(theirs), scale)
    assert_all_within(got, run.ours(double), scale)


def filled(config: WanConfig) -> WanDiT:
    """A model whose weights are as large as the official initial ones, which leave biases and head at zero."""
    model = WanDiT(config)
    # A tensor longer than this has its values again and again, never in the same columns.
    values = torch.rand(1_000_003, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            bound = (6 / sum(parameter.shape)) ** 0.5 if parameter.ndim == 2 else 0.05
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(values)):
                part = flat[start : start + len(values)]
                part.copy_(values[: len(part)])
            values = values.roll(12_345)
            parameter.mul_(bound).add_("norm" in name and name.endswith("weight"))
    return model


@pytest.fixture(scope="module")
def relative_scale() -> dict[str, float]:
    """How far rounding moves each result of a narrower model, relative to its norm."""
    model = filled(NARROW).double()
    run = Run(WIDE_GRID, model, torch.Generator().manual_seed(2))
    scale, exact = rounding_scale(lambda: run.ours(model), samples=4), run.ours(model)
    return {name: (value.norm() / exact[name].norm()).item() for name, value in scale.items()}


@pytest.fixture(scope="module", params=TRUE_WIDTHS)
def wide_models(request: pytest.FixtureRequest) -> tuple[WanDiT, Any]:
    from diffusers import WanTransformer3DModel

    ours = filled(TRUE_WIDTHS[request.param])
    config = ours.config
    with torch.device("meta"):
        theirs = WanTransformer3DModel.from_config(config.to_diffusers())
    theirs.load_state_dict(ours.state_dict(), assign=True)
    # The one buffer that is in no state dict.
    theirs.rope = type(theirs.rope)(config.head_dim, config.patch_size, 1024)
    for model in (ours, theirs.train()):
        for parameter in model.parameters():
            # Of the larger model not the 2 GB of matrices: the gradients of the biases beside them say as much.
            parameter.requires_grad_(request.param == "1.3B" or parameter.ndim != 2)
    return ours, theirs


@pytest.mark.rounding
def test_true_widths(wide_models: tuple[WanDiT, Any], relative_scale: dict[str, float], rng: torch.Generator) -> None:
    ours, theirs = wide_models
    run = Run(WIDE_GRID, ours, rng)
    got, wanted = run.ours(ours), run.theirs(theirs)
    # Sums are longer by this than where the scale was taken.
    longer = ours.config.hidden_size / NARROW.hidden_size
    for name, value in got.items():
        bound = FACTOR * longer**0.5 * relative_scale[name]
        error = relative(value, wanted[name])
        assert error <= bound, f"{name} differs by {error:.1e} of itself; rounding bounds that by {bound:.1e}"
        assert bound < 1e-3, name


@pytest.fixture(scope="module", params=["small", "1.3B"])
def coarse_models(
    request: pytest.FixtureRequest,
    small_config: WanConfig,
    randomised: Callable[[nn.Module, int], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[WanDiT, WanDiT, Any]]:
    """Models in fp32, and as they and diffusers load them in bf16."""
    from diffusers import WanTransformer3DModel

    found = []
    for weights in range(6 if request.param == "small" else 1):
        if request.param == "small":
            exact = WanDiT(small_config)
            randomised(exact, weights)
        else:
            exact = WanDiT(TRUE_WIDTHS["1.3B"])
            init_weights(exact, seed=1)
            with torch.no_grad():
                exact.proj_out.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
        folder = tmp_path_factory.mktemp("coarse")
        save_transformer(exact.state_dict(), exact.config, folder)
        ours = load_transformer(folder, dtype=torch.bfloat16)
        found.append((exact, ours, WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)))
    return found


@pytest.mark.rounding
def test_bfloat16_is_no_further_from_fp32_than_diffusers(
    coarse_models: list[tuple[WanDiT, WanDiT, Any]], seed: int
) -> None:
    squares = torch.zeros(2, dtype=torch.float64)
    for number, (exact, ours, theirs) in enumerate(3 * coarse_models):
        run = Run(((2, 3, 6),), exact, torch.Generator().manual_seed(1000 * seed + number))
        tokens, half = patchify(run.latents[0]), run.latents[0][None].bfloat16()
        with torch.no_grad():
            wanted = exact(tokens, run.timesteps, run.texts, run.layout)
            out = ours(tokens, run.timesteps, run.texts, run.layout)
            other = theirs(half, run.timesteps, run.texts.bfloat16(), return_dict=False)[0][0]
        assert out.dtype == other.dtype == torch.bfloat16
        errors = (out - wanted, patchify(other) - wanted)
        squares += torch.stack([error.double().square().mean() for error in errors])
    mine, diffusers = squares.sqrt().tolist()
    # Two roundings of as many numbers: over all weights and inputs the ratio is 0.97 on average, and of one set of
    # weights and three inputs it has a deviation of 0.04; here are six sets.
    assert mine <= 1.05 * diffusers, f"{mine:.3e} against {diffusers:.3e}"


@pytest.mark.rounding
def test_fractions_of_large_timesteps_count(ours_and_diffusers: tuple[WanDiT, Any], rng: torch.Generator) -> None:
    ours, theirs = ours_and_diffusers
    (latent,), _, text = inputs(GRIDS[:1], ours, rng)
    exact, rounded = torch.tensor([900.4]), torch.tensor([900.4]).bfloat16().float()
    assert rounded.item() == 900.0
    layout, double = PackLayout(GRIDS[:1]), copy.deepcopy(ours).double()
    with torch.no_grad():
        out, other = (ours(patchify(latent), t, text, layout) for t in (exact, rounded))
        wanted = theirs(latent[None], exact, text, return_dict=False)[0][0]
        scale = rounding_scale(lambda: {"out": double(patchify(latent).double(), exact, text.double(), layout)})
        assert_within(out, patchify(wanted), scale["out"])
    assert (out - other).norm() > 1e-3 * out.norm()


def test_bfloat16_weights_leave_the_timestep_alone(small_model: WanDiT) -> None:
    embedder = small_model.bfloat16().condition_embedder  # even where everything is rounded
    exact, rounded = embedder.time(torch.tensor([900.4]))[0], embedder.time(torch.tensor([900.0]))[0]
    assert exact.dtype == torch.bfloat16
    assert (exact.float() - rounded.float()).norm() > 0.05 * rounded.float().norm()
