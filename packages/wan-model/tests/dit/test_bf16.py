"""A model in bf16: what is computed in fp32 nevertheless."""

import copy
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


def test_every_gradient_is_near_that_of_fp64(small_model: WanDiT, rng: torch.Generator) -> None:
    """Of the weights and of the inputs. A wrong sign or factor would be an error of one or more."""
    model = small_model.to_precision(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    layout = PackLayout(((2, 3, 4), (1, 3, 5)), padding=2)
    config = model.config
    inputs = [
        torch.randn(layout.total, config.token_in, generator=rng).bfloat16(),
        torch.randn(2, config.text_length, config.text_dim, generator=rng).bfloat16(),
    ]
    probe = torch.randn(layout.total, config.token_out, generator=rng).bfloat16()

    def gradients(one: WanDiT, dtype: torch.dtype) -> dict[str, Tensor]:
        tokens, texts = (value.to(dtype, copy=True).requires_grad_() for value in inputs)
        velocity = one(tokens, torch.tensor([800.0, 40.0]), texts, layout)
        (velocity * probe.to(dtype))[: layout.valid].sum().backward()
        found = {name: parameter.grad for name, parameter in one.named_parameters()}
        found |= {"tokens": tokens.grad, "texts": texts.grad}
        return {name: grad for name, grad in found.items() if grad is not None}

    got, wanted = gradients(model, torch.bfloat16), gradients(exact, torch.float64)
    assert set(got) == {name for name, _ in model.named_parameters()} | {"tokens", "texts"}
    for name, value in wanted.items():
        assert value.norm() > 0, name
        off = float((got[name].double() - value).norm() / value.norm())
        assert off < 0.3, f"the gradient of {name} is off by {off:.2f}"
