"""What a block moves, launches and keeps in bf16 with the kernels, against torch's operations one by one."""

import pytest
import torch

from wan_model import PackLayout
from wan_model.testing.traffic import BLOCK, PACKS, BlockStep, block_step

pytest.importorskip("triton", reason="Triton is not installed")


def step(layout: PackLayout, *, kernels: bool) -> BlockStep:
    return block_step(BLOCK, layout, kernels=kernels)


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
