"""The transformer on the CPU, compared with its bare matrix products and with diffusers."""

import dataclasses
import json
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bench.lower_bound import products_only
from bench.measure import median, ratio, run_process, time_rounds
from bench.model_lora import lora_step
from bench.models import Samples, ours_and_diffusers
from bench.report import Table, gigabytes, seconds
from wan_model import WAN_1_3B, WanConfig, WanDiT, save_transformer
from wan_model.dit.recompute import Recompute
from wan_model.pack import Grid
from wan_model.testing.memory_traffic import BLOCK, PACKS, block_step

CPU = torch.device("cpu")
# The 1.3B model's width, and a quarter of it for quick runs.
TRUE_WIDTH = WanConfig(num_layers=1)
QUICK_WIDTH = WanConfig(num_heads=3, ffn_dim=2240, num_layers=1, text_dim=512)
SMALL = {
    "tiny: width 96, 2 layers, 144 tokens": (
        WanConfig(num_heads=4, head_dim=24, ffn_dim=192, num_layers=2, text_dim=64, text_length=64, freq_dim=64),
        (3, 6, 8),
    ),
    "small: width 192, 4 layers, 240 tokens": (
        WanConfig(num_heads=4, head_dim=48, ffn_dim=768, num_layers=4, text_dim=128, text_length=64, freq_dim=128),
        (3, 8, 10),
    ),
}
MIDDLE = WanConfig(num_heads=6, head_dim=64, ffn_dim=1536, num_layers=4, text_dim=512, text_length=128)
# Videos of two lengths and three aspect ratios, and images.
MIX: list[Grid] = [
    (5, 10, 18),
    (5, 18, 10),
    (3, 14, 14),
    (1, 10, 18),
    (1, 14, 14),
    (3, 10, 18),
    (1, 18, 10),
    (5, 12, 12),
]


def forward(call: Callable[[], Tensor]) -> Callable[[], object]:
    """A forward pass without gradients."""

    def run() -> None:
        with torch.no_grad():
            call()

    return run


def training(call: Callable[[], Tensor], *models: nn.Module) -> Callable[[], object]:
    """A forward and a backward pass."""

    def run() -> None:
        for model in models:
            model.zero_grad()
        call().square().sum().backward()

    return run


def one_layer(quick: bool) -> Table:
    """One layer of the 1.3B model's width, for which the bare products are the lower bound."""
    config, grid = (QUICK_WIDTH, (1, 10, 10)) if quick else (TRUE_WIDTH, (5, 20, 20))
    processes = 1 if quick else 4
    table = Table(
        f"Width {config.hidden_size} x {config.num_heads} heads, one layer, fp32, against the bare matrix products and "
        "attention",
        ["pass", "bare", "ours", "diffusers", "ours / bare", "diffusers / bare", "ours / diffusers"],
        note="Bare: only torch's linears (with biases) and attention of the same shapes. Medians over the rounds of "
        f"{processes} processes; ratios are medians of the rounds' ratios, with the lowest and highest median of a "
        "single process in parentheses, because they vary with a process's memory placement. Targets: forward <= 1.03, "
        "training <= 1.05.",
    )
    # A new process for each run, one at a time.
    fresh = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with fresh:
        runs = list(fresh.map(_rounds_of_one_layer, [config] * processes, [grid] * processes, [quick] * processes))
    tokens = math.prod(grid)
    for name in runs[0]:
        pooled = {who: [second for run in runs for second in run[name][who]] for who in runs[0][name]}

        def cell(over: str, under: str) -> str:
            each = [ratio(run[name][over], run[name][under]) for run in runs]  # noqa: B023  called in this turn
            return f"{ratio(pooled[over], pooled[under]):.3f} ({min(each):.3f}-{max(each):.3f})"  # noqa: B023

        table.rows.append(
            [f"{name}, {tokens:,} tokens"]
            + [seconds(median(pooled[who])) for who in ("bare", "ours", "diffusers")]
            + [cell("ours", "bare"), cell("diffusers", "bare"), cell("ours", "diffusers")]
        )
    return table


def _rounds_of_one_layer(config: WanConfig, grid: Grid, quick: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds of each implementation in each round, for both passes."""
    ours, theirs = ours_and_diffusers(config, CPU, torch.float32)
    calls = implementations(ours, theirs, Samples.draw(config, [grid], CPU, torch.float32))
    passes = (("forward", 7, forward), ("training", 3, lambda call: training(call, ours, theirs)))
    return {
        name: time_rounds({who: wrap(call) for who, call in calls.items()}, 1 if quick else rounds, warm_up=not quick)
        for name, rounds, wrap in passes
    }


def implementations(ours: WanDiT, theirs: Any, samples: Samples) -> dict[str, Callable[[], Tensor]]:
    """The three implementations on one sample."""
    tokens, latent = samples.tokens, samples.latents[0][None]
    return {
        "bare": lambda: products_only(ours, tokens, samples.texts, samples.layout),
        "ours": lambda: ours(tokens, samples.timesteps, samples.texts, samples.layout),
        "diffusers": lambda: theirs(latent, samples.timesteps, samples.texts, return_dict=False)[0],
    }


def small_models(quick: bool) -> Table:
    """Small models, which are bound by call overhead; one thread."""
    table = Table(
        "Small models, fp32, one thread",
        ["model", "pass", "ours", "diffusers", "ours / diffusers"],
        note="Target: <= 0.9.",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (config, grid) in SMALL.items():
            ours, theirs = ours_and_diffusers(config, CPU, torch.float32)
            calls = implementations(ours, theirs, Samples.draw(config, [grid], CPU, torch.float32))
            for label, wrap in (("forward", forward), ("training", lambda call: training(call, ours, theirs))):  # noqa: B023  called in this turn
                candidates = {who: wrap(calls[who]) for who in ("ours", "diffusers")}
                times = time_rounds(candidates, 5 if quick else 150)
                medians = [seconds(median(times[who])) for who in ("ours", "diffusers")]
                table.rows.append([name, label, *medians, f"{ratio(times['ours'], times['diffusers']):.3f}"])
    finally:
        torch.set_num_threads(threads)
    return table


def mixed_pack(quick: bool) -> Table:
    """A pack of mixed shapes against a padded batch."""
    grids = MIX[2:5] if quick else MIX
    ours, theirs = ours_and_diffusers(MIDDLE, CPU, torch.float32)
    samples = Samples.draw(MIDDLE, grids, CPU, torch.float32)
    tokens, batch = samples.tokens, samples.padded()
    padded_tokens = len(grids) * batch.shape[2] * batch.shape[3] * batch.shape[4] // 4
    table = Table(
        f"A pack of {len(grids)} mixed shapes against diffusers' padded batch, fp32, width 384, 4 layers",
        ["pass", "pack", "padded batch", "padded / pack"],
        note=f"Grids {grids}: {samples.layout.total:,} tokens packed, {padded_tokens:,} padded. Target: >= 1.5.",
    )
    calls = {
        "pack": lambda: ours(tokens, samples.timesteps, samples.texts, samples.layout),
        "padded": lambda: theirs(batch, samples.timesteps, samples.texts, return_dict=False)[0],
    }
    for name, wrap in (("forward", forward), ("training", lambda call: training(call, ours, theirs))):
        times = time_rounds({who: wrap(call) for who, call in calls.items()}, 1 if quick else 3)
        medians = [seconds(median(times[who])) for who in ("pack", "padded")]
        table.rows.append([name, *medians, f"{ratio(times['padded'], times['pack']):.2f}"])
    return table


def recompute(quick: bool) -> Table:
    """Activations that each mode saves for the backward pass, and the time of a training step."""
    config = dataclasses.replace(QUICK_WIDTH if quick else TRUE_WIDTH, num_layers=2)
    table = Table(
        f"Recomputation at width {config.hidden_size}, two layers, fp32: activations saved by a forward pass",
        ["mode", "saved", "training step", "time / none"],
    )
    ours, _ = ours_and_diffusers(config, CPU, torch.float32)
    samples = Samples.draw(config, [(1, 10, 10) if quick else (5, 14, 14)], CPU, torch.float32)
    tokens = samples.tokens

    def call() -> Tensor:
        out: Tensor = ours(tokens, samples.timesteps, samples.texts, samples.layout)
        return out

    def in_mode(mode: Any) -> Callable[[], object]:
        def run() -> None:
            ours.recompute = mode
            training(call, ours)()

        return run

    modes = get_args(Recompute)
    times = time_rounds({mode: in_mode(mode) for mode in modes}, 1 if quick else 5)
    for mode in modes:
        ours.recompute = mode
        ours.zero_grad()
        with torch.profiler.profile(profile_memory=True) as profile:
            out = call()
        kept = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
        del out
        table.rows.append(
            [mode, gigabytes(kept), seconds(median(times[mode])), f"{ratio(times[mode], times['none']):.2f}"]
        )
    table.note = (
        f"{samples.layout.total:,} tokens; measured with torch's allocator. The difference grows with the number of "
        "layers."
    )
    return table


def kernel_traffic(quick: bool) -> Table:
    """What the kernels for CUDA move, launch and keep; counted, so always in full."""
    del quick
    table = Table(
        "What one block moves, launches and keeps in bf16, with the kernels for CUDA and with torch's operations",
        [
            "pack",
            "pass",
            "moved: kernels",
            "torch",
            "ratio",
            "launches: kernels",
            "torch",
            "ratio",
            "kept fp32: kernels",
            "torch",
            "ratio",
        ],
    )
    for name, layout in PACKS.items():
        fused, plain = (block_step(BLOCK, layout, kernels=kernels) for kernels in (True, False))
        for direction in ("forward", "backward"):
            ours, torchs = (getattr(step, direction) for step in (fused, plain))
            moved = [one.bytes / fused.unit for one in (ours, torchs)]
            kept = ["-"] * 3
            if direction == "forward":
                bytes_kept = [one.kept.get(torch.float32, 0) / fused.unit for one in (ours, torchs)]
                kept = [*(f"{size:.1f}" for size in bytes_kept), f"{bytes_kept[0] / bytes_kept[1]:.2f}"]
            table.rows.append(
                [name, direction, f"{moved[0]:.1f}", f"{moved[1]:.1f}", f"{moved[0] / moved[1]:.2f}",
                 str(ours.launches), str(torchs.launches), f"{ours.launches / torchs.launches:.2f}", *kept]
            )  # fmt: skip
    table.note = (
        "Counted without a GPU (wan_model.testing.memory_traffic), outside matrix products and attention, so equal"
        " on every machine; bytes are in units of the block's rows in bf16. A quarter of the kernels' launches in "
        "the backward pass are the gradients of biases. The ratios are to torch's operations one by one, with "
        "which the same model computes where Triton cannot be used. Targets: bytes <= 0.5, fp32 bytes kept <= 0.6,"
        " launches for 27 images <= 0.1."
    )
    return table


_LOAD = """
import json, sys, time
from pathlib import Path
import torch
from wan_model import load_transformer

start = time.perf_counter()
model = load_transformer(Path(sys.argv[1]), dtype=torch.bfloat16)
took = time.perf_counter() - start
lines = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
print(json.dumps([took, peak, sum(p.nbytes for p in model.parameters())]))
"""


def loading(quick: bool) -> Table:
    """Peak memory of a whole process that loads a folder of the 1.3B model's size."""
    config = QUICK_WIDTH if quick else WAN_1_3B
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in WanDiT(config).state_dict().items()}
        rng = torch.Generator().manual_seed(0)
        state = {
            key: torch.empty(shape, dtype=torch.bfloat16).random_(-99, 99, generator=rng)
            for key, shape in shapes.items()
        }
        save_transformer(state, config, Path(folder))
        del state
        _, printed = run_process([sys.executable, "-c", _LOAD, folder], torch.get_num_threads())
    took, peak, size = json.loads(printed)
    return Table(
        f"Loading a folder of random weights, bf16, width {config.hidden_size}, {config.num_layers} layers",
        ["weights", "peak of the whole process", "peak / weights", "time"],
        [[gigabytes(size), gigabytes(peak), f"{peak / size:.3f}", seconds(took)]],
        note="The file is in the page cache. Target: <= 1.15, Python and torch included.",
    )


def tables(*, quick: bool) -> Iterator[Table]:
    """Yield each table when it is measured."""
    for measure in (one_layer, small_models, mixed_pack, recompute, kernel_traffic, loading, lora_step):
        yield measure(quick)
