"""The transformer at two layers: its precision, recomputation, how often attention runs, and equal bits."""

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.models import Samples
from gpu.context import Context
from gpu.fused_operations import kernels_used
from gpu.models import TINY, TWO_LAYERS, call, random_model, use
from gpu.rows import Failed, Found, NotRun, Row, Value
from wan_model import WanDiT
from wan_model.dit.attention import AttentionKind, equal_segments, resolve_kind
from wan_model.dit.recompute import Recompute
from wan_model.kernels import available
from wan_model.pack import Grid

# On its way through a block a value is rounded some 15 times to 16 bits, each time with a deviation of at most
# 2^-8 / sqrt(3) of itself, independent of the others; as much again on the way back.
_ROUNDINGS_A_BLOCK = 15
_GRIDS: list[Grid] = [(3, 16, 26), (1, 30, 52), (1, 9, 7)]
_TINY_GRIDS: list[Grid] = [(2, 4, 6), (1, 3, 5)]


def gradients(model: WanDiT, samples: Samples) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter for a fixed gradient of the output."""
    model.zero_grad()
    out = call(model, samples, samples.tokens)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    out.backward(probe)
    return {"out": out.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def relative(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference beside the norm of what was wanted; infinite if it is not a number."""
    distance = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300)
    return float(distance.nan_to_num(nan=float("inf")))


def _exact(model: WanDiT, samples: Samples) -> dict[str, Tensor]:
    """In fp64, from the same rounded weights and inputs."""
    double = copy.deepcopy(model).double()
    use(double, "sdpa", "none")
    inputs = Samples([x.double() for x in samples.latents], samples.timesteps, samples.texts.double(), samples.layout)
    return gradients(double, inputs)


class _Model:
    """Two layers in 16 bits with their inputs and results, which are computed when a row first needs them."""

    def __init__(self, context: Context) -> None:
        self.config, self.device = TWO_LAYERS if context.on_gpu else TINY, context.device
        self.grids = _GRIDS if context.on_gpu else _TINY_GRIDS

    @functools.cached_property
    def model(self) -> WanDiT:
        return random_model(self.config, self.device, torch.bfloat16)

    @functools.cached_property
    def samples(self) -> Samples:
        return Samples.draw(self.config, self.grids, torch.device(self.device), torch.bfloat16)

    @functools.cached_property
    def exact(self) -> dict[str, Tensor]:
        return _exact(self.model, self.samples)

    @functools.cached_property
    def plain(self) -> dict[str, Tensor]:
        return self.run("auto", "none")

    def run(self, kind: AttentionKind, mode: Recompute) -> dict[str, Tensor]:
        use(self.model, kind, mode)
        return gradients(self.model, self.samples)


def _worst(results: dict[str, Tensor], others: dict[str, Tensor]) -> tuple[float, str]:
    return max((relative(value, others[name]), name) for name, value in results.items() if name != "out")


def precision(it: _Model, kind: AttentionKind) -> Found:
    """16 bits with one attention against fp64.

    Raises:
        Failed: the output or the gradients are further off than rounding explains.
    """
    got = it.plain if kind == "auto" else it.run(kind, "none")
    limit = 2**-8 / 3**0.5 * (_ROUNDINGS_A_BLOCK * it.config.num_layers) ** 0.5
    # Of all gradients together: those that nearly cancel, such as of the bias of keys, are mostly rounding.
    squares = {name: (value.double() - it.exact[name]).square().sum() for name, value in got.items() if name != "out"}
    sizes = {name: it.exact[name].square().sum() for name in squares}
    total = float((sum(squares.values()) / sum(sizes.values())) ** 0.5)
    worst, name = _worst(got, it.exact)
    numbers: dict[str, Value] = {
        "out off by": relative(got["out"], it.exact["out"]), "gradients off by": total,
        "worst gradient off by": worst, "worst gradient": name, "limit": limit,
    }  # fmt: skip
    if not (relative(got["out"], it.exact["out"]) <= limit and total <= 2 * limit):
        raise Failed("further from fp64 than rounding explains", numbers)
    return Found("equal to fp64 within rounding to 16 bits", numbers)


def fused_and_eager(it: _Model) -> Found:
    """The fused kernels may not be less precise than torch's operations one by one.

    Raises:
        Failed: they are.
    """
    with kernels_used(False):
        eager = it.run("auto", "none")
    ratios: dict[str, float] = {}
    for name, value in it.plain.items():
        base, own = relative(eager[name], it.exact[name]), relative(value, it.exact[name])
        # Differences of a gradient that is rounded once differ by chance.
        ratios[name] = own / max(base, 2.0**-9)
    name = max(ratios, key=lambda key: ratios[key])
    numbers: dict[str, Value] = {"out, error / eager's": ratios["out"], "worst": ratios[name], "of": name}
    if not ratios[name] <= 2:
        raise Failed(f"the error of {name} is {ratios[name]:.3g} times that of torch's operations", numbers)
    return Found("no less precise than torch's operations one by one", numbers)


def recompute_equal(it: _Model, kind: AttentionKind, mode: Recompute) -> Found:
    """Recomputation gives the results of none; where attention's own gradients differ from run to run, as near.

    Raises:
        Failed: it differs by more.
    """
    first, second, again = it.run(kind, "none"), it.run(kind, "none"), it.run(kind, mode)
    (noise, _), (off, name) = _worst(second, first), _worst(again, first)
    numbers: dict[str, Value] = {
        "out equal": torch.equal(again["out"], first["out"]), "gradients off by": off, "two runs of none off by": noise,
    }  # fmt: skip
    # Two runs on a GPU may be equal by chance.
    allowed = max(8 * noise, 2**-9 if it.device == "cuda" else 0.0)
    if not (numbers["out equal"] and off <= allowed):
        raise Failed(f"another result than without recomputation, most in {name}", numbers)
    return Found("equal to the bit" if off == 0 else "as near as two runs without recomputation are", numbers)


class _Calls(TorchDispatchMode):
    """Counts calls of attention's operators, forward only."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1]
        if "attn" in name or "attention" in name:
            self.seen["backward" if "backward" in name else "forward"] += 1
        return func(*args, **(kwargs or {}))


def attention_calls(it: _Model, kind: AttentionKind, mode: Recompute) -> Found:
    """How often attention runs in a training step.

    Raises:
        Failed: other than the mode says.
    """
    use(it.model, kind, mode)
    with _Calls() as calls:
        call(it.model, it.samples, it.samples.tokens).sum().backward()
    queries = torch.empty(it.samples.layout.total, 1, 1, device=it.device, dtype=torch.bfloat16)
    offsets = it.samples.layout.offsets
    resolved = resolve_kind(kind, queries, offsets, offsets)
    once = it.config.num_layers * (1 if resolved == "varlen" else len(equal_segments(offsets, offsets)))
    # Self-attention and cross-attention of each layer.
    wanted = {"none": 2 * once, "elementwise": 2 * once, "all_but_attention": 3 * once, "block": 4 * once}[mode]
    numbers: dict[str, Value] = {
        "attention": resolved, "forward": calls.seen["forward"], "expected": wanted, "backward": calls.seen["backward"],
    }  # fmt: skip
    if calls.seen["forward"] != wanted:
        raise Failed("attention runs more or less often than this recomputation says", numbers)
    return Found("attention runs as often as this recomputation says", numbers)


def _twice(it: _Model, kind: AttentionKind) -> Found:
    first, second = it.run(kind, "none"), it.run(kind, "none")
    equal = all(torch.equal(first[name], second[name]) for name in first)
    off, name = _worst(second, first)
    why = "two training steps give the same bits" if equal else f"two training steps differ, most in {name}"
    return Found(why, {"equal": equal, "gradients off by": off})


def _kernels_chosen(it: _Model) -> Found:
    tokens = it.samples.tokens
    if not available.for_tensor(tokens):
        raise Failed("the model does not use its fused kernels here")
    return Found("the model uses its fused kernels here")


def _prepared_text(it: _Model) -> Found:
    use(it.model, "auto", "none")
    with torch.inference_mode():
        plain = call(it.model, it.samples, it.samples.tokens)
        prepared = it.model.prepare_text(it.samples.texts)
        again = it.model(it.samples.tokens, it.samples.timesteps, prepared, it.samples.layout)
    # Training after inference: no cache may hold tensors of inference mode.
    gradients(it.model, it.samples)
    if not torch.equal(plain, again):
        raise Failed("another output with prepared texts", {"off by": relative(again, plain)})
    return Found("prepared texts give the same bits, and training works after inference")


def rows(context: Context) -> Iterator[Row]:
    """Precision, recomputation, counts and bits, with each attention of the model."""
    it = _Model(context)
    kinds: list[AttentionKind] = ["auto", "sdpa", *(("cudnn", "flash", "varlen") if context.on_gpu else ())]

    def on_gpu(check: Any, *arguments: Any) -> Found:
        context.need_gpu()
        found: Found = check(*arguments)
        return found

    yield from context.row("fused kernels are chosen", functools.partial(on_gpu, _kernels_chosen, it))
    for kind in kinds:
        yield from context.row(f"16 bits against fp64, {kind}", functools.partial(precision, it, kind), seconds=2)
    yield from context.row("fused kernels beside torch's operations", functools.partial(on_gpu, fused_and_eager, it))
    for kind in kinds:
        for mode in get_args(Recompute):
            yield from context.row(f"calls, {kind}, {mode}", functools.partial(attention_calls, it, kind, mode))
            if mode != "none":
                check = functools.partial(recompute_equal, it, kind, mode)
                yield from context.row(f"recomputation {mode}, {kind}", check)
        yield from context.row(f"a step twice, {kind}", functools.partial(_twice, it, kind))
    yield from context.row("prepared texts", functools.partial(_prepared_text, it))
    if not context.on_gpu:
        for kind in ("cudnn", "flash", "varlen"):
            yield from context.row(f"16 bits against fp64, {kind}", functools.partial(_no_gpu, context))


def _no_gpu(context: Context) -> Found:
    context.need_gpu()
    raise NotRun("no GPU")
