"""The operations between the matrix products, against plain fp64 formulae: values and gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wan_model import PackLayout, TokenRows
from wan_model.dit import elementwise as ew
from wan_model.dit.rope import rotary_table
from wan_model.testing import assert_rounds_to, rounding_scale

ROWS = TokenRows.whole(PackLayout(((2, 3, 4), (1, 2, 2), (1, 1, 5)), padding=3))
ONE = TokenRows.whole(PackLayout(((4, 3, 3),)))
WIDTH, PAIRS = 48, 8


def sample_of(rows: TokenRows) -> Tensor:
    index = torch.full((rows.stop - rows.start,), -1)
    for sample, start, stop in rows.segments:
        index[start:stop] = sample
    assert index.min() >= 0, "segments leave no gap"
    return index


def leaf(*shape: int, rng: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=rng).to(dtype).requires_grad_()


def results(function: Callable[..., Tensor], leaves: list[Tensor]) -> dict[str, Tensor]:
    """A function's value, and the gradients of a number to which every element of it contributes."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    gradients = torch.autograd.grad((out * probe).sum(), leaves)
    return {"value": out, **{f"gradient {i}": gradient for i, gradient in enumerate(gradients)}}


def compare(got: Callable[..., Tensor], wanted: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Values and gradients of two functions of the same leaves, the second in fp64."""
    exact = [x.detach().double() for x in leaves]
    assert_rounds_to(results(got, leaves), lambda: results(wanted, exact))


def compare_values(got: Tensor, wanted: Callable[..., Tensor], *inputs: Tensor) -> None:
    """A value, and a function of the same inputs in fp64."""
    exact = [x.detach().double() for x in inputs]
    assert_rounds_to({"value": got}, lambda: {"value": wanted(*exact)})


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the small tensors of these tests."""
    if request.param == "pieces":
        monkeypatch.setattr(ew, "_CHUNK_SIZE", 7 * WIDTH)


@pytest.mark.rounding
@pytest.mark.parametrize("rows", [ONE, ROWS], ids=["one sample", "pack"])
def test_norm_modulate(rows: TokenRows, rng: torch.Generator) -> None:
    samples, index = rows.layout.num_samples, sample_of(rows)
    x, shift, scale = (leaf(n, WIDTH, rng=rng) for n in (len(index), samples, samples))

    def plain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale[index]) + shift[index]

    compare(lambda x, shift, scale: ew.norm_modulate(x, shift, scale, rows, 1e-6), plain, [x, shift, scale])


@pytest.mark.rounding
@pytest.mark.parametrize("rows", [ONE, ROWS], ids=["one sample", "pack"])
def test_gate_add(rows: TokenRows, rng: torch.Generator) -> None:
    index = sample_of(rows)
    leaves = [leaf(n, WIDTH, rng=rng) for n in (len(index), len(index), rows.layout.num_samples)]
    compare(
        lambda x, y, gate: ew.gate_add_(x, y, gate, rows),
        lambda x, y, gate: x + y * gate[index],
        leaves,
    )
    x, y, gate = (leaf.detach() for leaf in leaves)
    kept = x.clone()
    with torch.no_grad():
        added = ew.gate_add_(x, y.clone(), gate, rows)
        compare_values(added, lambda x, y, gate: x + y * gate[index], x, y, gate)
        compare_values(ew.add_(x, y.clone()), torch.add, x, y)
    assert torch.equal(x, kept), "only the update is given up"


@pytest.mark.rounding
@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("turned", [False, True])
def test_rms_norm_with_rotation(turned: bool, rng: torch.Generator) -> None:
    table = rotary_table(ROWS, 2 * PAIRS, torch.device("cpu")) if turned else None
    x, weight = leaf(ROWS.stop, WIDTH, rng=rng), leaf(WIDTH, rng=rng)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        normed = x / (x.square().sum(-1, keepdim=True) / WIDTH + 1e-6).sqrt() * weight
        if table is None:
            return normed
        pairs = torch.view_as_complex(normed.view(len(x), -1, PAIRS, 2)) * table.to(torch.complex128)
        return torch.view_as_real(pairs).flatten(1)

    compare(lambda x, weight: ew.rms_norm_(x, weight, 1e-6, table), plain, [x, weight])
    with torch.no_grad():
        compare_values(ew.rms_norm_(x.clone(), weight, 1e-6, table), plain, x, weight)


@pytest.mark.rounding
@pytest.mark.usefixtures("pieces")
def test_tanh_gelu(rng: torch.Generator) -> None:
    x = torch.cat([torch.randn(40, WIDTH, generator=rng), torch.linspace(-30, 30, 10 * WIDTH).view(10, WIDTH)])
    x.requires_grad_()

    def plain(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    compare(lambda x: ew.tanh_gelu_(x * 1), plain, [x])
    with torch.no_grad():
        compare_values(ew.tanh_gelu_(x.clone()), plain, x)


def test_tanh_gelu_of_large_tensors_takes_no_second_one(rng: torch.Generator) -> None:
    x = torch.randn(2, ew._CHUNK_SIZE, generator=rng)
    with torch.no_grad():
        assert ew.tanh_gelu_(x).data_ptr() == x.data_ptr()
    hidden = (x.requires_grad_() * 1).view(-1)
    ew.tanh_gelu_(hidden).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


@pytest.mark.rounding
def test_rounding_happens_once(rng: torch.Generator) -> None:
    """Of bf16 tensors: computed in fp32, rounded to the nearest bf16 number at the end."""
    index, samples = sample_of(ROWS), ROWS.layout.num_samples
    x, y = (torch.randn(len(index), WIDTH, generator=rng).bfloat16() for _ in range(2))
    shift, scale = (torch.randn(samples, WIDTH, generator=rng) for _ in range(2))
    table = rotary_table(ROWS, 2 * PAIRS, torch.device("cpu"))
    wide_x, wide_y, weight = x.double(), y.double(), shift[0].bfloat16()
    for got, exact in (
        (
            ew.norm_modulate(x, shift, scale, ROWS, 1e-6),
            lambda: F.layer_norm(wide_x, (WIDTH,), eps=1e-6) * (1 + scale[index].double()) + shift[index].double(),
        ),
        (ew.gate_add_(x, y, scale, ROWS), lambda: wide_x + wide_y * scale[index].double()),
        (ew.rotate(x, table), lambda: ew.rotate(wide_x, table)),
        (ew.rms_norm_(x, weight, 1e-6), lambda: F.rms_norm(wide_x, (WIDTH,), weight.double(), 1e-6)),
    ):
        wanted = exact()
        in_fp32 = rounding_scale(lambda exact=exact: {"value": exact()})["value"]  # type: ignore[misc]
        assert got.dtype == torch.bfloat16
        # Half a unit in the last place of bf16, and before it the rounding of fp32.
        assert ((got.double() - wanted).abs() <= 2**-8 * wanted.abs() + 16 * in_fp32).all()
        assert (got == wanted.bfloat16()).float().mean() > 0.99
