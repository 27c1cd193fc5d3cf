"""wan-infer on a GPU: the complete 1.3B at 480p compared with diffusers' pipeline, per step and from start to file.

A variant that does not fit into memory or cannot run on this GPU gets a row with the reason; the others continue.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
from torch import Tensor

from bench.infer import Shape, pipeline_arguments, start_to_end
from bench.model_cuda import Measured
from bench.models import ours_and_diffusers
from bench.report import Table, gigabytes, seconds
from wan_infer.sampling.denoise import denoise
from wan_model import WAN_1_3B, PackLayout, TorchOps, pack_flops
from wan_model.dit.attention import AttentionKind
from wan_model.sampling.denoising import draw_noise
from wan_model.sampling.settings import Settings
from wan_model.system.gpus import peak_tflops
from wan_model.tiny import write_tiny_wan

VIDEO = Shape(WAN_1_3B, 832, 480, 81, 6, "cuda")
KINDS: list[AttentionKind] = ["auto", "cudnn", "flash"]
COLUMNS = ["", "s/step", "TFLOP/s", "of peak", "peak memory", "time / diffusers", "latents differ by"]


def steps(shape: Shape, rounds: int) -> Table:
    """A step with guidance, prompts embedded before, of both with the same weights in bf16."""
    device = torch.device(shape.device)
    ours, theirs = ours_and_diffusers(shape.config, device, torch.bfloat16)
    for model in (ours, theirs):
        model.eval().requires_grad_(False)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipe: Any = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=theirs)
    pipe.set_progress_bar_config(disable=True)
    noise = draw_noise(shape.latent, 0)[None].to(device)
    generator = torch.Generator().manual_seed(1)
    length, width = shape.config.text_length, shape.config.text_dim
    embeds, negative = (torch.randn(1, length, width, generator=generator).to(device) for _ in range(2))
    asked = {**pipeline_arguments(shape), "prompt": None, "negative_prompt": None, "output_type": "latent"}
    found: dict[str, Tensor] = {}

    def their_run() -> None:
        with torch.no_grad():
            found["theirs"] = pipe(
                **asked,
                prompt_embeds=embeds.bfloat16(),
                negative_prompt_embeds=negative.bfloat16(),
                latents=noise.clone(),
            ).frames

    def our_run() -> None:
        found["ours"] = denoise(ours, noise, [embeds[0]], negative[0], Settings(shape.steps))

    grid = (shape.latent[1], shape.latent[2] // 2, shape.latent[3] // 2)
    layout = PackLayout((grid, grid))
    table = Table(
        f"A sampling step with guidance: {shape.width}x{shape.height}, {shape.frames} frames "
        f"({layout.total // 2:,} tokens), bf16",
        COLUMNS,
        note=f"Time per step of runs of {shape.steps} steps (UniPC), same weights and noise; TFLOP/s count required "
        "operations. bf16 latents differ because the two round at different operations. Target: <= 0.75.",
    )
    tflop = pack_flops(shape.config, layout).forward / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    base = Measured(their_run, device, rounds)

    def row(name: str, it: Measured, result: Tensor | None) -> list[str]:
        if it.failure:
            return [name, it.failure, "", "", "", "", ""]
        rate = tflop * shape.steps / it.seconds
        share = f"{100 * rate / peak:.1f} %" if peak else "peak unknown"
        to_base = "" if base.failure else f"{it.seconds / base.seconds:.2f}"
        off = "" if result is None or base.failure else f"{float((result - reference).norm() / reference.norm()):.1e}"
        return [name, seconds(it.seconds / shape.steps), f"{rate:.0f}", share, gigabytes(it.peak), to_base, off]

    reference = found["theirs"].float() if "theirs" in found else torch.zeros(1)
    table.rows.append(row("diffusers' WanPipeline", base, None))
    for kind in KINDS:
        assert isinstance(ours.ops, TorchOps), "the model was built with torch's ops"
        ours.ops.kind = kind
        it = Measured(our_run, device, rounds)
        table.rows.append(row(f"wan-infer, {kind}", it, found.get("ours")))
    return table


def tables(*, quick: bool, shape: Shape = VIDEO) -> Iterator[Table]:
    """Yield each table when it is measured."""
    rounds = 1 if quick else 2
    yield steps(shape, rounds)
    if shape.device != "cpu":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_wan(folder / "model", config=shape.config)
        if shape.device != "cpu":  # the true autoencoder; the text encoder has the true width and few layers
            with torch.random.fork_rng(devices=[]):
                AutoencoderKLWan().save_pretrained(model / "vae")
        yield start_to_end(shape, model, folder, quick)
