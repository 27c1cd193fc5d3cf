"""A model in bf16: what is computed in fp32 nevertheless."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wan_model import PackLayout, WanConfig, WanDiT

DEEP = WanConfig(num_heads=2, head_dim=12, num_layers=12, ffn_dim=48, text_dim=16, text_length=8, freq_dim=32)


def test_gradients_of_the_modulation_are_summed_over_the_blocks_in_fp32(
    randomised: Callable[[nn.Module, int], None],
) -> None:
    model = WanDiT(DEEP)
    randomised(model, 3)
    model.to_precision(torch.bfloat16)
    inputs: list[Tensor] = []

    def keep_input(block: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        time = arguments[1].clone()
        time.retain_grad()
        inputs.append(time)
        return (arguments[0], time, *arguments[2:])

    for block in model.blocks.values():
        block.register_forward_pre_hook(keep_input)
    projections: list[Tensor] = []
    model.condition_embedder.time_proj.register_forward_hook(lambda _, inputs, out: projections.append(out))
    layout = PackLayout(((1, 2, 3), (2, 2, 1)))
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randn(layout.total, DEEP.token_in, generator=rng)
    texts = torch.randn(2, 4, DEEP.text_dim, generator=rng)
    velocity = model(tokens, torch.tensor([900.0, 30.0]), texts, layout)
    (projection,) = projections
    projection.retain_grad()
    (velocity.float() * torch.randn(velocity.shape, generator=rng)).sum().backward()
    parts = [time.grad for time in inputs]
    assert len(parts) == DEEP.num_layers
    assert all(part is not None and part.dtype == torch.float32 for part in parts)
    whole = torch.stack([part for part in parts if part is not None]).double().sum(0)
    assert projection.grad is not None
    # Rounded once. Summed in bf16, every block would add an error of this size.
    assert torch.allclose(projection.grad.double(), whole.flatten(1), rtol=2**-8, atol=1e-6 * float(whole.abs().max()))
