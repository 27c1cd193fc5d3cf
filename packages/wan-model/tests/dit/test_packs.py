"""Packs: a sample's numbers do not depend on what lies beside it, and the stated order of tokens and values."""

import copy
import functools
from collections.abc import Callable

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model import LatentPack, PackLayout, TokenRows, WanConfig, WanDiT, pack_latents, pad_text, patchify, unpatchify
from wan_model.dit.model import PatchEmbedding
from wan_model.pack import Grid, PackedText, latent_grid, sample_index
from wan_model.testing import assert_all_within, assert_rounds_to, rounding_scale, seeds

CONFIG = WanConfig(num_heads=2, head_dim=16, num_layers=2, ffn_dim=48, text_dim=12, text_length=8, freq_dim=16)
# One frame is an image.
GRID = st.tuples(st.sampled_from([1, 1, 2, 3]), st.integers(1, 4), st.integers(1, 4))


@pytest.fixture(scope="module")
def model(randomised: Callable[[nn.Module, int], None]) -> WanDiT:
    built = WanDiT(CONFIG)
    randomised(built, 3)
    return built


@pytest.fixture(scope="module")
def double_model(model: WanDiT) -> WanDiT:
    return copy.deepcopy(model).double()


def samples(grids: list[Grid], seed: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    rng = torch.Generator().manual_seed(seed)
    latents = [torch.randn(16, f, 2 * h, 2 * w, generator=rng) for f, h, w in grids]
    texts = [torch.randn(1 + i % 8, 12, generator=rng) for i in range(len(grids))]
    return latents, texts, 1000 * torch.rand(len(grids), generator=rng)


def gradients(model: WanDiT, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The output, and every gradient of a loss to which every value contributes with its own weight."""
    model.zero_grad()
    out = run()
    (out * torch.arange(out.numel()).add(1.0).sin().view_as(out)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return {"output": out.detach(), **found}


class Case:
    """Samples, and what a model makes of their pack, and of one after the other."""

    def __init__(self, grids: list[Grid], padding: int, seed: int, dtype: torch.dtype) -> None:
        latents, texts, self.timesteps = samples(grids, seed)
        self.text = pad_text(texts, 8).to(dtype)
        self.tokens = [patchify(latent).to(dtype) for latent in latents]
        self.layout = PackLayout(tuple(grids), padding)

    def packed(self, model: WanDiT) -> dict[str, Tensor]:
        layout = self.layout
        tokens = torch.cat([*self.tokens, self.tokens[0].new_zeros(layout.padding, 64)])
        return gradients(model, lambda: model(tokens, self.timesteps, self.text, layout)[: layout.valid])

    def alone(self, model: WanDiT) -> dict[str, Tensor]:
        def run() -> Tensor:
            parts = []
            for i, (tokens, grid) in enumerate(zip(self.tokens, self.layout.grids, strict=True)):
                one = slice(i, i + 1)
                parts.append(model(tokens, self.timesteps[one], self.text[one], PackLayout((grid,))))
            return torch.cat(parts)

        return gradients(model, run)


@pytest.mark.rounding
@settings(max_examples=len(seeds(*range(25))), deadline=None, derandomize=True, database=None)
@given(grids=st.lists(GRID, min_size=1, max_size=16), padding=st.integers(0, 5), number=st.integers(0, 99))
def test_pack_equals_its_samples_alone(double_model: WanDiT, grids: list[Grid], padding: int, number: int) -> None:
    """In fp64, where no rounding hides a mistake: the bound is 10^5 units, and cancelling takes a tenth of them."""
    case = Case(grids, padding, number, torch.float64)
    got, wanted = case.packed(double_model), case.alone(double_model)
    # Where every sample is a single token the gradient of its queries and keys is zero but for rounding.
    floor = 1e-3 * max(value.norm().item() for value in wanted.values())
    for name, value in got.items():
        bound = 1e-11 * max(wanted[name].norm().item(), floor)
        assert (value - wanted[name]).norm() <= bound, name


@pytest.mark.rounding
@pytest.mark.parametrize(
    "grids",
    [
        [(2, 4, 5)],
        [(3, 4, 4), (1, 4, 4)],
        [(1, 3, 4)] * 5,
        [(5, 2, 3), (1, 6, 6), (2, 4, 2), (1, 1, 7), (3, 3, 3)],
        [(1 + i % 3, 2 + i % 4, 1 + i % 5) for i in range(16)],
    ],
    ids=["one", "video and image", "images", "mix", "sixteen"],
)
def test_pack_equals_its_samples_alone_in_fp32(
    grids: list[Grid], seed: int, randomised: Callable[[nn.Module, int], None]
) -> None:
    single = WanDiT(CONFIG)
    randomised(single, seed)
    double = copy.deepcopy(single).double()
    case, exact = (Case(grids, 3, seed, dtype) for dtype in (torch.float32, torch.float64))
    assert_all_within(case.packed(single), case.alone(single), rounding_scale(lambda: exact.packed(double)))


def test_padding_rows_influence_nothing(model: WanDiT) -> None:
    latents, texts, timesteps = samples([(2, 2, 3), (1, 3, 1)], 5)
    pack = pack_latents(latents, texts, ["a", "b"], text_length=8, multiple=8)
    assert pack.layout.padding == 1
    assert not pack.tokens_SC[-1].any()
    results = []
    for filling in (0.0, 1e3):
        tokens = pack.tokens_SC.clone()
        tokens[pack.layout.valid :] = filling
        tokens.requires_grad_()
        run = functools.partial(model, tokens, timesteps, pack.text_BTD, pack.layout)
        found = gradients(model, lambda run=run: run()[: pack.layout.valid])  # type: ignore[misc]
        assert tokens.grad is not None
        results.append((found, tokens.grad))
    (found, tokens_grad), (other, other_tokens_grad) = results
    assert all(torch.equal(found[name], other[name]) for name in found)
    assert torch.equal(tokens_grad, other_tokens_grad)
    assert not tokens_grad[pack.layout.valid :].any()


def test_each_sample_has_its_own_timestep_and_text(model: WanDiT) -> None:
    latents, texts, timesteps = samples([(1, 2, 2), (2, 2, 2), (1, 3, 3)], 6)
    pack = pack_latents(latents, texts, ["a", "b", "c"], text_length=8)
    others = timesteps.clone()
    others[1] = 999.0
    changed = pack.text_BTD.clone()
    changed[1, 0] += 1
    with torch.no_grad():
        base = model(pack.tokens_SC, timesteps, pack.text_BTD, pack.layout)
        for out in (
            model(pack.tokens_SC, others, pack.text_BTD, pack.layout),
            model(pack.tokens_SC, timesteps, changed, pack.layout),
        ):
            moved = (out - base).abs().amax(dim=1) > 0
            assert moved.tolist() == [i == 1 for i in sample_index(pack.layout, out.device).tolist()]


def test_a_layout_seen_in_inference_mode_can_be_trained_on(model: WanDiT) -> None:
    grids: list[Grid] = [(3, 4, 1), (1, 4, 3)]
    latents, texts, timesteps = samples(grids, 8)
    pack = pack_latents(latents, texts, ["a", "b"], text_length=8)
    with torch.inference_mode():
        model(pack.tokens_SC, timesteps, pack.text_BTD, pack.layout)
    got = gradients(model, lambda: model(pack.tokens_SC, timesteps, pack.text_BTD, pack.layout))
    assert got["patch_embedding.weight"].norm() > 0


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3)])
def test_order_of_tokens_and_values(patch: tuple[int, int, int]) -> None:
    pf, ph, pw = patch
    grid = (2, 3, 2)
    latent = torch.arange(5 * 2 * pf * 3 * ph * 2 * pw, dtype=torch.float32).view(5, 2 * pf, 3 * ph, 2 * pw)
    tokens = patchify(latent, patch)
    assert latent_grid(latent, patch) == grid
    for s, (f, h, w) in enumerate((f, h, w) for f in range(2) for h in range(3) for w in range(2)):
        values = [
            latent[c, f * pf + i, h * ph + j, w * pw + k].item()
            for i in range(pf)
            for j in range(ph)
            for k in range(pw)
            for c in range(5)
        ]
        assert tokens[s].tolist() == values
    assert torch.equal(unpatchify(tokens, grid, patch), latent)


@pytest.mark.rounding
def test_embedding_tokens_is_the_patch_convolution(rng: torch.Generator) -> None:
    module = PatchEmbedding(CONFIG)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, generator=rng)
    latent = torch.randn(16, 3, 4, 6, generator=rng)
    weight, bias = module.weight.detach().double(), module.bias.detach().double()

    def convolution() -> dict[str, Tensor]:
        return {"tokens": F.conv3d(latent[None].double(), weight, bias, stride=(1, 2, 2))[0].flatten(1).T}

    assert_rounds_to({"tokens": module(patchify(latent))}, convolution)


def test_rows_of_a_rank() -> None:
    layout = PackLayout(((1, 2, 3), (1, 1, 1), (2, 1, 2)), padding=1)
    whole = TokenRows.whole(layout)
    assert (whole.start, whole.stop) == (0, 12)
    assert whole.segments == ((0, 0, 6), (1, 6, 7), (2, 7, 12)), "padding counts to the last sample"
    assert [whole.part(rank, 3).segments for rank in range(3)] == [
        ((0, 0, 4),),
        ((0, 0, 2), (1, 2, 3), (2, 3, 4)),
        ((2, 0, 4),),
    ]
    assert whole.part(1, 2).part(1, 2) == TokenRows(layout, 9, 12)
    with pytest.raises(ValueError, match="12 tokens cannot be shared evenly by 5 ranks; pad"):
        whole.part(0, 5)


def test_layout_numbers() -> None:
    layout = PackLayout(((2, 3, 4), (1, 1, 5))).padded_to(16)
    assert (layout.lengths, layout.offsets, layout.padding) == ((24, 5), (0, 24, 29), 3)
    assert (layout.num_samples, layout.valid, layout.total) == (2, 29, 32)
    assert sample_index(layout, torch.device("cpu")).tolist() == [0] * 24 + [1] * 8


def texts_of(*lengths: int, length: int = 8, offset: float = 1.0) -> PackedText:
    """Texts of those lengths; no value is zero."""
    rows = torch.arange(4.0 * sum(lengths)).view(-1, 4) + offset
    return PackedText.of(rows.split(list(lengths)), length)


def test_texts_travel_without_padding_and_are_padded_where_they_arrive() -> None:
    texts = texts_of(3, 8, 1)
    assert texts.rows_RD.shape == (12, 4)
    padded = texts.padded()
    assert torch.equal(padded, pad_text(texts.rows_RD.split([3, 8, 1]), 8))
    pack = LatentPack(torch.zeros(6, 64), texts, PackLayout(((1, 1, 2),) * 3), ("a", "b", "c"))
    assert torch.equal(pack.text_BTD, padded)
    moved = pack.to(torch.device("cpu"), torch.bfloat16)
    assert moved.text_BTD.dtype == torch.bfloat16
    assert torch.equal(moved.text_BTD, padded.to(torch.bfloat16))
    assert moved.tokens_SC.dtype == torch.float32
    assert pack.to(torch.device("meta")).text_BTD.shape == (3, 8, 4)


def test_texts_of_several_packs_are_joined() -> None:
    parts = [texts_of(3, 1, length=4), texts_of(6, offset=100.0), texts_of(2, 8, offset=200.0)]
    rows = [
        row for part, lengths in zip(parts, ([3, 1], [6], [2, 8]), strict=True) for row in part.rows_RD.split(lengths)
    ]
    joined = PackedText.join(parts)
    assert (joined.samples, joined.length) == (5, 8)
    assert torch.equal(joined.padded(), pad_text(rows, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pack_arrives_as_it_is() -> None:
    pack = LatentPack(torch.ones(4, 64), texts_of(3, 8), PackLayout(((1, 1, 2),) * 2), ("a", "b"))
    there = pack.to(torch.device("cuda"))
    assert torch.equal(there.tokens_SC.cpu(), pack.tokens_SC)
    assert torch.equal(there.text_BTD.cpu(), pack.text_BTD)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackLayout(()), "at least one sample"),
        (lambda: PackLayout(((1, 0, 2),)), "positive counts"),
        (lambda: PackLayout(((1, 1, 1),), -1), "cannot be negative"),
        (lambda: PackLayout(((1, 1, 1),)).padded_to(0), "multiple of 0"),
        (lambda: latent_grid(torch.zeros(16, 4, 4), (1, 2, 2)), r"\[C, F, H, W\]; got \(16, 4, 4\)"),
        (lambda: patchify(torch.zeros(16, 1, 3, 4)), r"patch \(1, 2, 2\) does not divide .*\(1, 3, 4\)"),
        (lambda: pad_text([torch.zeros(9, 4)], 8), "9 tokens; the model takes at most 8"),
        (lambda: pad_text([], 8), "no text embeddings"),
        (lambda: pack_latents([], [], []), "at least one sample"),
        (lambda: pack_latents([torch.zeros(16, 1, 2, 2)], [], ["a"]), "1 latents, 0 texts and 1 keys"),
        (lambda: LatentPack(torch.zeros(3, 64), texts_of(2), PackLayout(((1, 1, 2),)), ("a",)), "3 tokens"),
        (lambda: LatentPack(torch.zeros(2, 64), texts_of(2, 3), PackLayout(((1, 1, 2),)), ("a",)), "2 texts"),
    ],
)
def test_what_cannot_be_packed_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("tokens", "timesteps", "text", "message"),
    [
        ((6, 64), (2,), (2, 8, 12), r"tokens of shape \(6, 64\); expected \(7, 64\)"),
        ((7, 48), (2,), (2, 8, 12), r"tokens of shape \(7, 48\); expected \(7, 64\)"),
        ((7, 64), (1,), (1, 8, 12), "1 timesteps and 1 texts; expected one of each .* 2 samples"),
        ((7, 64), (2,), (2, 8, 16), "width 16; expected 12"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    model: WanDiT, tokens: tuple[int, ...], timesteps: tuple[int, ...], text: tuple[int, ...], message: str
) -> None:
    layout = PackLayout(((1, 2, 2), (1, 1, 2)), padding=1)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(tokens), torch.zeros(timesteps), torch.zeros(text), layout)


def test_shapes_are_checked_while_testing() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        patchify(torch.zeros(16, 2, 2))


@torch.no_grad()
def test_prepared_text_is_the_same_text_and_computed_once(model: WanDiT) -> None:
    latents, texts, timesteps = samples([(2, 3, 2), (1, 2, 2)], 5)
    pack = pack_latents(latents, texts, ["a", "b"], text_length=8)
    prepared = model.prepare_text(pack.text_BTD)
    later = timesteps.flip(0)
    wanted = [model(pack.tokens_SC, at, pack.text_BTD, pack.layout) for at in (timesteps, later)]
    calls: list[str] = []
    watched = {name: part for name, part in model.named_modules() if "attn2.to_" in name or "text_embedder" in name}
    hooks = [part.register_forward_hook(lambda *_, name=name: calls.append(name)) for name, part in watched.items()]
    got = [model(pack.tokens_SC, at, prepared, pack.layout) for at in (timesteps, later)]
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, wanted, strict=True))
    assert not torch.equal(*got)
    assert set(calls) == {f"blocks.{i}.attn2.{part}" for i in (0, 1) for part in ("to_q", "to_out.0")}
    with pytest.raises(ValueError, match="got 2 timesteps and 1 texts"):
        model(pack.tokens_SC, timesteps, model.prepare_text(pack.text_BTD[:1]), pack.layout)
    with pytest.raises(ValueError, match="got text embeddings of width 5; expected 12"):
        model.prepare_text(torch.zeros(2, 8, 5))
