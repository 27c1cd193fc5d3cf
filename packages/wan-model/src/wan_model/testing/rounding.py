"""How far floating-point rounding can move a result, from the magnitudes of the terms that its operations sum.

The model of rounding. An operation on float64 stands for the same operation in a lower precision of unit roundoff u
(2^-24 for float32). Its result gets an error of u * t * xi, where xi has mean 0 and deviation 1 and t is the magnitude
of the terms:

- an elementwise operation rounds its result once: t = |result|;
- a sum of n terms x_i rounds every partial sum. In sequential order the partial sums of terms of mean m and deviation s
  have the squares k² m² + k s², whose sum over k is n/3 (n m)² + n² s² / 2. Hence t² = n/3 |sum x_i|² + (sum |x_i|)².
  Matrix products and convolutions are such sums. Kernels that sum in blocks or lanes are more exact.
- operations that subtract inside (softmax and its gradient, layer norm and its gradient, GELU) have the magnitudes of
  the values that they subtract; see ``_MAGNITUDES``.

xi is computed from the bits of the result, so that equal values get equal errors, as in real rounding: errors of a row
that is repeated (zero-padded text) add up, they do not average out.

Real rounding is uniform in [-u, u] times the result, of deviation u / sqrt(3). Two runs of independent errors therefore
differ by at most sqrt(2/3) = 0.8 times the deviation of this model. ``FACTOR`` leaves ten times that: a result that
depends on one rounding error alone has the deviation of few samples as its scale, which ``SAMPLES`` of them
underestimate by four in one of 6,000 cases, and the error itself is then beyond the bound in one of 10,000.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from wan_model.testing.cached_scales import cached

FACTOR = 8.0
SAMPLES = 8

Results = Mapping[str, Tensor]


def rounding_scale(
    run: Callable[[], Results], dtype: torch.dtype = torch.float32, samples: int = SAMPLES, name: str | None = None
) -> dict[str, Tensor]:
    """The deviation that rounding gives each element of each result.

    Args:
        run: computes named results in float64, equal at every call. It creates the generators of its random numbers.
            Operations on other types than float64 are assumed to be equal in all runs.
        dtype: the precision whose rounding is modelled.
        samples: number of runs with noise.
        name: of this scale among those that are cached, see ``wan_model.testing.cached_scales``; by default the running
            test and how many it has computed before.

    Returns:
        For every name a float64 tensor of the result's shape.

    Raises:
        ValueError: a result is not in float64.
    """
    with _StepwiseAttention():
        exact = _copied(run())
        if wrong := [f"{name} in {value.dtype}" for name, value in exact.items() if value.dtype != torch.float64]:
            raise ValueError(f"got {', '.join(wrong)}; expected float64 everywhere: pass model.double() and its inputs")
        return cached(name, exact, lambda: _scale(run, exact, torch.finfo(dtype).eps / 2, samples))


def _scale(run: Callable[[], Results], exact: Results, unit: float, samples: int) -> dict[str, Tensor]:
    # Of float64 itself the noise would be lost in the rounding of these runs; its effect is proportional.
    noise = max(unit, 2.0**-36)
    squares = {name: torch.zeros_like(value) for name, value in exact.items()}
    for sample in range(samples):
        with _exact_timesteps(), _Rounding(noise, sample):
            results = run()
        for name, value in results.items():
            squares[name] += (value.detach() - exact[name]).square()
    return {name: (value / samples).sqrt() * (unit / noise) for name, value in squares.items()}


def _copied(results: Results) -> dict[str, Tensor]:
    # A gradient is a tensor that the next run may add to.
    return {name: value.detach().clone() for name, value in results.items()}


def assert_within(
    actual: Tensor, expected: Tensor, scale: Tensor, name: str = "result", factor: int | float = FACTOR
) -> None:
    """Assert that two results differ by no more than rounding: ||actual - expected|| <= factor * ||scale||.

    Args:
        actual, expected: of one shape, any floating-point types.
        scale: of ``rounding_scale``.
        name: for the message.
        factor: deviations that are allowed.

    Raises:
        AssertionError: with the norms, and the element whose error is largest beside its scale.
    """
    assert actual.shape == expected.shape == scale.shape, (
        f"{name} has the shapes {tuple(actual.shape)}, {tuple(expected.shape)} and, of its scale, {tuple(scale.shape)}"
    )
    error = (actual.detach().double() - expected.detach().double()).abs()
    size, bound = error.norm().item(), factor * scale.norm().item()
    # Not "size > bound": NaN must fail.
    if size <= bound:
        return
    typical = scale.square().mean().sqrt()
    worst = int((error / scale.maximum(typical).clamp_min(1e-300)).nan_to_num(nan=math.inf).flatten().argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    at_worst = factor * max(scale.flatten()[worst].item(), typical.item())
    raise AssertionError(
        f"{name} differs by {size:.2e} in norm, which rounding bounds by {bound:.2e}; worst at {list(place)}: "
        f"{actual.flatten()[worst].item():.9g} against {expected.flatten()[worst].item():.9g}, "
        f"error {error.flatten()[worst].item():.2e}, bound {at_worst:.2e}"
    )


def assert_all_within(actual: Results, expected: Results, scale: Results, factor: int | float = FACTOR) -> None:
    """``assert_within`` for each name; the names must be equal in all three."""
    assert actual.keys() == expected.keys() == scale.keys(), (
        f"results differ in {sorted((actual.keys() ^ expected.keys()) | (expected.keys() ^ scale.keys()))}"
    )
    for name, value in actual.items():
        assert_within(value, expected[name], scale[name], name, factor)


def assert_rounds_to(actual: Results, exact: Callable[[], Results], factor: int | float = FACTOR) -> None:
    """Assert that results equal those of a function in float64 up to rounding.

    Args:
        actual: results in one precision.
        exact: computes the same results in float64; see ``rounding_scale``.
        factor: deviations that are allowed.
    """
    dtypes = {value.dtype for value in actual.values()}
    assert len(dtypes) == 1, f"results of one precision were expected; got {sorted(map(str, dtypes))}"
    assert_all_within(actual, exact(), rounding_scale(exact, dtypes.pop()), factor)


# -- noise of the size of rounding ------------------------------------------------------------------------------------


_NOISY = (torch.float64, torch.complex128)


class _Rounding(TorchDispatchMode):
    """Adds the error of the module's docstring to every result in double precision."""

    def __init__(self, unit: float, sample: int) -> None:
        super().__init__()
        self.unit = unit
        # Odd, with bits set in all positions.
        self.multiplier = int.from_bytes(hashlib.sha256(str(sample).encode()).digest()[:8], signed=True) | 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, which takes seconds and is not needed here.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        magnitudes = _magnitudes(func)
        if magnitudes is None:
            return out
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not any(x.dtype in _NOISY for x in outputs):
            return out
        for x, size in zip(outputs, magnitudes(outputs, *args), strict=True):
            if x.dtype not in _NOISY or size is None:
                continue
            if x.is_complex():
                x, size = torch.view_as_real(x), size.unsqueeze(-1)
            # A multiplicative hash of the bits; as a signed integer it is uniform in [-2^63, 2^63).
            hashed = x.view(torch.int64).mul(self.multiplier).double()
            x.add_(hashed.mul_(size), alpha=self.unit * math.sqrt(3) / 2**63)
        return out


@functools.cache
def _magnitudes(operator: Any) -> Callable[..., Any] | None:
    """The function that computes the magnitudes t of an operator's results; None if nothing is rounded."""
    name = operator._schema.name
    if operator.is_view or name in _EXACT:
        return None
    return _MAGNITUDES.get(name, lambda outputs, *_, **__: map(abs, outputs))


def _sum(terms: Tensor, result: Tensor, count: int | float) -> Tensor:
    """Magnitude of a sum of ``count`` terms whose magnitudes add up to ``terms``."""
    return torch.hypot(terms, result * math.sqrt(count / 3))


def _product(outputs: list[Tensor], a: Tensor, b: Tensor) -> Iterator[Tensor]:
    yield _sum(a.abs() @ b.abs(), outputs[0], a.shape[-1])


def _affine(outputs: list[Tensor], bias: Tensor, a: Tensor, b: Tensor) -> Iterator[Tensor]:
    yield _sum(a.abs() @ b.abs() + bias.abs(), outputs[0], a.shape[-1])


def _total(outputs: list[Tensor], x: Tensor, *options: Any) -> Iterator[Tensor]:
    out = outputs[0]
    dims = options[0] if options else None
    count = x.numel() / max(1, out.numel())
    terms = x.abs().sum(dims, options[1] if len(options) > 1 else False) if dims else x.abs().sum()
    yield _sum(terms.view_as(out), out, count)


def _average(outputs: list[Tensor], x: Tensor, *options: Any) -> Iterator[Tensor]:
    count = x.numel() / max(1, outputs[0].numel())
    (total,) = _total([outputs[0] * count], x, *options)
    yield total / count


def _convolution(
    outputs: list[Tensor], x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
) -> Iterator[Tensor]:
    terms = torch.ops.aten.convolution(x.abs(), weight.abs(), None if bias is None else bias.abs(), *options)
    yield _sum(terms, outputs[0], weight[0].numel())


def _convolution_backward(outputs: list[Tensor], grad: Tensor, x: Tensor, weight: Tensor, *options: Any) -> Any:
    terms = torch.ops.aten.convolution_backward(grad.abs(), x.abs(), weight.abs(), *options)
    counts = (weight[:, 0].numel(), grad.numel() / grad.shape[1], grad.numel() / grad.shape[1])
    given = [(size, count) for size, count in zip(terms, counts, strict=True) if size is not None]
    for (size, count), out in zip(given, outputs, strict=True):
        yield _sum(size, out, count)


def _softmax(outputs: list[Tensor], x: Tensor, dim: int, *_: Any) -> Iterator[Tensor]:
    # The exponent x - max(x) is rounded, and its error is relative to itself.
    yield outputs[0] * (1 + (x - x.amax(dim, keepdim=True)).abs().nan_to_num(posinf=0))


def _softmax_backward(outputs: list[Tensor], grad: Tensor, out: Tensor, dim: int, *_: Any) -> Iterator[Tensor]:
    yield out * (grad.abs() + (grad * out).abs().sum(dim, keepdim=True))


def _layer_norm(
    outputs: list[Tensor], x: Tensor, shape: Any, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Iterator[Tensor | None]:
    _, mean, scale = outputs
    centred = (x.abs() + mean.abs()) * scale
    yield centred * (1 if weight is None else weight.abs()) + (0 if bias is None else bias.abs())
    # The statistics, from which the backward pass computes the normalised rows again: see there.
    yield None
    yield None


def _logsumexp(outputs: list[Tensor], x: Tensor, dim: Any, *_: Any) -> Iterator[Tensor]:
    # The largest exponent plus the logarithm of a sum of at least 1.
    yield outputs[0].abs() + x.amax(dim, keepdim=True).abs().view_as(outputs[0]) + 1


def _layer_norm_backward(
    outputs: list[Tensor],
    grad: Tensor,
    x: Tensor,
    shape: Any,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: list[bool],
) -> Any:
    grad, centred = grad.abs(), (x.abs() + mean.abs()) * scale
    weighted = grad if weight is None else grad * weight.abs()
    average = weighted.mean(-1, keepdim=True) + centred * (weighted * centred).mean(-1, keepdim=True)
    over_rows = list(range(x.ndim - len(shape)))
    terms = (scale * (weighted + average), (grad * centred).sum(over_rows), grad.sum(over_rows))
    given = [term for term, wanted in zip(terms, mask, strict=True) if wanted]
    rows = x.numel() / x.shape[-1]
    for term, out in zip(given, outputs, strict=True):
        yield term if out.shape == x.shape else _sum(term, out, rows)


_MAGNITUDES: dict[str, Callable[..., Any]] = {
    "aten::mm": _product,
    "aten::bmm": _product,
    "aten::addmm": _affine,
    "aten::baddbmm": _affine,
    "aten::sum": _total,
    "aten::mean": _average,
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::_softmax": _softmax,
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::logsumexp": _logsumexp,
    "aten::native_layer_norm": _layer_norm,
    "aten::native_layer_norm_backward": _layer_norm_backward,
    # 0.5 x (1 + tanh) cancels for negative x; the derivatives have two terms, each at most 1.
    "aten::gelu": lambda outputs, x, *_, **__: [x.abs()],
    "aten::gelu_backward": lambda outputs, grad, *_, **__: [2 * grad.abs()],
    "aten::silu_backward": lambda outputs, grad, *_: [2 * grad.abs()],
}
# Operators that only move or compare values, or create them from the caller's numbers.
_EXACT = {
    f"aten::{name}"
    for group in (
        ("cat", "stack", "clone", "copy_", "_to_copy", "repeat", "constant_pad_nd", "lift_fresh_copy", "detach"),
        ("index", "index_select", "select_backward", "slice_backward", "embedding", "where", "masked_fill"),
        ("zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "arange", "scalar_tensor", "fill_", "zero_"),
        ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "new_zeros", "new_full"),
        ("neg", "abs", "maximum", "minimum", "clamp", "clamp_min", "amax", "max"),
        ("rand", "randn", "normal_", "uniform_"),
    )
    for name in group
}


@contextlib.contextmanager
def _exact_timesteps() -> Iterator[None]:
    """Without noise in the features of timesteps, which are computed in float64 whatever the precision of the model."""
    from wan_model.dit import model  # tests import this module before shapes are checked

    features = model.timestep_features

    def exact(*args: Any) -> Tensor:
        with _disable_current_modes():  # type: ignore[no-untyped-call,unused-ignore]
            return features(*args)

    with mock.patch.object(model, "timestep_features", exact):
        yield


# -- attention in steps -----------------------------------------------------------------------------------------------


class _StepwiseAttention(TorchFunctionMode):
    """Torch's attention as separate operations instead of a fused kernel, so that noise is added to each."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs:
            return _Attention.apply(*args)
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """The backward pass of flash attention, which takes a row's sum of P dP from the rounded output."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        log_sum = scores.logsumexp(-1, keepdim=True)
        out = (scores - log_sum).exp() @ v
        ctx.save_for_backward(q, k, v, scores, log_sum, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, scores, log_sum, out = ctx.saved_tensors
        weights = (scores - log_sum).exp()
        average = (grad * out).sum(-1, keepdim=True)
        slope = weights * (grad @ v.transpose(-1, -2) - average) * q.shape[-1] ** -0.5
        return slope @ k, slope.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad
