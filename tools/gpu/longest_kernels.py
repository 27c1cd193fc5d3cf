"""The longest kernels of a training step, by torch's profiler."""

import functools
from collections.abc import Iterator

import torch

from bench.model_cpu import training
from bench.models import Samples
from gpu.context import Context
from gpu.models import TINY, call, random_model, use
from gpu.rows import Found, Row, Value
from gpu.step import IMAGES, VIDEO
from gpu.timing import profiled_kernels, seconds_of
from wan_model import WanConfig
from wan_model.pack import Grid

_LAYERS, _LONGEST = 4, 20


def profiled(context: Context, grids: list[Grid]) -> Found:
    """The kernels of one step of some layers.

    Raises:
        NotRun: the profiler recorded nothing.
    """
    config = WanConfig(num_layers=_LAYERS) if context.on_gpu else TINY
    model = random_model(config, context.device, torch.bfloat16)
    samples = Samples.draw(config, grids, torch.device(context.device), torch.bfloat16)
    tokens = samples.tokens
    use(model, "auto", "all_but_attention")
    step = training(lambda: call(model, samples, tokens), model)
    seconds_of(step, context.device, 2)
    took = 0.0

    def timed() -> None:
        nonlocal took
        took = seconds_of(step, context.device)

    events = profiled_kernels(timed, context.device)
    total = sum(event.microseconds for event in events)
    table: list[dict[str, Value]] = [
        {
            "kernel": event.name[:100],
            "ms": round(event.microseconds / 1e3, 3),
            "share %": round(100 * event.microseconds / total, 1),
            "calls": event.calls,
        }
        for event in events[:_LONGEST]
    ]
    numbers: dict[str, Value] = {
        "step ms": round(took * 1e3, 2), "kernels ms": round(total / 1e3, 2), "layers": config.num_layers,
        "launches": sum(event.calls for event in events), "kinds": len(events),
    }  # fmt: skip
    return Found(
        f"the {len(table)} longest of a step of {config.num_layers} layers, recomputed selectively", numbers, table
    )


def rows(context: Context) -> Iterator[Row]:
    """A video, and a pack of images, which has more launches for as many tokens."""
    packs = {"one video": [VIDEO], "27 images": IMAGES} if context.on_gpu else {"one video": [(2, 4, 6)]}
    for name, grids in packs.items():
        yield from context.row(name, functools.partial(profiled, context, grids), seconds=4)
