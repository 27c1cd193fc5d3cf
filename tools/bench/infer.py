"""wan-infer on the CPU: compared with diffusers' pipeline, in one process and two, and the memory of decoding.

What a GPU is timed with too (``infer_cuda``) takes the device from its shape.
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import UMT5Config, UMT5EncoderModel

from bench.infer_lora import adapters
from bench.measure import median, ratio, run_process, time_rounds
from bench.report import Table, gigabytes, seconds
from wan_infer.sampling.sampler import WanSampler
from wan_model import WAN_1_3B, WAN_14B, PackLayout, WanConfig, pack_flops
from wan_model.codec.latent_codec import LatentCodec
from wan_model.dit.model import precision_of
from wan_model.sampling.denoising import draw_noise
from wan_model.sampling.settings import Settings
from wan_model.tiny import write_tiny_wan
from wan_model.weights.transformer import expected_shapes

PROMPT, NEGATIVE = "A rabbit wakes in a meadow and looks up at a butterfly.", "blurred, grey"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The videos to sample.

    Attributes:
        config: the transformer's sizes.
        width, height, frames: of the video.
        steps: of the sampling run.
        device: that both sample on, in each one's usual precision there.
    """

    config: WanConfig
    width: int
    height: int
    frames: int
    steps: int
    device: str = "cpu"

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """Shape of the latent."""
        return 16, 1 + (self.frames - 1) // 4, self.height // 8, self.width // 8

    def arguments(self, model: Path, file: Path) -> list[str]:
        """The arguments of ``wan-infer``."""
        return [
            *("--model", str(model), "--prompts", PROMPT, "--negative-prompt", NEGATIVE, "--save-file", str(file)),
            *("--sizes", f"{self.width}*{self.height}", "--frame-nums", str(self.frames)),
            *("--sample-steps", str(self.steps), "--device", self.device, "--json"),
        ]


REAL = Shape(
    WanConfig(num_heads=8, head_dim=64, ffn_dim=2304, num_layers=8, text_dim=512, text_length=512), 240, 160, 17, 10
)
QUICK = Shape(
    WanConfig(num_heads=4, head_dim=24, ffn_dim=192, num_layers=2, text_dim=32, text_length=512, freq_dim=64),
    64,
    48,
    5,
    3,
)


def _wan_infer(shape: Shape, model: Path, folder: Path, threads: int, *extra: str) -> tuple[float, dict[str, Any]]:
    """Seconds from start to end of the process, and its report."""
    file = folder / "ours.mp4"
    command = [sys.executable, "-m", "wan_infer", *shape.arguments(model, file), *extra]
    took, printed = run_process(command, threads, HF_HUB_OFFLINE="1")
    file.unlink()
    return took, json.loads(printed)


# As in diffusers' documentation; the file is written with PyAV at the end.
_THEIRS = """
import sys, json, time, torch, av
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
model, file, given, device = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
if device == "cpu":
    pipe = WanPipeline.from_pretrained(model)
else:
    vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    pipe = WanPipeline.from_pretrained(model, vae=vae, torch_dtype=torch.bfloat16).to(device)
pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=5.0)
pipe.set_progress_bar_config(disable=True)
frames = pipe(**given, generator=torch.Generator().manual_seed(0), output_type="np").frames[0]
with av.open(file, "w") as container:
    stream = container.add_stream("libx264", rate=16, options={"crf": "17", "preset": "medium"})
    stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
    for frame in (frames * 255).round().astype("uint8"):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
    container.mux(stream.encode())
"""


def pipeline_arguments(shape: Shape) -> dict[str, Any]:
    """The arguments of diffusers' pipeline."""
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "width": shape.width,
        "height": shape.height,
        "num_frames": shape.frames,
        "num_inference_steps": shape.steps,
        "guidance_scale": 5.0,
    }


def _pipeline(shape: Shape, model: Path, folder: Path, threads: int) -> float:
    """Seconds from start to end of the process."""
    file = folder / "theirs.mp4"
    command = [sys.executable, "-c", _THEIRS, model, file, json.dumps(pipeline_arguments(shape)), shape.device]
    took, _ = run_process(command, threads, HF_HUB_OFFLINE="1")
    file.unlink()
    return took


def steps(shape: Shape, model: Path, quick: bool) -> Table:
    """A step of both implementations in one process."""
    sampler = WanSampler.from_pretrained(model, device="cpu")
    pipe = WanPipeline.from_pretrained(model)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, flow_shift=5.0)
    pipe.set_progress_bar_config(disable=True)
    noise = draw_noise(shape.latent, 0)[None]
    embeds, negative = pipe.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=512)
    asked = {**pipeline_arguments(shape), "prompt": None, "negative_prompt": None, "output_type": "latent"}
    settings = Settings(shape.steps, negative_prompt=NEGATIVE)
    sampler.embed([PROMPT, NEGATIVE])
    found: dict[str, torch.Tensor] = {}

    def ours() -> None:
        found["ours"] = sampler.sample_latents(
            [PROMPT], width=shape.width, height=shape.height, frames=shape.frames, settings=settings, noise=noise
        )

    def theirs() -> None:
        with torch.no_grad():
            found["theirs"] = pipe(**asked, prompt_embeds=embeds, negative_prompt_embeds=negative, latents=noise).frames

    times = time_rounds({"theirs": theirs, "ours": ours}, 1 if quick else 3, warm_up=not quick)
    off = float((found["ours"] - found["theirs"]).norm() / found["theirs"].norm())
    assert off < 1e-4, f"the two sample different latents: {off}"
    grid = shape.latent[1] * shape.latent[2] * shape.latent[3] // 4
    return Table(
        f"A sampling step with guidance: width {shape.config.hidden_size}, {shape.config.num_layers} layers, "
        f"{shape.width}x{shape.height}, {shape.frames} frames ({grid:,} tokens), fp32",
        ["diffusers' WanPipeline", "wan-infer", "wan-infer / diffusers", "latents differ by"],
        [
            [
                seconds(median(times["theirs"]) / shape.steps),
                seconds(median(times["ours"]) / shape.steps),
                f"{ratio(times['ours'], times['theirs']):.2f}",
                f"{off:.1e}",
            ]
        ],
        f"Time per step of runs of {shape.steps} steps (UniPC) in one process, with the same weights and noise; "
        "prompts are embedded before. Target: <= 1.00.",
    )


def start_to_end(shape: Shape, model: Path, folder: Path, quick: bool) -> Table:
    """Time from the start of the process to the finished file."""
    threads = torch.get_num_threads()
    spent: dict[str, list[float]] = {}

    def ours() -> None:
        _, report = _wan_infer(shape, model, folder, threads)
        for name, value in report["seconds"].items():
            spent.setdefault(name, []).append(value)

    candidates = {"theirs": lambda: _pipeline(shape, model, folder, threads), "ours": ours}
    times = time_rounds(candidates, 1 if quick else 3, warm_up=not quick)
    parts = ", ".join(f"{name} {median(values):.1f}" for name, values in spent.items())
    where = "the same" if shape.device == "cpu" else f"{shape.width}x{shape.height}, {shape.frames} frames, bf16"
    return Table(
        f"From the start of the process to the finished file: {where}, {shape.steps} steps",
        ["diffusers' WanPipeline", "wan-infer", "wan-infer / diffusers"],
        [
            [
                seconds(median(times["theirs"])),
                seconds(median(times["ours"])),
                f"{ratio(times['ours'], times['theirs']):.2f}",
            ]
        ],
        f"Each run is a new process; the two alternate. Seconds of wan-infer by stage: {parts}; the rest is imports. "
        "Target: <= 0.90.",
    )


def two_processes(shape: Shape, model: Path, folder: Path, quick: bool) -> Table:
    """Denoising in two processes of one thread against one."""
    ways = {
        "one process": (),
        "two, CFG parallel": ("--nproc-per-node", "2", "--cfg-parallel"),
        "two, context parallel": ("--nproc-per-node", "2"),
        "two, CFG parallel with FSDP": ("--nproc-per-node", "2", "--cfg-parallel", "--shard-weights"),
    }
    if quick:
        ways = {name: ways[name] for name in ("one process", "two, CFG parallel with FSDP")}
    denoise: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 if quick else 3):
        for name, extra in ways.items():
            _, report = _wan_infer(shape, model, folder, 1, *extra)
            denoise[name].append(report["seconds"]["denoise"])
    table = Table(
        "Two processes of one thread against one: the same",
        ["", "s/step", "speedup"],
        note="Denoising time from the report of each run. Target with CFG parallel: >= 1.6.",
    )
    for name, values in denoise.items():
        table.rows.append([name, seconds(median(values) / shape.steps), f"{ratio(denoise['one process'], values):.2f}"])
    return table


_DECODE = """
import json, sys, time, torch
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.memory import peak_resident
model, shape, way = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
codec = LatentCodec.from_pretrained(model, load_text=False)
latents = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
before = peak_resident()
start = time.perf_counter()
if way is None:
    video = codec.decode_video(latents[None])[0]
    checksum = video.double().sum().item()
else:
    checksum = sum(frames.double().sum().item() for frames in codec.decode_frames(latents, tiles=tuple(way)))
took = time.perf_counter() - start
print(json.dumps([peak_resident() - before, took, checksum]))
"""


def _decoder_folder(folder: Path, quick: bool) -> Path:
    model = folder / "decoder"
    if not model.exists():
        write_tiny_wan(model)
        if not quick:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                AutoencoderKLWan().save_pretrained(model / "vae")
    return model


def precision(folder: Path, quick: bool) -> Table:
    """The error of decoding in bfloat16."""
    model, frames = _decoder_folder(folder, quick), 2
    latents = torch.randn(1, 16, frames, 12, 20, generator=torch.Generator().manual_seed(0))
    videos = {
        name: LatentCodec.from_pretrained(model, load_text=False, vae_dtype=dtype).decode_video(latents)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    error, deviation = videos["bfloat16"] - videos["float32"], videos["float32"].std()
    return Table(
        f"Decoding in bfloat16 against float32: {4 * frames - 3} frames of 160x96, "
        f"{'a small' if quick else 'the true'} autoencoder with random weights",
        ["error / deviation of the pixels", "largest error, in levels of 255", "deviation of the pixels, likewise"],
        [[f"{error.square().mean().sqrt() / deviation:.4f}", f"{error.abs().max() * 127.5:.2f}",
          f"{deviation * 127.5:.1f}"]],
        "Of random weights; it has not been measured with released ones. TF32 needs a GPU.",
    )  # fmt: skip


def decoding(folder: Path, quick: bool) -> Table:
    """Memory and time of decoding the same latents at once, frame by frame, and in tiles."""
    model = _decoder_folder(folder, quick)
    shape = [16, 3, 6, 8] if quick else [16, 3, 30, 52]
    ways: dict[str, list[int] | None] = {
        "whole video (diffusers)": None,
        "frame by frame": [1, 1],
        "2 tiles": [1, 2],
        "4 tiles": [2, 2],
    }
    if quick:
        ways = {name: ways[name] for name in ("whole video (diffusers)", "4 tiles")}
    kind = "a small" if quick else "Wan's"
    table = Table(
        f"Decoding {1 + 4 * (shape[1] - 1)} frames of {8 * shape[3]}x{8 * shape[2]}, {kind} autoencoder, fp32",
        ["", "memory besides the weights", "time", "sum of all pixels"],
        note="Peak resident size of a separate process, less its size before decoding. Tiles are not blended: they "
        "give the same pixels up to rounding (wan-model's tests).",
    )
    for name, way in ways.items():
        command = [sys.executable, "-c", _DECODE, model, json.dumps(shape), json.dumps(way)]
        _, printed = run_process(command, torch.get_num_threads(), HF_HUB_OFFLINE="1")
        memory, took, checksum = json.loads(printed)
        table.rows.append([name, gigabytes(memory), seconds(took), f"{checksum:.3f}"])
    return table


# -- memory and time by size ------------------------------------------------------------------------------------------

SIZES = {
    "1.3B, 832x480": (WAN_1_3B, 832, 480),
    "14B, 832x480": (WAN_14B, 832, 480),
    "14B, 1280x720": (WAN_14B, 1280, 720),
}
_RATE = 400e12


def requirements() -> Table:
    """Computed, not measured: weights, texts and operations exactly, activations and time approximately."""
    text, vae = gigabytes(2 * _text_encoder()), gigabytes(4 * _autoencoder())
    table = Table(
        "Memory and time of 81 frames: 50 steps with guidance, bf16, the autoencoder fp32",
        ["", "tokens", "transformer", "text keys and values", "activations, about", "PFLOP", "at 400 TFLOP/s"],
        note=f"Computed, not measured. The text encoder (umt5-xxl) takes {text} in bf16 and is freed before the "
        f"transformer is loaded, the autoencoder {vae}. Activations: those of the feed-forward layer or of "
        "self-attention, whichever is larger, for both branches of guidance. 400 TFLOP/s are 40 % of an H100's peak.",
    )
    for name, (config, width, height) in SIZES.items():
        grid = (21, height // 16, width // 16)
        once, pair = PackLayout((grid,)), PackLayout((grid, grid))
        weights = sum(
            precision_of(key, torch.bfloat16).itemsize * torch.Size(shape).numel()
            for key, shape in expected_shapes(config).items()
        )
        keys = 2 * config.num_layers * 2 * config.text_length * config.hidden_size * 2
        width_at_once = max(3 * config.hidden_size + config.ffn_dim, 6 * config.hidden_size)
        flops = 50 * pack_flops(config, pair).forward
        table.rows.append(
            [
                name,
                f"{once.total:,}",
                gigabytes(weights),
                gigabytes(keys),
                gigabytes(2 * pair.total * width_at_once),
                f"{flops / 1e15:.1f}",
                f"{flops / _RATE:.0f} s",
            ]
        )
    return table


def _text_encoder() -> int:
    with torch.device("meta"):
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
    return sum(parameter.numel() for parameter in encoder.parameters())


def _autoencoder() -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoencoderKLWan().parameters())


def tables(*, quick: bool) -> Iterator[Table]:
    """Yield each table when it is measured."""
    shape = QUICK if quick else REAL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny_wan(folder / "model", config=shape.config)
        yield steps(shape, model, quick)
        yield start_to_end(shape, model, folder, quick)
        yield two_processes(shape, model, folder, quick)
        yield decoding(folder, quick)
        yield precision(folder, quick)
        yield adapters(folder, quick)
        yield requirements()
