"""What a block moves, launches and keeps in bf16 with the kernels, against torch's operations one by one."""

import pytest
import torch

from wan_model import PackLayout, TokenRows
from wan_model.dit.elementwise import gate_add_
from wan_model.dit.lora import LoraSettings
from wan_model.testing.memory_traffic import BLOCK, PACKS, BlockStep, block_step, counted

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
    assert with_kernels.forward.kept[torch.float32] < 0.1 * without.forward.kept[torch.float32]
    assert sum(with_kernels.forward.kept.values()) < 0.75 * sum(without.forward.kept.values())


@pytest.mark.parametrize("kernels", [True, False])
def test_a_frozen_block_pays_for_no_gradient_that_nobody_reads(kernels: bool) -> None:
    layout, rank = PACKS["a video"], 2
    trained = step(layout, kernels=kernels)
    frozen = block_step(BLOCK, layout, kernels=kernels, adapters=LoraSettings(rank, targets=("attn1.to_q",)))
    kept = sum(frozen.forward.kept.values())
    # Neither the two gated updates nor the inputs of frozen linears, which neither attention nor a norm keeps anyway.
    units = 9 if kernels else 17
    assert kept < sum(trained.forward.kept.values()) - units * frozen.unit
    assert frozen.backward.bytes < (0.75 if kernels else 0.8) * trained.backward.bytes
    assert frozen.backward.launches < (0.45 if kernels else 0.65) * trained.backward.launches


def test_launches_do_not_depend_on_the_number_of_samples() -> None:
    video, images, without = (
        step(PACKS[name], kernels=kernels)
        for name, kernels in (("a video", True), ("27 images", True), ("27 images", False))
    )
    assert images.forward.launches <= video.forward.launches + 2
    assert images.forward.launches < 0.1 * without.forward.launches
    assert images.backward.launches < 0.08 * without.backward.launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_of_another_type_is_no_reason_to_leave_the_kernel(dtype: torch.dtype) -> None:
    rows = TokenRows.whole(PACKS["27 images"])
    x, update = torch.zeros(rows.stop, 8, dtype=torch.bfloat16), torch.zeros(rows.stop, 8, dtype=dtype)
    gate = torch.zeros(rows.layout.num_samples, 8)
    with counted(kernels=True) as traffic, torch.no_grad():
        out = gate_add_(x, update, gate, rows)
    assert traffic.launches == 1
    assert out.dtype == torch.bfloat16
    assert (out is update) == (dtype == torch.bfloat16), "only memory of its own type is overwritten"
