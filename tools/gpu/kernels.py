"""Every fused kernel against its formula in fp64: values and gradients, with and without them, and recomputed."""

import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.context import Context
from gpu.fused_operations import EPS, OPERATIONS, Function, Operation, draw, kernels_used, rotated
from gpu.rows import Failed, Found, Row, Value
from wan_model import PackLayout, TokenRows
from wan_model.dit.recompute import Recompute, recomputed
from wan_model.dit.rope import rotary_table
from wan_model.testing import rounding_scale
from wan_model.testing.interpreter import interpreter_problem

# A result is rounded once, by at most u of it, where u is the unit roundoff; Triton's interpreter truncates. Before
# that it is computed in fp32, whose rounding ``rounding_scale`` knows.
_FP32_DEVIATIONS = 16.0
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PACK = PackLayout(((2, 16, 26), (1, 30, 52), (1, 1, 1), (1, 9, 7)), padding=3)
# The interpreter takes milliseconds a row.
_TINY_PACK = PackLayout(((1, 2, 3), (1, 1, 1), (1, 1, 2)), padding=1)


def _distance(got: Tensor, wanted: Tensor, scale: Tensor, truncates: bool) -> float:
    """The largest error beside its bound; at most 1 is rounding, and not a number is infinite."""
    unit = torch.finfo(got.dtype).eps * (1.0 if truncates else 0.5)
    # Few samples can underestimate the deviation of one element, hence at least that of its row.
    in_fp32 = scale.maximum(scale.square().mean(-1, keepdim=True).sqrt())
    bound = unit * wanted.abs() + _FP32_DEVIATIONS * in_fp32 + torch.finfo(got.dtype).tiny
    return float(((got.double() - wanted).abs() / bound).max().nan_to_num(nan=float("inf")))


def compare(operation: Operation, call: Function, inputs: list[Tensor], rows: TokenRows, head: int) -> Found:
    """A row of an operation.

    Args:
        operation: with its formula.
        call: computes it.
        inputs: of ``draw``.
        rows, head: of the formula.

    Raises:
        Failed: a value or a gradient is further from fp64 than rounding, or the ways to call it differ.
    """
    *leaves, grad = inputs

    def exact() -> dict[str, Tensor]:
        doubles = [x.double().requires_grad_() for x in leaves]
        out = operation.formula(rows, head)(*doubles)
        gradients = torch.autograd.grad((out * grad.double()).sum(), doubles)
        return {"value": out.detach(), **{f"gradient {i}": one for i, one in enumerate(gradients)}}

    def computed(function: Function) -> dict[str, Tensor]:
        own = [x.clone().requires_grad_() for x in leaves]
        out = function(*own)
        gradients = torch.autograd.grad(out, own, grad)
        return {"value": out.detach(), **{f"gradient {i}": one for i, one in enumerate(gradients)}}

    wanted, scale, got = exact(), rounding_scale(exact), computed(call)
    truncates = os.environ.get("TRITON_INTERPRET") == "1"
    distances = {key: _distance(value, wanted[key], scale[key], truncates) for key, value in got.items()}
    numbers: dict[str, Value] = {f"{key} / bound": float(f"{value:.3g}") for key, value in distances.items()}
    wrong = [key for key, value in distances.items() if not value <= 1]
    with torch.no_grad():
        without = call(*(x.clone() for x in leaves))
    modes: tuple[Recompute, ...] = ("block", "all_but_attention", "elementwise")
    again = [computed(call), *(computed(functools.partial(_recomputed, call, mode)) for mode in modes)]
    same = {
        "equal without gradients": torch.equal(without, got["value"]),
        **{
            f"equal {how}": all(torch.equal(other[key], got[key]) for key in got)
            for how, other in zip(("twice", *(f"recomputed, {mode}" for mode in modes)), again, strict=True)
        },
    }
    numbers |= same
    wrong += [key for key, equal in same.items() if not equal]
    if wrong:
        raise Failed(f"beyond rounding or not equal: {', '.join(wrong)}", numbers)
    return Found("equal to fp64 within rounding, and to the bit however it is called", numbers)


def _recomputed(call: Function, mode: Recompute, *inputs: Tensor) -> Tensor:
    return recomputed(call, *inputs, mode=mode)


def split_norm(dtype: torch.dtype, heads: int, head: int, rows: TokenRows, with_rotation: bool, device: str) -> Found:
    """The norm of one rank's heads, to which the sums of the other ranks are added by formula.

    Raises:
        Failed: it is not the whole norm's part.
    """
    from wan_model.kernels.split_rms_norm import split_rms_norm_rotate

    rng = torch.Generator().manual_seed(6)
    count, width, own = rows.stop - rows.start, heads * head, heads // 2 * head
    x, probe = (torch.randn(count, width, generator=rng).to(device, dtype) for _ in range(2))
    weight = torch.randn(width, generator=rng).to(device, dtype)
    table = rotary_table(rows, head, x.device)

    def whole() -> dict[str, Tensor]:
        leaves = [value.double().requires_grad_() for value in (x, weight)]
        normed = leaves[0] / (leaves[0].square().mean(-1, keepdim=True) + EPS).sqrt() * leaves[1]
        out = rotated(normed, rows, head) if with_rotation else normed
        of_x, of_weight = torch.autograd.grad((out * probe.double()).sum(), leaves)
        return {"value": out[:, :own].detach(), "gradient 0": of_x[:, :own], "gradient 1": of_weight[:own]}

    theirs, slope = x[:, own:].double(), probe[:, own:].double()
    if with_rotation:  # the gradient of their part, rotated back
        pairs = torch.view_as_complex(slope.reshape(count, -1, head // 2, 2)) * table.to(torch.complex128).conj()
        slope = torch.view_as_real(pairs).flatten(1)
    scale = (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    added = iter([theirs.square().sum(-1), (slope * weight[own:].double() * theirs * scale).sum(-1)])
    mine, its_weight = x[:, :own].clone().requires_grad_(), weight[:own].clone().requires_grad_()
    out = split_rms_norm_rotate(
        mine, its_weight, EPS, torch.view_as_real(table) if with_rotation else None, width,
        lambda sums: sums.add_(next(added).float()),
    )  # fmt: skip
    gradients = torch.autograd.grad(out, (mine, its_weight), probe[:, :own])
    got = {"value": out.detach(), "gradient 0": gradients[0], "gradient 1": gradients[1]}
    wanted, deviation = whole(), rounding_scale(whole)
    truncates = os.environ.get("TRITON_INTERPRET") == "1"
    distances = {key: _distance(value, wanted[key], deviation[key], truncates) for key, value in got.items()}
    numbers: dict[str, Value] = {f"{key} / bound": float(f"{value:.3g}") for key, value in distances.items()}
    if not all(value <= 1 for value in distances.values()):
        raise Failed("beyond rounding of the whole norm's part", numbers)
    return Found("equal to its part of the whole norm within rounding", numbers)


def _usable(device: str) -> Found:
    import triton

    from wan_model.kernels.launch import try_out

    # Not available.usable(), which says why not in a warning only.
    try_out(torch.device(device, 0) if device == "cuda" else torch.device(device))
    where = "on the GPU" if device == "cuda" else "in Triton's interpreter"
    return Found(f"a kernel is compiled and runs {where}", {"Triton": triton.__version__})


def rows(context: Context) -> Iterator[Row]:
    """Each kernel in both precisions on a pack, then the split norm, a long video and the 14B model's width."""
    if not context.on_gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    heads, head = (12, 128) if context.on_gpu else (3, 20)
    pack = TokenRows.whole(PACK if context.on_gpu else _TINY_PACK)
    # A rank's rows under context or sequence parallelism, which begin and end inside samples.
    part = TokenRows(pack.layout, pack.layout.offsets[1] // 2, pack.layout.total - 1)

    def one(operation: Operation, where: TokenRows, dtype: torch.dtype, heads: int = heads) -> Found:
        inputs = draw(operation, where, heads * head, dtype, context.device)
        with kernels_used(True):
            return compare(operation, operation.call(where, head), inputs, where, head)

    def split(dtype: torch.dtype, with_rotation: bool) -> Found:
        return split_norm(dtype, heads // 2 * 2, head, pack, with_rotation, context.device)

    yield from context.row("a kernel", functools.partial(_usable, context.device), seconds=3)
    if not context.on_gpu and (problem := interpreter_problem()):
        yield Row("kernels", "not run", problem)
        return
    for dtype_name, dtype in _DTYPES.items():
        for operation in OPERATIONS:
            if context.quick and operation is not OPERATIONS[-1] and dtype_name == "fp32":
                continue
            name = f"{operation.name}, {dtype_name}"
            yield from context.row(name, functools.partial(one, operation, pack, dtype), seconds=3)
        for with_rotation in (False, True) if context.on_gpu else (True,):
            name = f"split RMS norm{' with rotation' if with_rotation else ''}, {dtype_name}"
            yield from context.row(name, functools.partial(split, dtype, with_rotation), seconds=3)
    # On a CPU one of each kind shows that it runs.
    for operation in OPERATIONS if context.on_gpu else OPERATIONS[:1]:
        name = f"{operation.name}, bf16, a rank's rows"
        yield from context.row(name, functools.partial(one, operation, part, torch.bfloat16))
    if not context.on_gpu:
        return
    video = TokenRows.whole(PackLayout(((21, 30, 52),)))
    for operation in OPERATIONS:
        name = f"{operation.name}, bf16, 32,760 rows"
        yield from context.row(name, functools.partial(one, operation, video, torch.bfloat16), seconds=3)
    for operation in OPERATIONS:
        name = f"{operation.name}, bf16, width 5,120"
        yield from context.row(name, functools.partial(one, operation, pack, torch.bfloat16, 40), seconds=4)
