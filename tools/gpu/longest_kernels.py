"""The longest kernels of a training step, by torch's profiler."""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from bench.model_cpu import training
from bench.models import Samples
from gpu.clock import seconds_of
from gpu.context import Context
from gpu.models import TINY, call, random_model, use
from gpu.rows import Found, NotRun, Row, Value
from gpu.step import IMAGES, VIDEO
from wan_model import WanConfig
from wan_model.pack import Grid

_LAYERS, _LONGEST = 4, 20


def profiled(context: Context, grids: list[Grid]) -> Found:
    """The kernels of one step of some layers.

    Raises:
        NotRun: the profiler recorded nothing.
    """
    from torch.profiler import ProfilerActivity, profile

    config = WanConfig(num_layers=_LAYERS) if context.on_gpu else TINY
    model = random_model(config, context.device, torch.bfloat16)
    samples = Samples.draw(config, grids, torch.device(context.device), torch.bfloat16)
    tokens = samples.tokens
    use(model, "auto", "all_but_attention")
    step = training(lambda: call(model, samples, tokens), model)
    seconds_of(step, context.device, 2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.on_gpu else [])]
    with profile(activities=activities) as record:
        took = seconds_of(step, context.device)
    field = "self_device_time_total" if context.on_gpu else "self_cpu_time_total"
    events: list[tuple[float, Any]] = [(float(getattr(event, field, 0.0)), event) for event in record.key_averages()]
    if context.on_gpu:
        # An operator's own time on the device is that of its kernels, which have events of their own.
        events = [(time, event) for time, event in events if "CUDA" in str(getattr(event, "device_type", "CUDA"))]
    events = sorted(((time, event) for time, event in events if time > 0), key=lambda pair: -pair[0])
    if not events:
        raise NotRun("the profiler recorded no kernel")
    total = sum(time for time, _ in events)
    table: list[dict[str, Value]] = [
        {
            "kernel": event.key[:100],
            "ms": round(time / 1e3, 3),
            "share %": round(100 * time / total, 1),
            "calls": event.count,
        }
        for time, event in events[:_LONGEST]
    ]
    numbers: dict[str, Value] = {
        "step ms": round(took * 1e3, 2), "kernels ms": round(total / 1e3, 2), "layers": config.num_layers,
        "launches": sum(event.count for _, event in events), "kinds": len(events),
    }  # fmt: skip
    return Found(
        f"the {len(table)} longest of a step of {config.num_layers} layers, recomputed selectively", numbers, table
    )


def rows(context: Context) -> Iterator[Row]:
    """A video, and a pack of images, which has more launches for as many tokens."""
    packs = {"one video": [VIDEO], "27 images": IMAGES} if context.on_gpu else {"one video": [(2, 4, 6)]}
    for name, grids in packs.items():
        yield from context.row(name, functools.partial(profiled, context, grids), seconds=4)
