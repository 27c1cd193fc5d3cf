"""FLOP counts: the worked table, a count of what torch really multiplies, and packs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wan_model import WAN_1_3B, WAN_14B, PackLayout, WanConfig, WanDiT, pack_flops
from wan_model.dit.adapters import add_adapters
from wan_model.dit.flops import training_flops
from wan_model.dit.lora import LoraSettings

P480, RECIPE, P720 = (21, 30, 52), (24, 52, 30), (21, 45, 80)


@pytest.mark.parametrize(
    ("config", "grid", "tokens", "forward", "core_share", "training", "sampling"),
    [
        (WAN_1_3B, P480, 32_760, 283.0, 70, 0.849, 28.3),
        (WAN_14B, P480, 32_760, 1678.4, 52, 5.035, 167.8),
        (WAN_14B, RECIPE, 37_440, 2061, 56, 6.184, 206.1),
        (WAN_1_3B, P720, 75_600, 1249.8, 84, 3.750, 125.0),
        (WAN_14B, P720, 75_600, 6523, 72, 19.57, 652.3),
    ],
)
def test_worked_table(
    config: WanConfig,
    grid: tuple[int, int, int],
    tokens: int,
    forward: float,
    core_share: int,
    training: float,
    sampling: float,
) -> None:
    flops = pack_flops(config, PackLayout((grid,)))
    assert PackLayout((grid,)).valid == tokens
    assert f"{flops.forward / 1e12:.4g}" == f"{forward:.4g}"
    assert round(100 * flops.self_attention / flops.forward) == core_share
    assert f"{flops.training / 1e15:.4g}" == f"{training:.4g}"
    assert f"{50 * 2 * flops.forward / 1e15:.1f}" == f"{sampling:.1f}"


CONFIG = WanConfig(num_heads=3, head_dim=20, num_layers=2, ffn_dim=112, text_dim=28, text_length=16, freq_dim=32)
LAYOUT = PackLayout(((2, 3, 4), (1, 5, 2), (1, 1, 1)))


def counted(lora: LoraSettings | None, *, backward: bool) -> int:
    """What torch multiplies; the inputs of the model have no gradient."""
    model = WanDiT(CONFIG, None).to("meta")
    if lora is not None:
        add_adapters(model, lora)
    arguments = (torch.empty(LAYOUT.total, 64), torch.empty(3), torch.empty(3, 16, 28))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = model(*(x.to("meta") for x in arguments), LAYOUT)
        if backward:
            out.sum().backward()
    return int(counter.get_total_flops())


def test_it_is_what_torch_multiplies() -> None:
    assert counted(None, backward=False) == pack_flops(CONFIG, LAYOUT).forward


LORAS = {
    "everything": ("*",),
    "the last linear of all": ("blocks.1.ffn.net.2",),
    "queries": ("attn1.to_q",),
    "values of the text": ("attn2.to_v", "blocks.1.attn1.to_v"),
    "what is often adapted": ("to_q", "to_k", "to_v", "to_out.0"),
    "the second block": ("blocks.1.*",),
}


@pytest.mark.parametrize("targets", LORAS.values(), ids=LORAS.keys())
def test_a_step_of_adapters_is_what_torch_multiplies(targets: tuple[str, ...]) -> None:
    lora = LoraSettings(4, targets=targets)
    assert counted(lora, backward=True) == training_flops(CONFIG, LAYOUT, lora)


def test_a_step_of_adapters_in_closed_form() -> None:
    s, t, h, f, layers, r = 32_760, 512, 5120, 13824, 40, 32
    wanted = (
        pack_flops(WAN_14B, PackLayout((P480,))).forward
        + layers * (8 * s * s * h + 8 * s * t * h + 12 * s * h * h + 4 * s * h * f)
        + 2 * s * h * 64
        + layers * r * (6 * (12 * s * h + 2 * s * (h + f) + 4 * t * h) - 4 * t * h)
        - 6 * s * h * h
        - 6 * s * h * r
    )
    found = training_flops(WAN_14B, PackLayout((P480,)), LoraSettings(r))
    assert found == wanted
    assert 0.8 < found / training_flops(WAN_14B, PackLayout((P480,))) < 0.9, "attention has all of its gradients"


def test_squares_are_taken_per_sample_and_padding_is_free() -> None:
    grids = ((4, 3, 5), (1, 8, 8), (2, 2, 2))
    pack = pack_flops(WAN_1_3B, PackLayout(grids))
    alone = [pack_flops(WAN_1_3B, PackLayout((grid,))) for grid in grids]
    assert pack == alone[0] + alone[1] + alone[2]
    assert pack == pack_flops(WAN_1_3B, PackLayout(grids, padding=11))
    shorter = pack_flops(WAN_1_3B, PackLayout(grids), text_length=226)
    assert shorter.self_attention == pack.self_attention
    assert shorter.cross_attention * 512 == pack.cross_attention * 226
