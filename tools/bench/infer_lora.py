"""wan-infer on the CPU: a sampling step with LoRA beside the weights, compared with LoRA that is merged into them."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.measure import median, ratio, time_rounds
from bench.report import Table, seconds
from wan_infer.sampling.sampler import WanSampler
from wan_model import PackLayout, WanConfig, pack_flops
from wan_model.dit.lora import DOWN, LoraSettings, adapter_shapes
from wan_model.sampling.settings import Settings
from wan_model.tiny import write_tiny_wan

RANK, STEPS = 32, 2
PROMPT = "A rabbit wakes in a meadow and looks up at a butterfly."


@dataclasses.dataclass(frozen=True)
class LoraShape:
    """What is sampled.

    Attributes:
        config: the transformer's sizes.
        width, height, frames: of the video.
    """

    config: WanConfig
    width: int = 240
    height: int = 160
    frames: int = 17

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens by frames, rows and columns."""
        return 1 + (self.frames - 1) // 4, self.height // 16, self.width // 16


_TEXT: dict[str, Any] = {"text_dim": 512, "text_length": 512}
REAL = (
    LoraShape(WanConfig(num_heads=8, head_dim=64, ffn_dim=2304, num_layers=8, **_TEXT)),
    # The width of the 1.3B model.
    LoraShape(WanConfig(num_heads=12, head_dim=128, ffn_dim=8960, num_layers=1, **_TEXT)),
)
QUICK = (
    LoraShape(
        WanConfig(num_heads=4, head_dim=24, ffn_dim=192, num_layers=2, text_dim=32, text_length=512, freq_dim=64),
        64, 48, 5,
    ),
)  # fmt: skip


def write_lora(config: WanConfig, path: Path, seed: int) -> None:
    """A LoRA of every linear of the blocks, whose changes are a tenth of random weights."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for key, size in adapter_shapes(config, LoraSettings(RANK)).items():
        spread = size[1] ** -0.5 if f".{DOWN}." in key else 0.1 * RANK**-0.5
        tensors[f"transformer.{key}"] = torch.randn(size, generator=rng) * spread
    save_file(tensors, path)


def _share(shape: LoraShape) -> float:
    """Operations of one file's adapters in a step, by those of the blocks without.

    Keys and values of the texts are in neither; they are computed once for all steps.
    """
    config, layout = shape.config, PackLayout((shape.grid, shape.grid))
    values = sum(
        torch.Size(size).numel()
        for key, size in adapter_shapes(config, LoraSettings(RANK)).items()
        if "attn2.to_k" not in key and "attn2.to_v" not in key
    )
    whole = pack_flops(config, layout)
    texts = 4 * config.num_layers * layout.num_samples * config.text_length * config.hidden_size**2
    return 2 * layout.total * values / (whole.self_attention + whole.cross_attention + whole.block_linears - texts)


def adapters(folder: Path, quick: bool) -> Table:
    """A step with one LoRA and with two, beside the weights and merged."""
    table = Table(
        f"A sampling step with LoRA of rank {RANK} beside the weights (--lora-mode unmerged) against merged, fp32",
        ["model", "merged", "one file", "/ merged", "two files", "/ merged", "operations of one file", "differ by"],
        note="Every linear of the blocks is adapted. All are timed in one process in turns: time per step, with "
        f"guidance, of runs of {STEPS} steps with the texts' keys; operations are computed, by those of the blocks "
        "without LoRA. Target of one file: <= 1.05 at the width of the 1.3B model.",
    )
    for shape in QUICK if quick else REAL:
        table.rows.append(_row(shape, folder / f"lora-{shape.config.hidden_size}", quick))
    return table


def _row(shape: LoraShape, folder: Path, quick: bool) -> list[str]:
    model = write_tiny_wan(folder, config=shape.config)
    files = [folder / f"{name}.safetensors" for name in ("one", "two")]
    for seed, file in enumerate(files):
        write_lora(shape.config, file, seed)
    settings = Settings(STEPS, negative_prompt="blurred, grey")
    found: dict[str, torch.Tensor] = {}

    def run(name: str, sampler: WanSampler) -> None:
        found[name] = sampler.sample_latents(
            [PROMPT],
            width=shape.width,
            height=shape.height,
            frames=shape.frames,
            settings=settings,
        )

    samplers = {
        "merged": WanSampler.from_pretrained(model, device="cpu", lora=files[0]),
        "one": WanSampler.from_pretrained(model, device="cpu", lora=files[0], lora_mode="unmerged"),
        "two": WanSampler.from_pretrained(
            model, device="cpu", lora=[(files[0], 0.8), (files[1], 0.5)], lora_mode="unmerged"
        ),
    }
    for sampler in samplers.values():  # loaded and embedded before anything is timed
        sampler.embed([PROMPT, settings.negative_prompt])
        assert not sampler.model.training
    times = time_rounds(
        {name: functools.partial(run, name, sampler) for name, sampler in samplers.items()},
        1 if quick else 5,
        warm_up=not quick,
    )
    off = float((found["one"] - found["merged"]).norm() / found["merged"].norm())
    assert off < 1e-4, f"the two sample different latents: {off}"
    config = shape.config
    layers = f"{config.num_layers} layer{'s' if config.num_layers > 1 else ''}"
    return [
        f"width {config.hidden_size}, {layers}, {PackLayout((shape.grid,)).total:,} tokens",
        seconds(median(times["merged"]) / STEPS),
        seconds(median(times["one"]) / STEPS),
        f"{ratio(times['one'], times['merged']):.3f}",
        seconds(median(times["two"]) / STEPS),
        f"{ratio(times['two'], times['merged']):.3f}",
        f"{100 * _share(shape):.1f} %",
        f"{off:.1e}",
    ]
