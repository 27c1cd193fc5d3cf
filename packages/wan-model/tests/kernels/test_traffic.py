"""What a block moves, launches and keeps in bf16 with the kernels, against torch's operations one by one."""

import dataclasses

import pytest
import torch

from wan_model import PackLayout, TokenRows, WanConfig, WanDiT
from wan_model.dit.rope import rotary_table
from wan_model.testing.traffic import Traffic, counted

pytest.importorskip("triton", reason="Triton is not installed")
CONFIG = WanConfig(num_heads=2, head_dim=48, ffn_dim=560, num_layers=1, text_dim=16, text_length=32, freq_dim=32)
PACKS = {"a video": PackLayout(((4, 8, 8),)), "27 images": PackLayout(((1, 4, 8),) * 27)}


@dataclasses.dataclass
class Step:
    """The two passes of a block; bytes are in units of the rows in bf16."""

    forward: Traffic
    backward: Traffic
    unit: int


def step(layout: PackLayout, *, kernels: bool) -> Step:
    """A step of a block on a pack."""
    model, rng = WanDiT(CONFIG), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * 0.02
    block = model.to_precision(torch.bfloat16).blocks["0"]
    samples, width, rows = layout.num_samples, CONFIG.hidden_size, TokenRows.whole(layout)
    x, text = (
        torch.randn(count, width, generator=rng).bfloat16().requires_grad_()
        for count in (layout.total, samples * CONFIG.text_length)
    )
    time = torch.randn(samples, 6, width, generator=rng).requires_grad_()
    offsets = tuple(i * CONFIG.text_length for i in range(samples + 1))
    arguments = (x, time, text, rows, rotary_table(rows, CONFIG.head_dim, torch.device("cpu")), offsets)
    with counted(kernels=kernels) as forward:
        out = block(*arguments)
    with counted(kernels=kernels) as backward:
        out.backward(torch.ones_like(out))
    return Step(forward, backward, x.numel() * 2)


@pytest.mark.parametrize("name", PACKS)
def test_a_block_moves_and_keeps_half(name: str) -> None:
    with_kernels, without = (step(PACKS[name], kernels=kernels) for kernels in (True, False))
    assert with_kernels.forward.bytes < 0.5 * without.forward.bytes
    assert with_kernels.backward.bytes < 0.5 * without.backward.bytes
    # No fp32 copy of the rows: the rotary table and the modulation only.
    assert with_kernels.forward.kept[torch.float32] < 2 * with_kernels.unit
    assert without.forward.kept[torch.float32] > 15 * without.unit
    assert sum(with_kernels.forward.kept.values()) < 0.75 * sum(without.forward.kept.values())


def test_launches_do_not_depend_on_the_number_of_samples() -> None:
    video, images, without = (
        step(PACKS[name], kernels=kernels)
        for name, kernels in (("a video", True), ("27 images", True), ("27 images", False))
    )
    assert images.forward.launches <= video.forward.launches + 2
    assert images.forward.launches < 0.1 * without.forward.launches
    assert images.backward.launches < 0.11 * without.backward.launches
