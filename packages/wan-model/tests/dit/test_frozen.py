"""Frozen weights in fp8 and in main memory: the formula and its error, gradients, equality to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model import PackLayout, WanDiT
from wan_model.dit.adapters import adapter_parameters, add_adapters
from wan_model.dit.fp8 import dequantize, fp8_linear, largest_of_rows, quantize
from wan_model.dit.frozen import StreamedWeights, materialize, to_fp8
from wan_model.dit.lora import LINEARS, LoraSettings

LAYOUT = PackLayout(((2, 3, 4), (1, 2, 5)))
CPU = torch.device("cpu")


@pytest.fixture
def adapted(small_model: WanDiT) -> WanDiT:
    """Adapters in some linears, whose A and B are alive."""
    add_adapters(small_model, LoraSettings(rank=4, targets=("attn1.*", "ffn.net.2")))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(small_model).values():
            parameter.normal_(std=0.1, generator=generator)
    return small_model


def results(model: WanDiT) -> dict[str, Tensor]:
    """The output, and the gradient of every adapter."""
    rng = torch.Generator().manual_seed(4)
    tokens = torch.randn(LAYOUT.total, model.config.token_in, generator=rng)
    text = torch.randn(2, model.config.text_length, model.config.text_dim, generator=rng)
    model.zero_grad()
    out = model(tokens, torch.tensor([412.5, 90.0]), text, LAYOUT)
    out.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in adapter_parameters(model).items()}
    assert all(gradient is not None for gradient in gradients.values())
    return {"output": out.detach(), **{key: gradient for key, gradient in gradients.items() if gradient is not None}}


# -- fp8 --------------------------------------------------------------------------------------------------------------


def test_a_value_is_within_half_a_step_of_fp8() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator) * torch.logspace(-6, 3, 64)[:, None]
    weight[5] = 0
    kept, scale = quantize(weight, largest_of_rows(weight))
    assert (kept.dtype, kept.shape, scale.shape) == (torch.float8_e4m3fn, weight.shape, (64, 1))
    # Three bits of mantissa; below 2^-6 of a scale the steps are 2^-9.
    bound = torch.maximum(weight.abs() * 2**-4, scale * 2**-10)
    assert ((dequantize(kept, scale, torch.float32) - weight).abs() <= bound * (1 + 1e-6)).all()
    assert (kept.float().abs().amax(1)[torch.arange(64) != 5] == 448).all(), "every row uses the whole range"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_rounded_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 40, generator=generator), torch.randn(24, generator=generator).to(dtype)
    x = torch.randn(7, 40, generator=generator).to(dtype).requires_grad_()
    kept, scale = quantize(weight, largest_of_rows(weight))
    rounded = (kept.float() * scale).to(dtype)
    other = x.detach().clone().requires_grad_()
    probe = torch.randn(7, 24, generator=generator).to(dtype)
    out, wanted = fp8_linear(x, kept, scale, bias), F.linear(other, rounded, bias)
    assert torch.equal(out, wanted)
    (out * probe).sum().backward()
    (wanted * probe).sum().backward()
    assert x.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(x.grad, other.grad)


def test_a_model_in_fp8_keeps_a_byte_for_each_weight_and_says_its_error(adapted: WanDiT) -> None:
    exact, before = results(adapted), {key: value.clone() for key, value in adapted.state_dict().items()}
    error = to_fp8(adapted, CPU)
    after = adapted.state_dict()
    in_fp8 = {key for key, value in after.items() if value.dtype == torch.float8_e4m3fn}
    assert in_fp8 == {f"blocks.{layer}.{name}.weight" for layer in range(2) for name in LINEARS}
    differences = {
        key: dequantize(after[key], adapted.get_submodule(key.removesuffix(".weight")).weight_scale, torch.float32)  # type: ignore[arg-type]
        - before[key]
        for key in in_fp8
    }
    every = torch.cat([value.flatten() for value in differences.values()]).norm()
    assert error.relative == pytest.approx(
        float(every / torch.cat([before[k].flatten() for k in in_fp8]).norm()), rel=1e-5
    )
    assert error.largest == pytest.approx(
        max(float(value.norm() / before[key].norm()) for key, value in differences.items()), rel=1e-5
    )
    assert 0.01 < error.relative < 0.04, "a mantissa of three bits"
    got = results(adapted)
    assert got.keys() == exact.keys()
    for key, value in exact.items():
        assert 0 < (got[key] - value).norm() < 0.25 * value.norm(), key
    adapted.to_precision(torch.bfloat16)
    assert adapted.get_parameter("blocks.0.attn1.to_q.weight").dtype == torch.float8_e4m3fn


# -- in main memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fp8", [False, True])
def test_streamed_blocks_are_equal_to_the_bit(adapted: WanDiT, fp8: bool) -> None:
    if fp8:
        to_fp8(adapted, CPU)
    adapted.recompute = "block"
    wanted = results(adapted)
    of_blocks = {key: value for key, value in adapted.named_parameters() if key.startswith("blocks.")}
    frozen = sum(value.nbytes for key, value in of_blocks.items() if ".lora_" not in key)
    adapted.streamed = StreamedWeights(dict(adapted.blocks.items()), CPU)
    assert adapted.streamed.nbytes == frozen
    kept = {key for key, value in of_blocks.items() if value.numel()}
    assert kept == {key for key in of_blocks if ".lora_" in key}, "nothing frozen is left in the blocks"
    for _ in range(2):
        got = results(adapted)
        assert all(torch.equal(got[key], value) for key, value in wanted.items())


def test_the_next_block_is_fetched_while_one_computes() -> None:
    blocks = {str(number): nn.Linear(2, 2) for number in range(4)}
    for block in blocks.values():
        block.requires_grad_(False)
    streamed, fetched, held = StreamedWeights(dict(blocks), CPU), [], []
    fetch = streamed._fetch

    def noted(name: str) -> None:
        fetched.append(name)
        fetch(name)

    streamed._fetch = noted  # type: ignore[method-assign]
    for number in (0, 1, 2, 3, 3, 2, 1, 0, 0, 1):  # forward, backward, forward
        streamed.call(str(number), blocks[str(number)], torch.zeros(1, 2))
        held.append(len(streamed._fetched))
    assert max(held) == 1, "beside that of the block that computes, at most one is on the device"
    # At the turns the block is fetched again; else never one that was fetched already.
    assert fetched == ["0", "1", "2", "3", "3", "2", "1", "0", "0", "1", "2"]


def test_parameters_keep_what_a_runtime_has_noted_on_them() -> None:
    with torch.device("meta"):
        module: Any = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    module[0].weight.partition_dim = 1
    module[1].requires_grad_(False)
    materialize(module, lambda key, parameter: CPU)
    assert module[0].weight.partition_dim == 1
    assert not module[0].weight.is_meta
    assert [parameter.requires_grad for parameter in module.parameters()] == [True, True, False, False]
