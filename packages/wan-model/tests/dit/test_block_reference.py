"""Each piece of the transformer's mathematics against a few plain lines that stand here."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wan_model import PackLayout, Stage, TokenRows, WanConfig, WanDiT
from wan_model.dit import model
from wan_model.dit.elementwise import rotate
from wan_model.dit.model import timestep_features
from wan_model.dit.ops import RMSNorm
from wan_model.dit.rope import axis_widths, rotary_table
from wan_model.testing import assert_rounds_to

CPU = torch.device("cpu")


def rope(x: Tensor, position: tuple[int, int, int]) -> Tensor:
    """One token's heads [H, E] in fp64: each pair of values is a complex number to be turned."""
    width = x.shape[-1]
    side = 2 * (width // 6)
    angles = [
        place * 10000 ** (-2 * i / size)
        for place, size in zip(position, (width - 2 * side, side, side), strict=True)
        for i in range(size // 2)
    ]
    turn = torch.polar(torch.ones(len(angles), dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    return torch.view_as_real(torch.view_as_complex(x.double().view(-1, width // 2, 2)) * turn).flatten(1)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + eps).sqrt()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(p: dict[str, Tensor], name: str, x: Tensor, source: Tensor, grid: Any, config: WanConfig) -> Tensor:
    """Queries of one sample; ``grid`` is None for the text, which is not turned."""
    q, k, v = (
        rows @ p[f"{name}.to_{letter}.weight"].T + p[f"{name}.to_{letter}.bias"]
        for rows, letter in ((x, "q"), (source, "k"), (source, "v"))
    )
    q, k = (rms(y, p[f"{name}.norm_{letter}.weight"], config.eps) for y, letter in ((q, "q"), (k, "k")))
    q, k, v = (y.view(len(y), config.num_heads, config.head_dim) for y in (q, k, v))
    if grid is not None:
        places = [(f, h, w) for f in range(grid[0]) for h in range(grid[1]) for w in range(grid[2])]
        q, k = (torch.stack([rope(row, place) for row, place in zip(y, places, strict=True)]) for y in (q, k))
    scores = torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(config.head_dim)
    out = torch.einsum("hqk,khe->qhe", scores.softmax(-1), v).flatten(1)
    return out @ p[f"{name}.to_out.0.weight"].T + p[f"{name}.to_out.0.bias"]


def block(p: dict[str, Tensor], x: Tensor, time_6D: Tensor, text: Tensor, grid: Any, config: WanConfig) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = p["scale_shift_table"][0] + time_6D
    y = norm(x, config.eps) * (1 + scale1) + shift1
    x = x + gate1 * attention(p, "attn1", y, y, grid, config)
    y = norm(x, config.eps) * p["norm2.weight"] + p["norm2.bias"]
    x = x + attention(p, "attn2", y, text, None, config)
    y = norm(x, config.eps) * (1 + scale2) + shift2
    y = gelu(y @ p["ffn.net.0.proj.weight"].T + p["ffn.net.0.proj.bias"])
    return x + gate2 * (y @ p["ffn.net.2.weight"].T + p["ffn.net.2.bias"])


@pytest.mark.rounding
def test_rope_turns_each_sample_from_its_own_origin(rng: torch.Generator) -> None:
    assert axis_widths(128) == (44, 42, 42)
    layout = PackLayout(((2, 1, 3), (1, 2, 2)), padding=2)
    x = torch.randn(layout.total, 3, 20, generator=rng)
    got = rotate(x.flatten(1), rotary_table(TokenRows.whole(layout), 20, CPU)).view_as(x)
    places = [(f, 0, w) for f in range(2) for w in range(3)] + [(0, h, w) for h in range(2) for w in range(2)]

    def plain() -> dict[str, Tensor]:
        return {"turned": torch.stack([rope(row, place) for row, place in zip(x, places, strict=False)])}

    assert_rounds_to({"turned": got[:10]}, plain)
    assert torch.equal(got[10:], x[10:]), "padding is not turned"


def test_rope_angles_far_out_keep_fp64_accuracy() -> None:
    # fp32 angles would be wrong by about 1e-4 here.
    table = rotary_table(TokenRows.whole(PackLayout(((5000, 1, 1),))), 128, CPU)
    wanted = [math.cos(4999 * 10000 ** (-2 * i / 44)) for i in range(22)]
    assert (table[-1, 0, :22].real.double() - torch.tensor(wanted, dtype=torch.float64)).abs().max() < 1e-7


def test_time_features() -> None:
    # In the last digit of fp32, also where fp32 angles would be wrong by 3e-5.
    for t in (0.0, 0.125, 537.3, 999.9):
        timestep = torch.tensor([t])
        angles = [timestep.item() * 10000 ** (-i / 128) for i in range(128)]
        wanted = torch.tensor([[*map(math.cos, angles), *map(math.sin, angles)]], dtype=torch.float64)
        got = timestep_features(timestep, 256)
        assert got.dtype == torch.float32
        assert (got.double() - wanted).abs().max() < 1e-7


@pytest.mark.rounding
def test_rms_norm_spans_all_heads(rng: torch.Generator) -> None:
    module = RMSNorm(60, 1e-6)
    torch.nn.init.normal_(module.weight, generator=rng)
    x = torch.randn(5, 60, generator=rng) * torch.linspace(0.1, 3, 60)
    normed, weight = module(x.clone()), module.weight.detach().double()
    assert_rounds_to({"normed": normed}, lambda: {"normed": rms(x.double(), weight, 1e-6)})
    per_head = rms(x.view(5, 3, 20), module.weight.view(3, 20), 1e-6).flatten(1)
    assert (normed - per_head).norm() > 0.1 * per_head.norm()


@pytest.mark.rounding
def test_block(small_model: WanDiT, small_config: WanConfig, rng: torch.Generator) -> None:
    grid, width = (2, 1, 3), small_config.hidden_size
    x, time = torch.randn(6, width, generator=rng), torch.randn(1, 6, width, generator=rng)
    text = torch.randn(4, width, generator=rng)
    module, layout = small_model.blocks["1"], PackLayout((grid,))
    rows = TokenRows.whole(layout)
    got = module(x, time, text, rows, rotary_table(rows, small_config.head_dim, CPU), (0, 4))
    double = {name: value.double() for name, value in module.state_dict().items()}

    def plain() -> dict[str, Tensor]:
        return {"out": block(double, x.double(), time[0].double(), text.double(), grid, small_config)}

    assert_rounds_to({"out": got}, plain)


@pytest.mark.rounding
def test_head_modulates_with_the_time_embedding(
    small_model: WanDiT, small_config: WanConfig, rng: torch.Generator
) -> None:
    head = WanDiT(small_config, stage=Stage(2, 2, is_first=False, is_last=True))
    head.load_state_dict({key: small_model.state_dict()[key] for key in head.state_dict()})
    x, t = torch.randn(4, small_config.hidden_size, generator=rng), torch.tensor([640.5])
    text = torch.zeros(1, small_config.text_length, small_config.text_dim)

    p = {name: value.double() for name, value in head.state_dict().items()}
    mlp = "condition_embedder.time_embedder.linear_"

    def plain() -> dict[str, Tensor]:
        features = model.timestep_features(t, small_config.freq_dim).double()
        hidden = F.silu(features @ p[f"{mlp}1.weight"].T + p[f"{mlp}1.bias"])
        embedding = hidden @ p[f"{mlp}2.weight"].T + p[f"{mlp}2.bias"]
        shift, scale = p["scale_shift_table"][0] + embedding
        normed = norm(x.double(), small_config.eps) * (1 + scale) + shift
        return {"out": normed @ p["proj_out.weight"].T + p["proj_out.bias"]}

    assert_rounds_to({"out": head(x, t, text, PackLayout(((1, 2, 2),)))}, plain)


@pytest.mark.rounding
def test_both_activations_are_tanh_gelu(small_model: WanDiT, rng: torch.Generator) -> None:
    text = torch.randn(1, 16, 28, generator=rng)
    p = {name: value.double() for name, value in small_model.condition_embedder.text_embedder.state_dict().items()}

    def embedded() -> dict[str, Tensor]:
        before = text[0].double() @ p["linear_1.weight"].T + p["linear_1.bias"]
        return {"out": gelu(before) @ p["linear_2.weight"].T + p["linear_2.bias"]}

    assert_rounds_to({"out": small_model.condition_embedder.text(text)}, embedded)

    expand, x = small_model.get_submodule("blocks.0.ffn.net.0"), torch.randn(50, 60, generator=rng)
    weight, bias = (expand.get_submodule("proj").get_parameter(name).detach().double() for name in ("weight", "bias"))
    assert_rounds_to({"out": expand(x)}, lambda: {"out": gelu(x.double() @ weight.T + bias)})
    exact = F.gelu(x.double() @ weight.T + bias)
    assert (expand(x) - exact).abs().max() > 1e-4, "exact GELU is another function"
