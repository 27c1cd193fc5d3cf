"""The objective: densities against closed forms, presets, noisy packs, the loss, and where randomness comes from."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from wan_model import LatentPack, PackLayout, pack_latents
from wan_model.flow import FlowMatching, loss_sum
from wan_model.testing import assert_rounds_to

DRAWS = 40_000
# Kolmogorov's distance of DRAWS draws from their own distribution is below this but once in 10^9 cases.
DISTANCE = math.sqrt(-math.log(1e-9 / 2) / 2 / DRAWS)

UNIT = 2**-24
# Positive terms: 64 values are summed, 11 tokens are, and there are five roundings beside these sums.
SUM_OF_SQUARES = (64 + 11 + 5) * UNIT


def normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def logit_normal_cdf(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    return lambda u: normal_cdf((torch.logit(u) - mean) / std)


def mode_cdf(u: Tensor) -> Tensor:
    """The map from the uniform v to u falls, so P(u <= x) = 1 - v(x); v by bisection."""
    low, high = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):
        v = (low + high) / 2
        above = 1 - v - 1.29 * (torch.cos(math.pi * v / 2) ** 2 - 1 + v) > u
        low, high = torch.where(above, v, low), torch.where(above, high, v)
    return 1 - v


def distance(draws: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov's: the largest gap between the draws' distribution and the closed form."""
    ordered = draws.double().sort().values
    steps = torch.arange(len(ordered) + 1, dtype=torch.float64) / len(ordered)
    wanted = cdf(ordered)
    return max((steps[1:] - wanted).max().item(), (wanted - steps[:-1]).max().item())


DENSITIES = {
    "uniform": (FlowMatching.finetune(), lambda u: u),
    "logit_normal": (FlowMatching(uniform_mix=0.0, logit_mean=0.4, logit_std=0.8), logit_normal_cdf(0.4, 0.8)),
    "mixed": (
        FlowMatching(uniform_mix=0.3, logit_mean=1.0, logit_std=0.4),
        lambda u: 0.3 * u + 0.7 * logit_normal_cdf(1.0, 0.4)(u),
    ),
    "pretrain": (FlowMatching.pretrain(), lambda u: 0.2 * u + 0.8 * logit_normal_cdf(0.0, 1.5)(u)),
    "lognorm": (FlowMatching(density="lognorm", uniform_mix=0.0), logit_normal_cdf(0.0, 1.0)),
    "lognorm, mixed": (
        FlowMatching(density="lognorm", uniform_mix=0.5),
        lambda u: 0.5 * u + 0.5 * logit_normal_cdf(0.0, 1.0)(u),
    ),
    "mode": (FlowMatching(density="mode", uniform_mix=0.0), mode_cdf),
    "mode, mixed": (FlowMatching(density="mode", uniform_mix=0.5), lambda u: 0.5 * u + 0.5 * mode_cdf(u)),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_density_is_the_closed_form(name: str, rng: torch.Generator) -> None:
    objective, cdf = DENSITIES[name]
    draws = objective.draw_u(DRAWS, rng)
    assert draws.dtype == torch.float32
    assert 1e-5 <= draws.min() < 0.05 < 0.95 < draws.max() <= 1
    assert distance(draws, cdf) < DISTANCE
    for other, (_, other_cdf) in DENSITIES.items():
        assert other == name or distance(draws, other_cdf) > DISTANCE, f"{other} cannot be told apart"


def test_presets() -> None:
    pretrain, finetune = FlowMatching.pretrain(), FlowMatching.finetune()
    assert (pretrain.density, pretrain.logit_mean, pretrain.logit_std) == ("logit_normal", 0.0, 1.5)
    assert (pretrain.uniform_mix, pretrain.shift, pretrain.weighting) == (0.2, 2.5, "shift_sigma")
    assert (finetune.density, finetune.shift, finetune.weighting) == ("uniform", 3.0, "shift_sigma")


def test_small_u_is_clamped() -> None:
    extreme = FlowMatching(logit_mean=-30.0, logit_std=0.1, uniform_mix=0.0)
    draws = extreme.draw_u(100, torch.Generator().manual_seed(0))
    assert (draws == torch.tensor(1e-5)).all()
    assert extreme.shift_sigma(draws).min() > 0


@pytest.mark.rounding
def test_sigma_is_shifted_and_clamped() -> None:
    u = torch.tensor([1e-5, 0.1, 0.5, 0.9, 1.0])
    for shift in (2.5, 1.0):

        def formula(shift: float = shift) -> dict[str, Tensor]:
            return {"sigma": shift / (shift + 1 / u.double() - 1)}

        assert_rounds_to({"sigma": FlowMatching(shift=shift).shift_sigma(u)}, formula)
    bounded = FlowMatching(sigma_min=0.25, sigma_max=0.75).shift_sigma(u)
    assert bounded.tolist() == [0.25, 0.25, pytest.approx(2.5 / 3.5), 0.75, 0.75]


@pytest.fixture
def pack(rng: torch.Generator) -> LatentPack:
    latents = [torch.randn(16, *size, generator=rng) for size in ((1, 4, 6), (3, 2, 2), (1, 2, 4))]
    made = pack_latents(latents, [torch.zeros(2, 8)] * 3, ["a", "b", "c"], text_length=4, multiple=8)
    assert made.layout == PackLayout(((1, 2, 3), (3, 1, 1), (1, 1, 2)), padding=5)
    return made


@pytest.mark.rounding
def test_noisy_pack_is_the_straight_path_from_latents_to_noise(pack: LatentPack, rng: torch.Generator) -> None:
    objective = FlowMatching(shift=2.5)
    noisy = objective.corrupt(pack, rng)
    assert len(set(noisy.timesteps_B.tolist())) == 3, "each sample has its own sigma"
    layout = pack.layout
    for i, (start, stop) in enumerate(zip(layout.offsets, layout.offsets[1:], strict=False)):
        sigma, clean = noisy.timesteps_B[i] / 1000, pack.tokens_SC[start:stop]
        target = noisy.target_SC[start:stop]
        error = noisy.tokens_SC[start:stop].double() - (clean.double() + sigma.double() * target.double())
        # Five roundings: of 1000 * sigma, of 1 - sigma, of both products and their sum, and that of the target.
        terms = clean.abs() + sigma * (clean.abs() + target.abs())
        assert (error.abs() <= 8 * UNIT * terms).all()
        assert noisy.weights_B[i].item() == pytest.approx(1 + 2.5 * sigma.item(), rel=4 * UNIT)
    assert not noisy.tokens_SC[layout.valid :].any()
    assert FlowMatching(weighting="none").corrupt(pack, rng).weights_B.tolist() == [1, 1, 1]


def test_noise_is_standard_normal_and_different_for_every_value(rng: torch.Generator) -> None:
    latent = torch.zeros(16, 8, 20, 20)
    noise = FlowMatching().corrupt(pack_latents([latent], [torch.zeros(1, 8)], ["a"], text_length=4), rng).target_SC
    assert distance(noise.flatten(), normal_cdf) < DISTANCE
    assert noise.numel() > DRAWS
    assert noise.unique().numel() > 0.99 * noise.numel()


def test_randomness_comes_from_the_generator_alone(pack: LatentPack) -> None:
    def draw(seed: int) -> tuple[Tensor, Tensor]:
        noisy = FlowMatching().corrupt(pack, torch.Generator().manual_seed(seed))
        return noisy.timesteps_B, noisy.tokens_SC

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, other = draw(0), draw(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.rounding
def test_padding_changes_neither_noise_nor_loss(pack: LatentPack, rng: torch.Generator) -> None:
    valid = pack.layout.valid
    bare = LatentPack(pack.tokens_SC[:valid], pack.texts, PackLayout(pack.layout.grids), pack.keys)
    with_padding, without = (FlowMatching().corrupt(p, torch.Generator().manual_seed(5)) for p in (pack, bare))
    assert torch.equal(with_padding.target_SC[:valid], without.target_SC)
    predicted = torch.randn(pack.layout.total, 64, generator=rng)
    predicted[valid:] = 1e6
    predicted.requires_grad_()
    loss, tokens = loss_sum(predicted, with_padding, pack.layout)
    wanted, wanted_tokens = loss_sum(predicted[:valid], without, bare.layout)
    assert tokens == wanted_tokens == valid
    assert loss.item() == pytest.approx(wanted.item(), rel=SUM_OF_SQUARES)
    loss.backward()
    assert predicted.grad is not None
    assert not predicted.grad[valid:].any()
    assert predicted.grad[:valid].abs().min() > 0


@pytest.mark.rounding
def test_loss_is_the_weighted_mean_square(pack: LatentPack, rng: torch.Generator) -> None:
    noisy = FlowMatching(shift=2.0).corrupt(pack, rng)
    predicted = torch.randn(pack.layout.total, 64, generator=rng)
    total = 0.0
    for i in range(3):
        weight = 1 + 2.0 * noisy.timesteps_B[i].item() / 1000
        for s in range(pack.layout.offsets[i], pack.layout.offsets[i + 1]):
            difference = predicted[s].double() - noisy.target_SC[s].double()
            total += weight * (difference**2).sum().item() / 64
    loss, tokens = loss_sum(predicted, noisy, pack.layout)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total, rel=SUM_OF_SQUARES)
    assert tokens == 11
    rounded, _ = loss_sum(predicted.bfloat16(), noisy, pack.layout)
    assert rounded.dtype == torch.float32


def text_pack(count: int, rng: torch.Generator) -> LatentPack:
    latents = [torch.zeros(16, 1, 2, 2)] * count
    return pack_latents(latents, [torch.randn(3, 8, generator=rng) for _ in latents], ["a"] * count, text_length=4)


def test_captions_are_dropped_one_by_one(rng: torch.Generator) -> None:
    pack, empty = text_pack(4000, rng), torch.randn(2, 8, generator=rng)
    text = FlowMatching(caption_dropout=0.3).corrupt(pack, rng, empty).text_BTD
    padded = torch.cat([empty, torch.zeros(2, 8)])
    dropped = (text == padded).all(-1).all(-1)
    kept = (text == pack.text_BTD).all(-1).all(-1)
    assert (dropped ^ kept).all(), "each sample has its own text or the empty prompt's, whole"
    # Five standard deviations of a binomial.
    assert abs(dropped.float().mean().item() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 4000)
    assert torch.equal(FlowMatching(caption_dropout=1.0).corrupt(pack, rng, empty).text_BTD, padded.expand(4000, 4, 8))


def test_caption_dropout_moves_neither_sigma_nor_noise(rng: torch.Generator) -> None:
    pack, empty = text_pack(20, rng), torch.ones(1, 8)
    none, some = (
        FlowMatching(caption_dropout=p).corrupt(pack, torch.Generator().manual_seed(3), empty) for p in (0.0, 0.5)
    )
    assert torch.equal(none.target_SC, some.target_SC)
    assert torch.equal(none.timesteps_B, some.timesteps_B)
    assert torch.equal(none.text_BTD, pack.text_BTD)
    again = FlowMatching(caption_dropout=0.5).corrupt(pack, torch.Generator().manual_seed(3), empty)
    assert torch.equal(some.text_BTD, again.text_BTD)


def test_dropping_captions_needs_the_empty_prompt(rng: torch.Generator) -> None:
    pack = text_pack(2, rng)
    FlowMatching().corrupt(pack, rng)
    with pytest.raises(
        ValueError, match=r"caption_dropout is 0\.1 and no embedding of the empty prompt was given; give"
    ):
        FlowMatching(caption_dropout=0.1).corrupt(pack, rng)
    with pytest.raises(ValueError, match="9 tokens; the model takes at most 4"):
        FlowMatching(caption_dropout=0.1).corrupt(pack, rng, torch.zeros(9, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"uniform_mix": 1.5}, r"uniform_mix is 1\.5"),
        ({"caption_dropout": -0.1}, r"caption_dropout is -0\.1"),
        ({"shift": 0.0}, r"shift is 0\.0"),
        ({"logit_std": -1.0}, r"logit_std is -1\.0"),
        ({"sigma_min": 0.5, "sigma_max": 0.5}, r"sigma runs from 0\.5 to 0\.5"),
        ({"sigma_max": 1.5}, r"sigma runs from 0\.0 to 1\.5"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatching(**settings)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the checks of annotations, as users run it."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("field", ["density", "weighting"])
def test_unknown_names_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 'cosine'; expected"):
        FlowMatching(**{field: "cosine"})  # type: ignore[arg-type]
