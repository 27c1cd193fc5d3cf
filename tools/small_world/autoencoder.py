"""Train the autoencoder of the small world: ``python -m small_world.autoencoder FOLDER``.

Writes ``config.json`` and ``diffusion_pytorch_model.safetensors``, as diffusers does, with the weights in float16 and
the statistics of the latents measured on clips. The strides and the 16 channels are those of Wan 2.1. Equal versions
of torch on equal processors give equal bytes; takes some fifteen minutes of one core.

The files that are kept beside this module were made by it; ``model.DIGESTS`` are theirs.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from small_world.recognition import right
from small_world.scenes import EVENTS, OBJECTS, PATTERNS, Frames, Scene, World

# Blinking and sliding patterns are what the quickstart's world has; the others are for worlds to come.
ALL_PATTERNS = dataclasses.replace(PATTERNS, attributes={**PATTERNS.attributes, "event": tuple(EVENTS)})
WORLDS = (ALL_PATTERNS, OBJECTS)

CHANNELS, BASE, MULTIPLIERS, BLOCKS = 16, 8, [1, 2, 4, 4], 1
CROP = 32
LATENT_NOISE = 0.1  # in deviations of the clip's latents, so that near latents give near frames


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        steps: number of steps.
        frames: of each clip, 4n + 1.
        batch: clips a step.
    """

    steps: int
    frames: int
    batch: int


# Frames one at a time are cheap, and what is learnt of them stays.
PHASES = (Phase(1500, 1, 8), Phase(1200, 5, 4), Phase(1600, 9, 4))
LEARNING_RATE, WARMUP = 2e-3, 20


def new_autoencoder(seed: int) -> Any:
    """An ``AutoencoderKLWan`` whose weights keep the size of what passes through.

    The usual initialisation shrinks the signal in every convolution, and the biases drown it: training fails.
    """
    with torch.random.fork_rng(devices=[]):
        vae = AutoencoderKLWan(base_dim=BASE, z_dim=CHANNELS, dim_mult=MULTIPLIERS, num_res_blocks=BLOCKS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" in name or name.endswith("gamma"):
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif "time_conv" in name:
                _identity_in_time(parameter)
            else:
                in_time = parameter.ndim == 5 and parameter.shape[2] == 3
                fan_in = parameter[0].numel() / (3 if in_time else 1)
                gain = 0.3 if ".conv2." in name or "proj" in name else 1.4 if ".conv1." in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain / fan_in**0.5)
                if in_time:
                    parameter[:, :, :2] = 0  # at first each frame for itself; the taps of earlier frames are learnt
    return vae


def _identity_in_time(weight: Tensor) -> None:
    """Downsampling in time averages frames, upsampling repeats them."""
    weight.zero_()
    channels = weight.shape[1]
    identity = torch.eye(channels)
    if len(weight) == channels:
        weight[:, :, :, 0, 0] = identity[:, :, None] / 3
    else:
        weight[:channels, :, 2, 0, 0] = identity
        weight[channels:, :, 2, 0, 0] = identity


def _fast_norm(self: Any, x: Tensor) -> Tensor:
    """The RMS norm of the autoencoder, five times as fast on a CPU as diffusers' ``normalize``."""
    axis = 1 if self.channel_first else -1
    return x * torch.rsqrt((x * x).sum(axis, keepdim=True) + 1e-12) * self.scale * self.gamma + self.bias


@contextlib.contextmanager
def _fast_norms() -> Any:
    original = autoencoder_kl_wan.WanRMS_norm.forward
    autoencoder_kl_wan.WanRMS_norm.forward = _fast_norm
    try:
        yield
    finally:
        autoencoder_kl_wan.WanRMS_norm.forward = original


def to_tensor(clips: list[Frames]) -> Tensor:
    """Clips of one size as [B, 3, T, H, W] in [-1, 1]."""
    return rearrange(torch.from_numpy(np.stack(clips)), "b t h w c -> b c t h w").float() / 127.5 - 1


def to_frames(video: Tensor) -> np.ndarray:
    """One video [3, T, H, W] in [-1, 1] as levels [T, H, W, 3]."""
    return rearrange((video.clamp(-1, 1) + 1) * 127.5, "c t h w -> t h w c").round().numpy()


def clips_of(world: World, count: int, seed: int) -> list[tuple[Scene, Frames]]:
    """Scenes, each about as often, with frames of one of the sizes."""
    generator = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        every = list(world.scenes)
        generator.shuffle(every)
        scenes += every
    return [(scene, world.frames(scene, generator.choice(world.sizes), generator)) for scene in scenes[:count]]


def _crop(frames: Frames, generator: random.Random) -> Frames:
    """A square around a pixel that differs from the corner, at a multiple of 8 pixels."""
    height, width = frames.shape[1:3]
    differs = np.abs(frames.astype(np.int16) - frames[:, :1, :1].astype(np.int16)).sum(-1).max(0) > 60
    rows, columns = np.nonzero(differs)
    place = generator.randrange(len(rows))

    def start(middle: int, side: int) -> int:
        return 8 * round(min(max(middle - generator.randrange(CROP), 0), side - CROP) / 8)

    top, left = start(int(rows[place]), height), start(int(columns[place]), width)
    return frames[:, top : top + CROP, left : left + CROP]


def train(vae: Any, seed: int, phases: tuple[Phase, ...] = PHASES) -> None:
    """Train on crops of clips of both worlds."""
    pool = [frames for world in WORLDS for _, frames in clips_of(world, 540, seed)]
    generator, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    steps, step, began = sum(phase.steps for phase in phases), 0, time.process_time()
    for phase in phases:
        for _ in range(phase.steps):
            decay = 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.03
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * decay
            clips = []
            for _ in range(phase.batch):
                clip = _crop(generator.choice(pool), generator)
                first = generator.randrange(len(clip) - phase.frames + 1)
                clips.append(clip[first : first + phase.frames])
            x = to_tensor(clips)
            latent = vae.encode(x).latent_dist.mode()
            spread = latent.detach().std((0, 2, 3, 4), keepdim=True)
            latent = latent + LATENT_NOISE * spread * torch.randn(latent.shape, generator=noise)
            y = vae.decode(latent).sample
            loss = functional.mse_loss(y, x) + 0.2 * functional.l1_loss(y, x)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                print(
                    f"step {step} of {steps}, {time.process_time() - began:.0f} s: {float(loss.detach()):.4f}",
                    flush=True,
                )


@torch.no_grad()
def measure_latents(vae: Any, seed: int) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel."""
    rows = []
    for world in WORLDS:
        for _, frames in clips_of(world, 120, seed):
            rows.append(rearrange(vae.encode(to_tensor([frames])).latent_dist.mode(), "1 c t h w -> (t h w) c"))
    latents = torch.cat(rows).double()
    return latents.mean(0).tolist(), latents.std(0).tolist()


@torch.no_grad()
def evaluate(vae: Any, seed: int) -> dict[str, dict[str, float]]:
    """By world: the mean PSNR in dB of reconstructions, and the share that shows what its scene has."""
    found = {}
    for world in WORLDS:
        psnr, correct = [], []
        for scene, frames in clips_of(world, 60, seed):
            video = vae.decode(vae.encode(to_tensor([frames])).latent_dist.mode()).sample[0]
            rebuilt = to_frames(video)
            psnr.append(10 * math.log10(255**2 / float(((rebuilt - frames) ** 2).mean())))
            correct.append(all(right(world, rebuilt, scene).values()))
        found[world.name] = {"psnr": float(np.mean(psnr)), "right": float(np.mean(correct))}
    return found


def save(vae: Any, folder: Path, mean: list[float], deviation: list[float]) -> None:
    """Write the folder in diffusers' layout with weights in float16."""
    vae.register_to_config(latents_mean=mean, latents_std=deviation)
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in vae.config.items() if not name.startswith("_") or name == "_class_name"}
    config["_class_name"] = "AutoencoderKLWan"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights = {name: value.half().contiguous() for name, value in vae.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")


def main() -> None:
    """Train, measure and save."""
    parser = argparse.ArgumentParser(prog="python -m small_world.autoencoder", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder for config.json and the weights")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    vae = new_autoencoder(arguments.seed)
    with _fast_norms():
        train(vae, arguments.seed)
        vae.eval()
        # What is measured and used is what was rounded for the file.
        vae.load_state_dict({name: value.half().float() for name, value in vae.state_dict().items()})
        mean, deviation = measure_latents(vae, arguments.seed + 1)
        print(json.dumps(evaluate(vae, arguments.seed + 2)), flush=True)
    save(vae, arguments.folder, mean, deviation)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
