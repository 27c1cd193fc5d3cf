"""A sampling step of the 1.3B model beside diffusers, and offloading."""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.models import diffusers_model_of
from gpu.context import AT_ONCE, Context
from gpu.fused_operations import kernels_used
from gpu.model import relative
from gpu.models import random_model, use
from gpu.rows import Failed, Found, Row, Value
from gpu.step import config_of, peak_of, rates
from gpu.timing import Timed, seconds_of, time_alternately
from wan_infer.runtime.placement import onload
from wan_infer.sampling.denoise import denoise
from wan_model import PackLayout, WanDiT, pack_flops
from wan_model.dit.attention import AttentionKind
from wan_model.sampling.denoising import draw_noise
from wan_model.sampling.settings import Settings

_STEPS = 2
# Latents in bf16 of two implementations that round at different operations.
_NEAR = 0.1


class _Sampling:
    """Runs of some steps with guidance, ours and diffusers' pipeline with the same weights and noise."""

    def __init__(self, context: Context) -> None:
        self.context = context
        # 81 frames of 480 x 832.
        self.latent = (16, 21, 60, 104) if context.on_gpu else (16, 2, 8, 12)
        self.config = config_of(context)
        device, rng = torch.device(context.device), torch.Generator().manual_seed(1)
        self.noise = draw_noise(self.latent, 0)[None].to(device)
        shape = (1, self.config.text_length, self.config.text_dim)
        self.embeds, self.negative = (torch.randn(shape, generator=rng).to(device) for _ in range(2))
        self.results: dict[str, torch.Tensor] = {}

    @functools.cached_property
    def model(self) -> WanDiT:
        return random_model(self.config, self.context.device, torch.bfloat16).eval().requires_grad_(False)

    def ours(self, name: str, kind: AttentionKind, kernels: bool | None = None) -> Callable[[], object]:
        def run() -> None:
            if kind not in ("auto", "sdpa"):
                self.context.need_gpu()
            use(self.model, kind, "none")
            self.results[name] = denoise(self.model, self.noise, [self.embeds[0]], self.negative[0], Settings(_STEPS))

        def without() -> None:
            with kernels_used(False):
                run()

        return run if kernels is None else without

    @functools.cached_property
    def pipeline(self) -> Any:
        self.context.leave_out_if_quick()
        from diffusers import UniPCMultistepScheduler, WanPipeline

        theirs = diffusers_model_of(self.model, torch.device(self.context.device)).eval().requires_grad_(False)
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
        pipe: Any = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=theirs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def theirs(self) -> None:
        _, frames, height, width = self.latent
        with torch.no_grad():
            self.results["diffusers"] = self.pipeline(
                prompt=None, negative_prompt=None, width=8 * width, height=8 * height, num_frames=4 * frames - 3,
                num_inference_steps=_STEPS, guidance_scale=5.0, output_type="latent", latents=self.noise.clone(),
                prompt_embeds=self.embeds.bfloat16(), negative_prompt_embeds=self.negative.bfloat16(),
            ).frames  # fmt: skip

    def rows(self) -> Iterator[Row]:
        """A row for each implementation."""
        calls: dict[str, Callable[[], object]] = {
            "auto": self.ours("auto", "auto"),
            "diffusers": self.theirs,
            "flash": self.ours("flash", "flash"),
            "auto, without fused kernels": self.ours("auto, without fused kernels", "auto", kernels=False),
        }
        timed: dict[str, Timed] = {}
        with self.context.group("timing of a sampling step") as fresh:
            if fresh:
                timed = time_alternately(calls, self.context, rounds=1)
        for name in calls:
            yield from self.context.row(
                f"a step with guidance: {name}", functools.partial(self._found, timed, name), seconds=AT_ONCE
            )

    def _found(self, timed: dict[str, Timed], name: str) -> Found:
        if name not in timed:
            raise Failed("an earlier process of this stage was ended while this was timed")
        it, base = timed[name], timed["diffusers"]
        grid = (self.latent[1], self.latent[2] // 2, self.latent[3] // 2)
        layout = PackLayout((grid, grid))
        seconds = it.median / _STEPS
        figures = {key: value for key, value in it.figures().items() if key not in ("seconds", "each")}
        numbers: dict[str, Value] = {
            "seconds a step": float(f"{seconds:.4g}"),
            "each run": it.figures()["each"],
            **rates(seconds, pack_flops(self.config, layout).forward, layout.valid, peak_of(self.context)),
            **figures,
        }
        if name != "diffusers" and base.seconds and base.problem is None:
            numbers["time / diffusers"] = round(it.median / base.median, 3)
            numbers["latents off by"] = relative(self.results[name], self.results["diffusers"])
            if not relative(self.results[name], self.results["diffusers"]) <= _NEAR:
                raise Failed("the latents are not near those of diffusers", numbers)
        return Found(f"runs of {_STEPS} steps, both branches of guidance", numbers)


def offloaded(context: Context, sampling: _Sampling) -> Found:
    """The transformer to the device and back, as ``--offload-model true`` moves it for each video.

    Raises:
        Failed: it is not in main memory afterwards.
    """
    # Diffusers' model would keep the weights on the device.
    sampling.__dict__.pop("pipeline", None)
    model = sampling.model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    main, device = torch.device("cpu"), torch.device(context.device)
    model.to(main)

    def there_and_back() -> None:
        with onload(model, device, main):
            pass

    took = seconds_of(there_and_back, context.device)
    gc.collect()  # diffusers' pipeline refers to itself
    places = {p.device.type for p in model.parameters()}
    held = torch.cuda.memory_allocated() if context.on_gpu else 0
    numbers: dict[str, Value] = {
        "seconds both ways": float(f"{took:.4g}"), "GB": round(size / 1e9, 3),
        "GB/s": float(f"{2 * size / took / 1e9:.3g}"), "GB still on the device": round(held / 1e9, 3),
    }  # fmt: skip
    if places != {"cpu"}:
        raise Failed("weights stay on the device", numbers)
    return Found("the weights go to the device and back to main memory", numbers)


def rows(context: Context) -> Iterator[Row]:
    """Steps, then offloading, which takes the model from the device."""
    sampling = _Sampling(context)
    yield from sampling.rows()
    yield from context.row("offloading", functools.partial(offloaded, context, sampling), memory_may_lack=True)
