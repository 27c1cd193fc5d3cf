"""Bandwidth of each fused kernel beside a copy and beside torch's operations one by one."""

import functools
import math
from collections.abc import Callable, Iterator

import torch

from gpu.context import Context
from gpu.fused_operations import OPERATIONS, Function, Operation, draw, kernels_used
from gpu.rows import Found, Row, Value
from gpu.timing import profiled_kernels, seconds_of
from wan_model import PackLayout, TokenRows

# A tensor of the video is twice as large as an H100's second-level cache.
_VIDEO = PackLayout(((21, 30, 52),))
_IMAGES = PackLayout(((1, 30, 52),) * 27)
_WIDTH = 1536


def _copy_rate(context: Context, bytes_moved: int) -> float:
    """Bytes a second of a copy that moves about as many."""
    source = torch.zeros(max(1, bytes_moved // 2), dtype=torch.uint8, device=context.device)
    source.random_(generator=torch.Generator(context.device).manual_seed(0))
    target = torch.empty_like(source)
    return 2 * source.numel() / _time(functools.partial(target.copy_, source), context)


def _time(call: Callable[[], object], context: Context) -> float:
    """Seconds of a call on the device, without the gaps between its kernels."""
    repeats = 10 if context.on_gpu else 1

    def several() -> None:
        for _ in range(repeats):
            call()

    several()
    return sum(kernel.microseconds for kernel in profiled_kernels(several, context.device)) / 1e6 / repeats


def _alone(call: Callable[[], object], context: Context) -> float:
    """Seconds of a call in a row of such calls: the longer of the device's time and that of its launch."""
    repeats = 20 if context.on_gpu else 1
    seconds_of(call, context.device, repeats)
    return seconds_of(call, context.device, repeats)


def bytes_of(operation: Operation, rows: int, width: int, head: int) -> tuple[int, int]:
    """The least that a forward and a backward pass in bf16 move: every tensor of rows is read or written once.

    Args:
        operation: with ``x`` for each tensor of rows that it reads.
        rows, width, head: of such a tensor, and of the table of angles.

    Returns:
        Bytes of the forward pass (inputs and result), and of the backward pass: the gradient of the result, the inputs
        that it needs, and their gradients.
    """
    tensors, one = operation.inputs.count("x"), rows * width * 2
    table = rows * head * 4 if "rotation" in operation.name else 0
    # Of the addition with a gate, one input is only added: it is not read again, and its gradient is the result's.
    needed = max(1, tensors - 1)
    return (tensors + 1) * one + table, (1 + 2 * needed) * one + table


def measure(operation: Operation, layout: PackLayout, width: int, head: int, context: Context) -> Found:
    """A row of an operation."""
    rows = TokenRows.whole(layout)
    *inputs, grad = draw(operation, rows, width, torch.bfloat16, context.device)
    leaves = [x.requires_grad_() for x in inputs]

    def calls(function: Function) -> tuple[Callable[[], object], Callable[[], object]]:
        out = function(*leaves)
        return functools.partial(function, *leaves), functools.partial(
            torch.autograd.grad, out, leaves, grad, retain_graph=True
        )

    call = operation.call(rows, head)
    with kernels_used(context.on_gpu):
        fused = [(_time(one, context), _alone(one, context)) for one in calls(call)]
    with kernels_used(False):
        eager = [_time(one, context) for one in calls(call)]
    numbers: dict[str, Value] = {}
    for name, (own, alone), plain, moved in zip(
        ("forward", "backward"), fused, eager, bytes_of(operation, layout.total, width, head), strict=True
    ):
        rate = moved / own
        numbers |= {
            f"{name} us": float(f"{own * 1e6:.4g}"),
            f"{name} GB/s": float(f"{rate / 1e9:.4g}"),
            f"{name} / copy": round(rate / _copy_rate(context, moved), 3),
            f"{name} eager / fused": round(plain / own, 2),
            f"{name} us with launch": float(f"{alone * 1e6:.4g}"),
        }
    assert all(not isinstance(value, float) or math.isfinite(value) for value in numbers.values())
    what = "fused and eager" if context.on_gpu else "the same operations twice, because kernels need a GPU"
    return Found(f"the device's time in kernels, {what}", numbers)


def rows(context: Context) -> Iterator[Row]:
    """Each operation on a video and on a pack of images, with the width of the 1.3B model."""
    width, head = (_WIDTH, 128) if context.on_gpu else (48, 24)
    packs = {"32,760 tokens": _VIDEO, "27 images": _IMAGES} if context.on_gpu else {"a pack": PackLayout(((1, 3, 5),))}
    for name, layout in packs.items():
        for operation in OPERATIONS:
            check = functools.partial(measure, operation, layout, width, head, context)
            yield from context.row(f"{operation.name}, {name}", check)
