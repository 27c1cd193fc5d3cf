"""A training step of the whole 1.3B model at 32,760 tokens: attention x recomputation, and beside diffusers."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from bench.model_cpu import training
from bench.models import Samples, diffusers_model_of
from gpu.context import AT_ONCE, Context
from gpu.fused_operations import kernels_used
from gpu.models import TINY, call, random_model, use
from gpu.rows import Failed, Found, Row, Value
from gpu.timing import Timed, seconds_of, time_alternately
from wan_model import WAN_1_3B, PackLayout, WanConfig, WanDiT, pack_flops
from wan_model.dit.attention import AttentionKind
from wan_model.dit.recompute import Recompute
from wan_model.pack import Grid
from wan_model.system.gpus import peak_tflops

# 81 frames of 480 x 832, and as many images as a pack of 43,008 tokens holds.
VIDEO: Grid = (21, 30, 52)
IMAGES: list[Grid] = [(1, 30, 52)] * 27
KINDS: tuple[AttentionKind, ...] = ("auto", "cudnn", "flash", "varlen")


def config_of(context: Context) -> WanConfig:
    """The sizes of the stage's model."""
    return WAN_1_3B if context.on_gpu else TINY


def peak_of(context: Context) -> float | None:
    """Dense bf16 TFLOP/s of the card, by its full name; None if it is not known."""
    return peak_tflops(torch.cuda.get_device_name()) if context.on_gpu else None


def rates(seconds: float, flops: int, tokens: int, peak: float | None) -> dict[str, Value]:
    """Tokens and operations a second; operations are those that are required, without recomputation."""
    tflops = flops / seconds / 1e12
    found: dict[str, Value] = {"tokens/s": round(tokens / seconds), "TFLOP/s": float(f"{tflops:.4g}")}
    return {**found, "MFU %": round(100 * tflops / peak, 2)} if peak else found


def peak_rates(context: Context) -> Found:
    """What the card reaches at best: a large matrix product and a large copy."""
    side, size = (8192, 1 << 29) if context.on_gpu else (256, 1 << 20)
    generator = torch.Generator(context.device).manual_seed(0)
    a, b = (
        torch.empty(side, side, device=context.device, dtype=torch.bfloat16).normal_(generator=generator)
        for _ in range(2)
    )
    source = torch.empty(size, device=context.device, dtype=torch.uint8).random_(generator=generator)
    target = torch.empty_like(source)
    repeats = 10 if context.on_gpu else 1
    product, copy = functools.partial(torch.matmul, a, b), functools.partial(target.copy_, source)
    times: list[float] = []
    for work in (product, copy):
        seconds_of(work, context.device, repeats)
        times.append(min(seconds_of(work, context.device, repeats) for _ in range(2)))
    numbers: dict[str, Value] = {
        "matrix product TFLOP/s": float(f"{2 * side**3 / times[0] / 1e12:.4g}"),
        "copy GB/s, read and written": float(f"{2 * size / times[1] / 1e9:.4g}"),
    }
    return Found(f"products of {side:,} x {side:,} in bf16, copies of {size / 1e6:,.0f} MB", numbers)


class _Models:
    """Our model and diffusers' with the same weights, made when they are first used."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._diffusers: dict[bool, torch.nn.Module] = {}

    @functools.cached_property
    def ours(self) -> WanDiT:
        return random_model(config_of(self.context), self.context.device, torch.bfloat16)

    def theirs(self, *, checkpointing: bool) -> torch.nn.Module:
        self.context.leave_out_if_quick()
        if checkpointing not in self._diffusers:
            model = diffusers_model_of(self.ours, torch.device(self.context.device))
            if checkpointing:
                model.enable_gradient_checkpointing()
            self._diffusers[checkpointing] = model
        return self._diffusers[checkpointing]


class _Steps:
    """Training steps of one pack, ours and diffusers'."""

    def __init__(self, models: _Models, grids: list[Grid]) -> None:
        self.models, self.context, self.config = models, models.context, config_of(models.context)
        self.grids, self.layout = grids, PackLayout(tuple(grids))
        self.flops = pack_flops(self.config, self.layout).training

    @functools.cached_property
    def samples(self) -> Samples:
        return Samples.draw(self.config, self.grids, torch.device(self.context.device), torch.bfloat16)

    @functools.cached_property
    def tokens(self) -> Tensor:
        return self.samples.tokens

    @functools.cached_property
    def batch(self) -> Tensor:
        return self.samples.padded()

    def ours(self, kind: AttentionKind, mode: Recompute, *, kernels: bool | None = None) -> Callable[[], object]:
        """A step; ``kernels`` forces or forbids the fused kernels."""

        def run() -> None:
            if kind not in ("auto", "sdpa"):
                self.context.need_gpu()
            model = self.models.ours
            use(model, kind, mode)
            with contextlib.nullcontext() if kernels is None else kernels_used(kernels):
                training(lambda: call(model, self.samples, self.tokens), model)()

        return run

    def theirs(self, *, checkpointing: bool) -> Callable[[], object]:
        """A step of diffusers' model with the same weights, with or without its checkpointing."""

        def run() -> None:
            model = self.models.theirs(checkpointing=checkpointing)
            self.models.ours.zero_grad()
            inputs = (self.batch, self.samples.timesteps, self.samples.texts)
            training(lambda: model(*inputs, return_dict=False)[0], model)()
            model.zero_grad()

        return run

    def rows(
        self, name: str, calls: Mapping[str, Callable[[], object]], bases: tuple[str, ...], leave: float = 0.0
    ) -> Iterator[Row]:
        """A row for each call, all timed against each other.

        Args:
            name: of the group.
            calls: by name.
            bases: the calls that the others' times are divided by.
            leave: share of the time that is left to the groups behind.
        """
        context, timed = self.context, dict[str, Timed]()
        with context.group(f"timing of {name}") as fresh:
            if fresh:
                timed = time_alternately(
                    calls, dataclasses.replace(context, ends_at=context.ends_at - leave * context.seconds_left)
                )
        peak = peak_of(context)
        for label in calls:
            yield from context.row(
                f"{name}: {label}", functools.partial(self._found, timed, label, bases, peak), seconds=AT_ONCE
            )

    def _found(self, timed: dict[str, Timed], label: str, bases: tuple[str, ...], peak: float | None) -> Found:
        if label not in timed:
            raise Failed("an earlier process of this stage was ended while this was timed")
        it = timed[label]
        numbers = {**it.figures(), **rates(it.median, self.flops, self.layout.valid, peak)}
        for base in bases:
            if base != label and base in timed and timed[base].seconds and timed[base].problem is None:
                numbers[f"time / {base}"] = round(it.median / timed[base].median, 3)
        return Found("forward and backward, median of the rounds", numbers)


def rows(context: Context) -> Iterator[Row]:
    """Ceilings, one video, images in one pack, and without recomputation, which needs the most memory."""
    yield from context.row("peak rates", functools.partial(peak_rates, context))
    models = _Models(context)
    best, base = "auto, all_but_attention", "diffusers with checkpointing"
    eager = f"{best}, without fused kernels"

    video = _Steps(models, [VIDEO] if context.on_gpu else [(2, 4, 6)])
    modes: tuple[Recompute, ...] = ("all_but_attention", "elementwise", "block")
    # What matters most comes first, because the time may be used up.
    calls = {best: video.ours("auto", modes[0]), base: video.theirs(checkpointing=True)}
    calls |= {f"auto, {mode}": video.ours("auto", mode) for mode in modes[1:]}
    calls |= {eager: video.ours("auto", modes[0], kernels=False)}
    # Of one video, "auto" is "sdpa", which is cuDNN's where there is one.
    calls |= {f"{kind}, {modes[0]}": video.ours(kind, modes[0]) for kind in KINDS[2:]}
    yield from video.rows("one video", calls, (best, base), leave=0.4)

    images = _Steps(models, IMAGES if context.on_gpu else [(1, 3, 5)] * 3)
    calls = {
        best: images.ours("auto", modes[0]),
        base: images.theirs(checkpointing=True),
        f"varlen, {modes[0]}": images.ours("varlen", modes[0]),
        eager: images.ours("auto", modes[0], kernels=False),
    }
    yield from images.rows(f"{len(images.grids)} images", calls, (best, base), leave=0.4)

    calls = {"auto, none": video.ours("auto", "none"), "diffusers": video.theirs(checkpointing=False)}
    yield from video.rows("one video, nothing recomputed", calls, ("diffusers",))
