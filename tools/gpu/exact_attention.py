"""Attention and its gradients in fp64, and how far rounding may move a fused implementation from them.

The model of rounding. A fused kernel (flash attention and its relatives, forward and backward) keeps scores and sums in
fp32. It rounds to the precision of its inputs, of unit roundoff u: the weights P before they multiply V or the
gradient, the slopes dS before they multiply K and Q, and its results. A rounding error has a deviation of at most
u / sqrt(3) of the value, independent of the others; a sum in fp32 errs by 2^-24 of its terms. The squares of the errors
that reach a result are added up. D, the sum of gradient times result of a row, is computed from the rounded result, so
its error is common to the row.

Shapes: H heads, S queries, K keys, E head width.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from gpu.rows import Failed, Value

RESULTS = ("out", "dq", "dk", "dv")
_FP32 = 2.0**-24
# Elements of a matrix of scores that are held at once.
_MOST_SCORES = 1 << 26


@dataclasses.dataclass
class Exact:
    """Results in fp64 [tokens, H, E], and the deviation that rounding gives each element, by names of ``RESULTS``."""

    values: dict[str, Tensor]
    deviations: dict[str, Tensor]


def _segment(q: Tensor, k: Tensor, v: Tensor, g: Tensor, unit: float) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, value and variance [H, length, E] of each result of one segment, in fp64; chunks of queries at a time."""
    scale, rounding, single = q.shape[-1] ** -0.5, unit**2 / 3, _FP32**2
    outs: list[Tensor] = []
    out_vars: list[Tensor] = []
    dqs: list[Tensor] = []
    dq_vars: list[Tensor] = []
    dk, dv, dk_var, dv_var = (torch.zeros_like(k) for _ in range(4))
    step = max(1, _MOST_SCORES // (q.shape[0] * k.shape[1]))
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    for q1, g1 in zip(q.split(step, 1), g.split(step, 1), strict=True):
        scores = q1 @ keys * scale
        weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()
        # The square of a weight's relative error: its rounding, that of its score and that of the exponential.
        relative = rounding + single * ((q1.abs() @ keys.abs() * scale + scores.abs()) ** 2 + 4)
        out = weights @ v
        noisy = weights.square() * relative
        out_var = rounding * out.square() + noisy @ v.square()
        dv += weights.transpose(1, 2) @ g1
        dv_var += noisy.transpose(1, 2) @ g1.square()
        dp = g1 @ values
        row_var = (g1.square() * out_var).sum(-1, keepdim=True)
        ds = weights * (dp - (g1 * out).sum(-1, keepdim=True)) * scale
        product = single * (g1.abs() @ values.abs()).square()
        ds_var = ds.square() * (rounding + relative) + (weights * scale).square() * product
        dq = ds @ k
        dk += ds.transpose(1, 2) @ q1
        dq_var = rounding * dq.square() + ds_var @ k.square() + row_var * (weights @ k * scale).square()
        dk_var += ds_var.transpose(1, 2) @ q1.square()
        dk_var += (weights * scale).square().transpose(1, 2) @ (row_var * q1.square())
        for parts, part in ((outs, out), (out_vars, out_var), (dqs, dq), (dq_vars, dq_var)):
            parts.append(part)
    yield "out", torch.cat(outs, 1), torch.cat(out_vars, 1)
    yield "dq", torch.cat(dqs, 1), torch.cat(dq_vars, 1)
    yield "dk", dk, dk_var + rounding * dk.square()
    yield "dv", dv, dv_var + rounding * dv.square()


def exact_attention(inputs: list[Tensor], q_offsets: tuple[int, ...], k_offsets: tuple[int, ...]) -> Exact:
    """Results of packed attention and its gradients; rows after the last offset are padding.

    Args:
        inputs: queries, keys, values and the gradient of the result, [tokens, H, E], in the tested precision.
        q_offsets, k_offsets: see ``wan_model.dit.attention``.
    """
    q_SHE, k_KHE, v_KHE, grad_SHE = inputs
    unit = torch.finfo(q_SHE.dtype).eps / 2
    like = {"out": q_SHE, "dq": q_SHE, "dk": k_KHE, "dv": v_KHE}
    found = Exact(*({name: torch.zeros_like(x, dtype=torch.float64) for name, x in like.items()} for _ in range(2)))
    for (a, b), (c, d) in zip(itertools.pairwise(q_offsets), itertools.pairwise(k_offsets), strict=True):
        q, k, v, g = (
            x[start:end].double().transpose(0, 1)
            for x, start, end in ((q_SHE, a, b), (k_KHE, c, d), (v_KHE, c, d), (grad_SHE, a, b))
        )
        for name, value, variance in _segment(q, k, v, g, unit):
            rows = slice(a, b) if name in ("out", "dq") else slice(c, d)
            found.values[name][rows] = value.transpose(0, 1)
            found.deviations[name][rows] = variance.sqrt().transpose(0, 1)
    return found


def excess(got: Tensor, value: Tensor, deviation: Tensor) -> tuple[float, float]:
    """Norm of the error over that of its deviation: of the whole tensor, and of the worst row of a head.

    Not a number counts as infinite.
    """
    error = got.double() - value
    whole = error.norm() / deviation.norm().clamp_min(1e-300)
    # A row whose deviation is far below the others' is judged beside a thousandth of a typical one.
    typical = deviation.square().mean().sqrt() * deviation.shape[-1] ** 0.5
    rows = error.norm(dim=-1) / deviation.norm(dim=-1).clamp_min(1e-3 * float(typical) + 1e-300)
    both = torch.stack((whole, rows.max())).nan_to_num(nan=float("inf"))
    whole_excess, row_excess = both.tolist()
    return whole_excess, row_excess


def compare_with_exact(
    results: dict[str, Tensor], exact: Exact, whole_limit: float, row_limit: float
) -> dict[str, Value]:
    """The excess of each result over rounding.

    Args:
        results: by names of ``RESULTS``.
        exact: of ``exact_attention``.
        whole_limit, row_limit: the most that is allowed of each number of ``excess``.

    Raises:
        Failed: a result is further off.
    """
    numbers: dict[str, Value] = {}
    wrong = []
    for name, got in results.items():
        value = exact.values[name]
        whole, row = excess(got, value, exact.deviations[name])
        size = float(value.norm())
        relative = float((got.double() - value).norm()) / size if size else 0.0
        numbers |= {
            f"{name} off by": float(f"{relative:.2g}"),
            f"{name} / rounding": float(f"{whole:.2g}"),
            f"{name} worst row": float(f"{row:.2g}"),
        }
        if not (whole <= whole_limit and row <= row_limit):
            wrong.append(f"{name} is off by {whole:.3g} times rounding, its worst row by {row:.3g}")
    if wrong:
        raise Failed(f"{'; '.join(wrong)}; allowed are {whole_limit:g} and {row_limit:g}", numbers)
    return numbers
