"""wan-infer at a tiny size: the device against fp64 and the CPU, the autoencoder with and without TF32, the command."""

import copy
import functools
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.commands import WAN_DATA, WAN_INFER, start
from gpu.context import Context
from gpu.model import relative
from gpu.models import TINY, random_decoder, random_model
from gpu.rows import Failed, Found, NotRun, Row, Value
from wan_infer.sampling.denoise import denoise
from wan_model import WanDiT
from wan_model.codec.convolutions import tf32_convolutions
from wan_model.codec.tiled_decode import Tile, TiledDecoder
from wan_model.codec.vae_decoder import VaeDecoder
from wan_model.sampling.denoising import draw_noise
from wan_model.sampling.settings import Settings

_LATENT = (16, 2, 8, 12)
_SETTINGS = Settings(steps=4)
_SMALL = {"width": 64, "height": 48, "frames": 5}
# An fp32 result may be as far from fp64 as the CPU's, whose sums have another order.
_TIMES_CPU, _LEAST = 8.0, 2.0**-20
# In deviations of their products and sums, convolutions with TF32's 10 bits add up like the roundings of 16 bits.
_MOST_OF_TF32 = 0.01


def _latents(model: WanDiT, device: str) -> Tensor:
    noise = draw_noise(_LATENT, 3)[None].to(device)
    rng = torch.Generator().manual_seed(4)
    text, negative = (torch.randn(length, TINY.text_dim, generator=rng).to(device) for length in (5, 3))
    return denoise(model, noise, [text], negative, _SETTINGS).cpu()


def _near_cpu(what: str, got: Tensor, on_cpu: Tensor, exact: Tensor) -> Found:
    """A result of the device beside the CPU's, by their distances from fp64."""
    off, base = relative(got, exact), relative(on_cpu, exact)
    numbers: dict[str, Value] = {
        "off from fp64 by": off, "the CPU's by": base, "off from the CPU by": relative(got, on_cpu)
    }  # fmt: skip
    if not off <= _TIMES_CPU * base + _LEAST:
        raise Failed(f"{what} are further from fp64 than fp32 on the CPU allows", numbers)
    return Found(f"{what} are as near to fp64 as those of the CPU", numbers)


def latents_in_fp32(device: str) -> Found:
    """The sampling loop in fp32 on the device.

    Raises:
        Failed: its latents are further from fp64 than those of the CPU.
    """
    model = random_model(TINY, "cpu", torch.float32)
    exact, on_cpu = _latents(copy.deepcopy(model).double(), "cpu"), _latents(model, "cpu")
    return _near_cpu("latents", _latents(model.to(device), device), on_cpu, exact)


def latents_in_bf16(device: str) -> Found:
    """The same in bf16.

    Raises:
        Failed: its latents are not near those of fp32.
    """
    model = random_model(TINY, "cpu", torch.float32)
    exact = _latents(model, "cpu")
    off = relative(_latents(model.to_precision(torch.bfloat16).to(device), device), exact)
    if not off <= 0.1:
        raise Failed("latents in bf16 are far from those in fp32", {"off by": off})
    return Found("latents in bf16 are near those in fp32", {"off by": off})


def _decode(decoder: VaeDecoder, raw: Tensor) -> Tensor:
    tiled = TiledDecoder(decoder)
    height, width = (8 * size for size in raw.shape[-2:])
    pixels = tiled.pixels(tiled.features(raw.to(decoder.device, decoder.dtype)), Tile(0, height, 0, width))
    return torch.cat([frames.cpu() for frames in pixels], dim=1)


class _Autoencoder:
    """A decoder with random weights, and its frames on the CPU in fp32 and in fp64."""

    def __init__(self, context: Context) -> None:
        self.device = context.device
        self.width, size = (96, (8, 12)) if context.on_gpu else (8, (4, 6))
        self.raw = torch.randn(1, 16, 2, *size, generator=torch.Generator().manual_seed(7))

    @functools.cached_property
    def decoder(self) -> VaeDecoder:
        return random_decoder(self.width)

    @functools.cached_property
    def frames(self) -> tuple[Tensor, Tensor]:
        return _decode(self.decoder, self.raw), _decode(copy.deepcopy(self.decoder).double(), self.raw)

    def on_device(self, allow_tf32: bool) -> Tensor:
        """Frames of the device."""
        decoder = copy.deepcopy(self.decoder).to(self.device)
        with tf32_convolutions(allow_tf32):
            return _decode(decoder, self.raw)


def _frames_in_fp32(it: _Autoencoder) -> Found:
    on_cpu, exact = it.frames
    return _near_cpu("frames", it.on_device(False), on_cpu, exact)


def _frames_with_tf32(it: _Autoencoder, context: Context) -> Found:
    context.need_gpu()
    on_cpu, exact = it.frames
    got = it.on_device(True)
    off = relative(got, exact)
    numbers: dict[str, Value] = {
        "off from fp64 by": off, "off from the CPU by": relative(got, on_cpu),
        "most of a pixel, of 2": float((got - on_cpu).abs().max()), "torch's default": torch.backends.cudnn.allow_tf32,
    }  # fmt: skip
    if not off <= _MOST_OF_TF32:
        raise Failed("frames with TF32 are further off than its rounding explains", numbers)
    return Found("how far TF32 moves the frames", numbers)


class _Folder:
    """The tiny model with text encoder, tokenizer and autoencoder, and a sampler of it; needs diffusers."""

    def __init__(self, context: Context) -> None:
        self.context, self.device, self.path = context, context.device, context.folder / "tiny-wan"

    @functools.cached_property
    def written(self) -> Path:
        self.context.leave_out_if_quick()
        from wan_model.tiny import write_tiny_wan

        return write_tiny_wan(self.path)

    def sampler(self, device: str, **options: Any) -> Any:
        from wan_infer import WanSampler

        return WanSampler.from_pretrained(self.written, device=device, dtype="float32", **options)


def _sample(sampler: Any) -> tuple[Tensor, Tensor]:
    latents = sampler.sample_latents(["a rabbit in a meadow"], seed=3, settings=_SETTINGS, **_SMALL)
    return latents, sampler.decode(latents)


def _sampler_on_device(it: _Folder, results: dict[str, Tensor]) -> Found:
    own, on_cpu = _sample(it.sampler(it.device)), _sample(it.sampler("cpu"))
    results["latents"] = own[0]
    off = [relative(a, b) for a, b in zip(own, on_cpu, strict=True)]
    numbers: dict[str, Value] = {"latents off by": off[0], "frames off by": off[1]}
    # The frames have TF32's convolutions on a GPU, as torch comes.
    if not (off[0] <= 1e-3 and off[1] <= 2 * _MOST_OF_TF32):
        raise Failed("prompt, latents or frames differ from those of the CPU", numbers)
    return Found("prompt, latents and frames are those of the CPU", numbers)


def _offloaded(it: _Folder, results: dict[str, Tensor]) -> Found:
    sampler = it.sampler(it.device, offload=True, t5_cpu=True, tiles=2)
    latents, _ = _sample(sampler)
    places = {p.device.type for part in (sampler.model, sampler.codec.decoder) for p in part.parameters()}
    numbers: dict[str, Value] = {"weights are on": ", ".join(sorted(places))}
    if "latents" in results:
        numbers["latents off by"] = relative(latents, results["latents"])
        if not relative(latents, results["latents"]) <= 1e-3:
            raise Failed("offloading changes the latents", numbers)
    if places != {"cpu"}:
        raise Failed("weights stay on the device after they computed", numbers)
    return Found("the same latents, and afterwards all weights are in main memory", numbers)


def _command(it: _Folder, context: Context, name: str, *options: str) -> Found:
    context.leave_out_if_quick()
    import av

    file, output = context.folder / name, context.folder / f"{name}.json"
    arguments = [
        *("--model", str(it.written), "--prompts", "a rabbit in a meadow", "--save-file", str(file), "--json"),
        *("--sizes", f"{_SMALL['width']}*{_SMALL['height']}", "--frame-nums", str(_SMALL["frames"])),
        *("--sample-steps", "3", "--device", context.device),
    ]
    took = start([*WAN_INFER, *arguments, *options], context.folder / f"{name}.log", output).wait(context.seconds_left)
    report = json.loads(output.read_text(encoding="utf-8"))
    with av.open(str(file)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    numbers: dict[str, Value] = {
        "seconds": round(took, 1), "frames": frames, "bytes": file.stat().st_size, "device": report["device"],
        "precision": report["videos"][0]["dtype"], "peak MB": round(report["peak_memory_bytes"] / 1e6, 1),
    }  # fmt: skip
    if frames != _SMALL["frames"] or context.device not in report["device"]:
        raise Failed("the file or its report is not what was asked for", numbers)
    return Found("the command writes a video that can be decoded", numbers)


def _prepared(it: _Folder, context: Context) -> Found:
    """wan-data on the device and on the CPU, for the video that the command has written."""
    context.leave_out_if_quick()
    if not (video := context.folder / "video.mp4").exists():
        raise NotRun("there is no video of wan-infer")
    (clips := context.folder / "clips").mkdir()
    (clips / "a.mp4").write_bytes(video.read_bytes())
    (clips / "a.txt").write_text("a rabbit in a meadow", encoding="utf-8")
    options = (
        *("--height", str(_SMALL["height"]), "--width", str(_SMALL["width"]), "--frames", str(_SMALL["frames"])),
        *("--min-frames", str(_SMALL["frames"]), "--validation-fraction", "0", "--model", str(it.written)),
    )
    folders = {device: context.folder / f"dataset-{device}" for device in dict.fromkeys((context.device, "cpu"))}
    started = [
        start(
            [
                *(*WAN_DATA, "prepare", "--video-folder", str(clips), "--output-folder", str(folder), *options),
                *("--device", device),
            ],
            context.folder / f"prepare-{device}.log",
        )
        for device, folder in folders.items()
    ]
    took = [one.wait(context.seconds_left) for one in started]
    latents = {device: _latents_of(folder) for device, folder in folders.items()}
    off = relative(latents[context.device], latents["cpu"])
    numbers: dict[str, Value] = {"seconds": round(took[0], 1), "latents off by": off}
    if not off <= 2 * _MOST_OF_TF32:
        raise Failed("the latents differ from those of the CPU", numbers)
    return Found("wan-data writes the latents of the CPU", numbers)


def _latents_of(folder: Path) -> Tensor:
    (shard,) = folder.rglob("*.tar")
    with tarfile.open(shard) as archive:
        (member,) = (member for member in archive if member.name.endswith(".pth"))
        file = archive.extractfile(member)
        assert file is not None, "it is a file"
        latents: Tensor = torch.load(io.BytesIO(file.read()), weights_only=True)
    return latents


def rows(context: Context) -> Iterator[Row]:
    """The loop and the decoder first, which need nothing but torch; then the tiny model with all parts."""
    yield from context.row("latents in fp32", functools.partial(latents_in_fp32, context.device))
    yield from context.row("latents in bf16", functools.partial(latents_in_bf16, context.device))
    decoder = _Autoencoder(context)
    yield from context.row("frames without TF32", functools.partial(_frames_in_fp32, decoder), seconds=3)
    yield from context.row("frames with TF32", functools.partial(_frames_with_tf32, decoder, context))
    folder, results = _Folder(context), dict[str, Tensor]()
    check = functools.partial(_sampler_on_device, folder, results)
    yield from context.row("WanSampler against the CPU", check, seconds=3)
    yield from context.row("WanSampler with offloading", functools.partial(_offloaded, folder, results))
    command = functools.partial(_command, folder, context)
    yield from context.row("wan-infer to an mp4", functools.partial(command, "video.mp4"), seconds=5)
    yield from context.row("wan-data prepare", functools.partial(_prepared, folder, context), seconds=5)
    if context.on_gpu:
        options = ("--offload-model", "true", "--t5-cpu", "--vae-tiles", "2")
        yield from context.row("wan-infer, offloaded", functools.partial(command, "offloaded.mp4", *options), seconds=5)
