"""The autoencoder of Wan 2.1 on 81 frames: decoding as wan-infer does it, encoding as wan-data does it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from gpu.context import Context
from gpu.models import random_decoder, random_encoder
from gpu.rows import Failed, Found, Row, Value
from gpu.timing import time_alternately
from wan_model.codec.convolutions import tf32_convolutions
from wan_model.codec.tiled_decode import TiledDecoder, most_square, split_frame


@dataclasses.dataclass(frozen=True)
class Way:
    """How a video is decoded or encoded.

    Attributes:
        tiles: that a frame is decoded in.
        dtype: of the weights.
        tf32: whether cuDNN may round the inputs of fp32 convolutions.
        channels_last: the memory format of the weights, for comparison; the packages keep the channels first.
        search: whether cuDNN times its algorithms at the first call, for comparison; the packages leave that off.
    """

    tiles: int = 1
    dtype: torch.dtype = torch.float32
    tf32: bool = True
    channels_last: bool = False
    search: bool = False


DECODING = {
    "decoding": Way(),
    "decoding, bfloat16": Way(dtype=torch.bfloat16),
    "decoding, 4 tiles": Way(tiles=4),
    "decoding, float32 without TF32": Way(tf32=False),
    "decoding, channels last": Way(channels_last=True),
    "decoding, bfloat16, channels last": Way(dtype=torch.bfloat16, channels_last=True),
    "decoding, cudnn.benchmark": Way(search=True),
    "decoding, bfloat16, cudnn.benchmark": Way(dtype=torch.bfloat16, search=True),
}
ENCODING = {
    "encoding": Way(),
    "encoding, bfloat16": Way(dtype=torch.bfloat16),
    "encoding, float32 without TF32": Way(tf32=False),
    "encoding, channels last": Way(channels_last=True),
    "encoding, bfloat16, channels last": Way(dtype=torch.bfloat16, channels_last=True),
    "encoding, cudnn.benchmark": Way(search=True),
    "encoding, bfloat16, cudnn.benchmark": Way(dtype=torch.bfloat16, search=True),
}
# On a CPU the others are the same arithmetic.
_ON_CPU = ("decoding, bfloat16", "decoding, 4 tiles", "encoding, bfloat16")


def _latent_size(context: Context) -> tuple[int, int, int]:
    """Frames, height and width: 81 frames of 480 x 832 on a GPU."""
    return (21, 60, 104) if context.on_gpu else (2, 4, 6)


def _width(context: Context) -> int:
    return 96 if context.on_gpu else 8


@contextlib.contextmanager
def _convolutions(way: Way) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = way.search
    try:
        with tf32_convolutions(way.tf32):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def _placed(module: nn.Module, way: Way, context: Context) -> nn.Module:
    module.to(context.device, way.dtype)
    if way.channels_last:
        formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
        for part in module.modules():
            for kind, memory_format in formats.items():
                if isinstance(part, kind):
                    part.weight.data = part.weight.data.contiguous(memory_format=memory_format)
    return module


def _timed(run: Callable[[], object], way: Way, context: Context) -> dict[str, Value]:
    with _convolutions(way):
        return time_alternately({"run": run}, context, rounds=1)["run"].figures()


def decoded(context: Context, way: Way) -> Found:
    """Decoding of a whole video, its frames copied to main memory as they are made.

    Raises:
        Failed: frames are missing or not finite.
    """
    size = _latent_size(context)
    decoder = random_decoder(_width(context))
    _placed(decoder, way, context)
    tiled = TiledDecoder(decoder)
    raw = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(0)).to(context.device, way.dtype)
    height, width = 8 * size[1], 8 * size[2]
    places = split_frame(height, width, *most_square(way.tiles, height, width), tiled.scale)
    counted, finite = 0, True

    def run() -> None:
        nonlocal counted, finite
        counted = 0
        features = list(tiled.features(raw)) if way.tiles > 1 else tiled.features(raw)
        for place in places:
            for frames in tiled.pixels(features, place):
                pixels = frames.cpu()
                counted += pixels[0].numel()
                finite = finite and bool(pixels.isfinite().all())

    numbers = _timed(run, way, context)
    frames = counted / (height * width)
    numbers |= {"frames": frames, "tiles": way.tiles, "TF32": way.tf32}
    if frames != 4 * size[0] - 3 or not finite:
        raise Failed("frames are missing or not finite", numbers)
    return Found(f"{frames:.0f} frames of {width} x {height}", numbers)


def encoded(context: Context, way: Way) -> Found:
    """Encoding of a whole video that is on the device.

    Raises:
        Failed: latents are missing or not finite.
    """
    size = _latent_size(context)
    autoencoder = _placed(random_encoder(_width(context)), way, context)
    frames, height, width = 4 * size[0] - 3, 8 * size[1], 8 * size[2]
    generator = torch.Generator(context.device).manual_seed(0)
    video = torch.rand(1, 3, frames, height, width, generator=generator, device=context.device)
    video = (2 * video - 1).to(way.dtype)
    latents = torch.empty(0)

    @torch.no_grad()
    def run() -> None:
        nonlocal latents
        latents = autoencoder.encode(video).latent_dist.mode().float()  # type: ignore[operator]

    numbers = _timed(run, way, context)
    numbers |= {"frames": frames, "TF32": way.tf32}
    if latents.shape != (1, 16, *size) or not bool(latents.isfinite().all()):
        raise Failed(f"the latents have the shape {tuple(latents.shape)}, or are not finite", numbers)
    return Found(f"{frames} frames of {width} x {height}", numbers)


def rows(context: Context) -> Iterator[Row]:
    """Decoding, then encoding."""
    for ways, call in ((DECODING, decoded), (ENCODING, encoded)):
        for name, way in ways.items():
            if context.on_gpu or name in _ON_CPU:
                yield from context.row(name, functools.partial(call, context, way), seconds=5, memory_may_lack=True)
