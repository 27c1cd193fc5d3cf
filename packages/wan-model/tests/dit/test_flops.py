"""FLOP counts: the worked table, a count of what torch really multiplies, and packs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wan_model import WAN_1_3B, WAN_14B, PackLayout, WanConfig, WanDiT, pack_flops

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


def test_it_is_what_torch_multiplies() -> None:
    config = WanConfig(num_heads=3, head_dim=20, num_layers=2, ffn_dim=112, text_dim=28, text_length=16, freq_dim=32)
    layout = PackLayout(((2, 3, 4), (1, 5, 2), (1, 1, 1)))
    model = WanDiT(config, None).to("meta")
    arguments = (torch.empty(layout.total, 64), torch.empty(3), torch.empty(3, 16, 28))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*(x.to("meta") for x in arguments), layout)
    assert counter.get_total_flops() == pack_flops(config, layout).forward


def test_squares_are_taken_per_sample_and_padding_is_free() -> None:
    grids = ((4, 3, 5), (1, 8, 8), (2, 2, 2))
    pack = pack_flops(WAN_1_3B, PackLayout(grids))
    alone = [pack_flops(WAN_1_3B, PackLayout((grid,))) for grid in grids]
    assert pack == alone[0] + alone[1] + alone[2]
    assert pack == pack_flops(WAN_1_3B, PackLayout(grids, padding=11))
    shorter = pack_flops(WAN_1_3B, PackLayout(grids), text_length=226)
    assert shorter.self_attention == pack.self_attention
    assert shorter.cross_attention * 512 == pack.cross_attention * 226
