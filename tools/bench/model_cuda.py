"""The complete 1.3B model at 480p on a GPU: each attention and each recompute mode, compared with diffusers.

A variant that does not fit into memory or cannot run on this GPU gets a row with the reason; the others continue.
"""

from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from bench.measure import median, time_rounds
from bench.model_cpu import forward, training
from bench.models import Samples, ours_and_diffusers
from bench.report import Table, gigabytes
from wan_model import WAN_1_3B, PackLayout, TorchOps, WanConfig, WanDiT, pack_flops
from wan_model.dit.attention import AttentionKind
from wan_model.dit.recompute import Recompute
from wan_model.pack import Grid
from wan_model.system.gpus import peak_tflops

# 81 frames of 480 x 832: 32,760 tokens.
VIDEO: Grid = (21, 30, 52)
# Two videos and sixteen images.
MIX: list[Grid] = [(11, 30, 52), (6, 30, 52), *[(1, 30, 52)] * 4, *[(1, 16, 16)] * 12]


class Measured:
    """Median seconds and peak memory of one call, or the reason why it failed."""

    def __init__(self, call: Callable[[], object], device: torch.device, rounds: int) -> None:
        self.seconds = self.peak = 0.0
        self.failure = ""
        on_gpu = device.type == "cuda"
        finish: Callable[[], object] = (lambda: torch.cuda.synchronize(device)) if on_gpu else (lambda: None)
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            # Compilation belongs to the first calls.
            call()
            self.seconds = median(time_rounds({"it": call}, rounds, finish=finish)["it"])
            self.peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0.0
        except torch.OutOfMemoryError:
            self.failure = "out of memory"
        except (RuntimeError, ValueError, ImportError) as error:
            self.failure = " ".join(str(error).split())[:60]
        if on_gpu:
            torch.cuda.empty_cache()


def _row(labels: list[str], it: Measured, tflop: float, peak: float | None, base: Measured | None) -> list[str]:
    if it.failure:
        return [*labels, it.failure, "", "", "", ""]
    rate = tflop / it.seconds
    share = f"{100 * rate / peak:.1f} %" if peak else "peak unknown"
    to_base = f"{it.seconds / base.seconds:.3f}" if base and not base.failure else ""
    return [*labels, f"{it.seconds * 1e3:.1f} ms", f"{rate:.0f}", share, gigabytes(it.peak), to_base]


COLUMNS = ["attention", "recompute", "time", "TFLOP/s", "of peak", "peak memory", "time / diffusers"]
NOTE = "TFLOP/s count required operations (pack_flops), without recomputation. bf16; medians."


def whole_model(device: torch.device, config: WanConfig, grids: list[Grid], rounds: int, title: str) -> Iterator[Table]:
    """Forward and training tables of one pack."""
    dtype = torch.bfloat16
    ours, theirs = ours_and_diffusers(config, device, dtype)
    samples = Samples.draw(config, grids, device, dtype)
    tokens, batch = samples.tokens, samples.padded()
    flops = pack_flops(config, PackLayout(tuple(grids)))
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    kinds: list[AttentionKind] = ["auto", "cudnn", "flash", "varlen"]

    def our_call() -> Tensor:
        out: Tensor = ours(tokens, samples.timesteps, samples.texts, samples.layout)
        return out

    def their_call() -> Tensor:
        out: Tensor = theirs(batch, samples.timesteps, samples.texts, return_dict=False)[0]
        return out

    table = Table(f"{title}: forward, {samples.layout.total:,} tokens", COLUMNS, note=NOTE)
    base = Measured(forward(their_call), device, rounds)
    table.rows.append(_row(["diffusers", "-"], base, flops.forward / 1e12, peak, base))
    for kind in kinds:
        _use(ours, kind, "none")
        table.rows.append(
            _row([kind, "-"], Measured(forward(our_call), device, rounds), flops.forward / 1e12, peak, base)
        )
    yield table

    table = Table(f"{title}: training step (forward and backward), {samples.layout.total:,} tokens", COLUMNS, note=NOTE)
    bases = {"none": Measured(training(their_call, ours, theirs), device, rounds)}
    theirs.enable_gradient_checkpointing()
    bases["block"] = Measured(training(their_call, ours, theirs), device, rounds)
    for mode, base in bases.items():
        table.rows.append(_row(["diffusers", mode], base, flops.training / 1e12, peak, base))
    _free(theirs)
    for kind in kinds:
        for mode in get_args(Recompute):
            _use(ours, kind, mode)
            it = Measured(training(our_call, ours), device, rounds)
            # If diffusers without recomputation does not fit, its run with recomputation is the reference.
            base = bases["none"] if mode != "block" and not bases["none"].failure else bases["block"]
            table.rows.append(_row([kind, mode], it, flops.training / 1e12, peak, base))
    yield table


def _use(model: WanDiT, kind: AttentionKind, mode: Recompute) -> None:
    assert isinstance(model.ops, TorchOps), "the model was built with torch's ops"
    model.ops.kind, model.recompute = kind, mode
    model.zero_grad()


def _free(model: Any) -> None:
    model.zero_grad()
    model.to("meta")


def tables(device: torch.device, *, quick: bool, config: WanConfig = WAN_1_3B, video: Grid = VIDEO) -> Iterator[Table]:
    """Yield each table when it is measured."""
    rounds = 2 if quick else 5
    yield from whole_model(device, config, [video], rounds, "1.3B, one video")
    if not quick:
        yield from whole_model(device, config, MIX, rounds, f"1.3B, a pack of {len(MIX)} (diffusers: a padded batch)")
