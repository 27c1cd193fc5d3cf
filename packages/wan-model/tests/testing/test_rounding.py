"""Rounding scales: as large as the rounding of real operations and not much larger, and small beside real mistakes."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan_model import PackLayout, WanConfig, WanDiT
from wan_model.testing import assert_all_within, assert_within, rounding_scale, seeds

UNIT = 2.0**-24


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, :, :20], 3 * x[:, :, 20:40], x[:, :, 28:])


# The inputs' magnitude, and what is computed of them.
OPERATIONS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "product": (1, lambda x: x[0] @ x[1].T),
    "affine": (1, lambda x: F.linear(x[0], x[1], x[2, :, 0])),
    "batched product": (1, lambda x: x @ x.transpose(1, 2)),
    "sum": (1, lambda x: x.sum(1)),
    "sum of one sign": (1, lambda x: x.abs().sum(-1, keepdim=True)),
    "mean": (1, lambda x: x.mean(-1)),
    "polynomial": (1, lambda x: 3 * x.square() - x / (1 + x.square())),
    "softmax": (10, lambda x: x.softmax(-1)),
    "layer norm": (1, lambda x: F.layer_norm(5 + x, x.shape[-1:], x[0, 0] + 1, x[0, 1])),
    "rms norm": (1, lambda x: F.rms_norm(x, x.shape[-1:], x[0, 0] + 1, 1e-6)),
    "gelu": (3, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (3, F.silu),
    "sine": (5, lambda x: (x.sin() + x.cos()).exp()),
    "convolution": (1, lambda x: F.conv2d(x[None], x[:2, :3, :3].expand(4, 2, 3, 3).repeat(1, 2, 1, 1)[:, :4])),
    "attention": (1, attention),
    "rotation": (1, lambda x: torch.view_as_real(torch.view_as_complex(x.view(4, 41, 24, 2)).square())),
}


def values_and_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = function(x)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    (gradient,) = torch.autograd.grad((out * probe).sum(), [x])
    return {"value": out, "gradient": gradient}


@pytest.mark.rounding
@pytest.mark.parametrize("seed", seeds())
@pytest.mark.parametrize("name", OPERATIONS)
def test_scale_of_each_operation_is_that_of_its_rounding(name: str, seed: int) -> None:
    magnitude, function = OPERATIONS[name]
    # Numbers that fp32 holds exactly, so that the input itself is not rounded.
    x = normal(4, 41, 48, seed=seed, scale=magnitude).float()
    scale = rounding_scale(lambda: values_and_gradient(function, x.double()))
    got, exact = values_and_gradient(function, x), values_and_gradient(function, x.double())
    assert_all_within(got, exact, scale)
    for part, value in got.items():
        error = (value.double() - exact[part]).norm() / scale[part].norm()
        assert error > 0.02 or torch.equal(value.double(), exact[part]), (
            f"the scale of the {part} is {1 / error:.0f} times the error of fp32"
        )


def test_scale_of_a_sum_is_the_closed_form() -> None:
    x = normal(2000, seed=3)
    runs: dict[str, Tensor] = {f"{i}": x.roll(i) + 0.1 for i in range(50)}
    scale = rounding_scale(lambda: {name: (value * 1.0000001).sum() for name, value in runs.items()})
    total, magnitude = (x + 0.1).sum(), (x + 0.1).abs().sum()
    wanted = UNIT * math.hypot(magnitude, total * math.sqrt(2000 / 3))
    found = torch.stack(list(scale.values())).square().mean().sqrt().item()
    # The roundings of equal sums are equal, so there are eight samples and not 1,600.
    assert 0.3 * wanted < found < 2 * wanted


def test_scale_grows_where_terms_cancel() -> None:
    x = torch.tensor([1.0, 1e-3], dtype=torch.float64)
    large = rounding_scale(lambda: {"difference": (x * 1000 + 1) - x * 1000})["difference"]
    assert large[0] > 100 * UNIT
    assert large[1] < 5 * UNIT


def test_scale_is_proportional_to_the_unit_of_the_precision() -> None:
    def run() -> dict[str, Tensor]:
        return {"out": normal(8, 30, seed=1) @ normal(30, 4, seed=2)}

    single, half, double = (
        rounding_scale(run, dtype)["out"].norm() for dtype in (torch.float32, torch.float16, torch.float64)
    )
    assert (half / single).item() == pytest.approx(2**13, rel=0.2)
    assert (double / single).item() == pytest.approx(2**-29, rel=0.2)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(
    small_config: WanConfig, randomised: Callable[[nn.Module, int], None]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A transformer's gradients in fp32 and in fp64, and their scales."""
    model = WanDiT(small_config)
    randomised(model, 1)
    layout = PackLayout(((2, 3, 4), (1, 2, 5)))
    tokens, text = normal(layout.total, 64, seed=1), normal(2, small_config.text_length, small_config.text_dim, seed=2)
    probe = normal(layout.total, 64, seed=3)

    def run(model: WanDiT, dtype: torch.dtype) -> dict[str, Tensor]:
        model.zero_grad()
        out = model(tokens.to(dtype), torch.tensor([900.4, 37.25]), text.to(dtype), layout)
        (out * probe.to(dtype)).sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert len(found) == len(list(model.parameters()))
        return {name: gradient.clone() for name, gradient in found.items()}

    double = copy.deepcopy(model).double()
    scale = rounding_scale(lambda: run(double, torch.float64))
    return run(model, torch.float32), run(double, torch.float64), scale


@pytest.mark.parametrize(
    "name",
    [
        "patch_embedding.weight",
        "blocks.0.attn1.to_v.weight",
        "blocks.0.attn1.norm_q.weight",
        "blocks.1.attn2.to_v.bias",
        "blocks.1.ffn.net.0.proj.weight",
        "blocks.1.ffn.net.2.bias",
        "blocks.0.scale_shift_table",
        "condition_embedder.time_embedder.linear_1.weight",
        "condition_embedder.text_embedder.linear_2.bias",
        "proj_out.weight",
    ],
)
def test_an_error_of_one_in_ten_thousand_is_caught(
    name: str, gradients: tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
) -> None:
    got, exact, scale = gradients
    assert_all_within(got, exact, scale)
    planted = {**got, name: got[name] * 1.0001}
    with pytest.raises(AssertionError, match=rf"^{name} differs by .* which rounding bounds by"):
        assert_all_within(planted, exact, scale)


def test_the_message_names_the_worst_element() -> None:
    expected, scale = torch.ones(3, 4), torch.full((3, 4), 1e-7, dtype=torch.float64)
    actual = expected.clone()
    actual[1, 2] += 0.25
    with pytest.raises(
        AssertionError,
        match=r"^thing differs by 2\.50e-01 in norm, .* by 2\.77e-06; worst at \[1, 2\]: 1\.25 against 1, "
        r"error 2\.50e-01, bound 8\.00e-07$",
    ):
        assert_within(actual, expected, scale, "thing")


def test_what_is_not_a_number_is_never_within() -> None:
    broken = torch.tensor([1.0, math.nan])
    with pytest.raises(AssertionError, match=r"worst at \[1\]"):
        assert_within(broken, torch.ones(2), torch.ones(2).double())


def test_results_that_cannot_be_compared_are_refused() -> None:
    one, two = {"a": torch.ones(2).double()}, {"a": torch.ones(3).double()}
    with pytest.raises(AssertionError, match=r"a has the shapes \(2,\), \(3,\)"):
        assert_all_within(one, two, one)
    with pytest.raises(AssertionError, match=r"results differ in \['b'\]"):
        assert_all_within(one, {**one, "b": torch.ones(1)}, one)
    with pytest.raises(ValueError, match=r"got out in torch\.float32; expected float64 everywhere"):
        rounding_scale(lambda: {"out": torch.ones(2)})
