"""The formula of what a block keeps in bf16, against what autograd keeps with the kernels for CUDA, counted on a CPU.

Autograd's saved-tensor hooks see every tensor that a forward pass keeps. The kernels themselves are not run.
"""

import dataclasses

import pytest
import torch

from wan_model import PackLayout, WanConfig
from wan_model.dit.lora import LoraSettings
from wan_train.model.layout import Layout
from wan_train.planning.memory import ActivationBytes

pytest.importorskip("triton", reason="Triton is not installed")

from wan_model.kernels.split_rms_norm import split_rms_norm_rotate
from wan_model.testing.memory_traffic import block_step, counted

NARROW = WanConfig(num_heads=2, head_dim=48, ffn_dim=560, num_layers=1, text_dim=16, text_length=32, freq_dim=32)
WIDE = dataclasses.replace(NARROW, num_heads=4, head_dim=64, ffn_dim=1024)
PACKS = {
    "a video": PackLayout(((4, 8, 8),)),
    "a video and padding": PackLayout(((4, 8, 8),), padding=8),
    "27 images": PackLayout(((1, 4, 8),) * 27),
    "a video and an image": PackLayout(((4, 8, 8), (1, 4, 8))),
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize("model", [NARROW, WIDE], ids=["width 96", "width 256"])
def test_a_block_keeps_what_the_formula_counts(model: WanConfig, pack: PackLayout) -> None:
    kept = sum(block_step(model, pack, kernels=True).forward.kept.values())
    # These two are the same for all blocks; the formula counts them once for the whole model.
    rotary_table = pack.total * model.head_dim * 4
    embedded_text = pack.num_samples * model.text_length * model.hidden_size * 2
    block = ActivationBytes.of(model, Layout(1), pack, bf16=True).block
    # Attention has no output for padding, which the formula does not leave out.
    assert kept == pytest.approx(block + rotary_table + embedded_text, rel=3e-3 if pack.padding else 1e-4)


ADAPTED = {
    "everything": LoraSettings(4),
    "one linear": LoraSettings(8, targets=("attn1.to_q",)),
    "what is often adapted": LoraSettings(4, targets=("to_q", "to_k", "to_v", "to_out.0")),
    "the feed-forward": LoraSettings(4, targets=("ffn.*",)),
    "the text": LoraSettings(4, targets=("attn2.to_k", "attn2.to_v", "attn2.to_out.0")),
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS.keys())
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("lora", ADAPTED.values(), ids=ADAPTED.keys())
def test_a_frozen_block_with_adapters_keeps_what_the_formula_counts(
    lora: LoraSettings, dropout: float, pack: PackLayout
) -> None:
    lora = dataclasses.replace(lora, dropout=dropout)
    step = block_step(NARROW, pack, kernels=True, adapters=lora, dropped=dropout > 0)
    kept = sum(step.forward.kept.values())
    rotary_table = pack.total * NARROW.head_dim * 4
    of_text = {"attn2.to_k", "attn2.to_v"} & {name.split(".", 2)[2] for name in lora.linears(NARROW)}
    embedded_text = pack.num_samples * NARROW.text_length * NARROW.hidden_size * 2 if of_text and not dropout else 0
    block = ActivationBytes.of(NARROW, Layout(1), pack, bf16=True, lora=lora).block
    # Attention has no output for padding, which the formula does not leave out.
    without_output = 2 * pack.padding * (NARROW.hidden_size * 2 + NARROW.num_heads * 4)
    assert kept == block + rotary_table + embedded_text - without_output


@pytest.mark.parametrize("width", [48, 96])
def test_a_split_norm_keeps_its_input_and_a_sum_for_each_row(width: int) -> None:
    rows = 64
    x, weight = torch.zeros(rows, width, dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(width))
    with counted(kernels=True) as traffic:
        split_rms_norm_rotate(x, weight, 1e-6, None, 2 * width, lambda sums: None)
    assert sum(traffic.kept.values()) == rows * (2 * width + 4)
