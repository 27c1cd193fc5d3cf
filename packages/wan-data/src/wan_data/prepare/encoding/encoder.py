"""Encoding planned sources: windows to latents, captions to text embeddings.

Shapes: T frames, H rows, W columns, 3 colours; a latent is [C, F, h, w]; L text tokens, D text width.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from wan_data.prepare.encoding.task_decoder import FrameBatch, Problems, TaskDecoder, WindowKey
from wan_data.prepare.planned_source import PlannedSource
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import EncodeTask
from wan_data.shards.serialization import LARGEST_LATENT
from wan_data.shards.writer import Sample, sample_key
from wan_data.video.decoder_process import Decoder
from wan_model.codec.convolutions import PRECISIONS
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.torchrun import local_world_size


def choose_device(name: str, process: int = 0) -> torch.device:
    """The device of an encoding process: ``auto`` is CUDA if available, ``cuda`` distributes processes over GPUs."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return torch.device("cuda", process % torch.cuda.device_count())
    return torch.device(name)


def default_processes(device: str) -> int:
    """One encoding process for each GPU that this process may use; under torchrun the ranks of a machine share them."""
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return 1
    return max(1, torch.cuda.device_count() // local_world_size())


def load_codec(model: str, settings: PrepareSettings, device: torch.device, *, vae: bool, text: bool) -> LatentCodec:
    """Load the codec of a model in the precision of the settings."""
    dtype, tf32 = PRECISIONS[settings.dtype]
    return LatentCodec.from_pretrained(
        model,
        device=device,
        vae_dtype=dtype,
        text_dtype=dtype,
        load_vae=vae,
        load_text=text,
        text_length=settings.text_length,
        tf32=tf32,
    )


def encode_batch(codec: LatentCodec, windows: Sequence[UInt8[Tensor, "T H W 3"]]) -> list[Float[Tensor, "C F h w"]]:
    """Encode windows of one shape; the latents are fp32 on the CPU."""
    # Copied to the device as bytes, which takes a quarter of the bandwidth of floats.
    frames = torch.stack(list(windows)).to(codec.vae.device)
    video = rearrange(frames, "b t h w c -> b c t h w").float() / 127.5 - 1
    return list(codec.encode_video(video).cpu())


@dataclasses.dataclass(frozen=True)
class EncodedWindow:
    """The result of encoding a window.

    Attributes:
        source: name of its source.
        window: its number.
        latent: [C, F, h, w], or None if it could not be encoded.
        problem: the reason why there is no latent, or None.
    """

    source: str
    window: int
    latent: Tensor | None
    problem: str | None = None


class WindowEncoder:
    """Encodes windows in this process, while a decoder process decodes the next ones.

    Args:
        codec: a codec with its autoencoder.
        settings: of the preparation.
        decoder: the decoder process; the caller ends it.
    """

    def __init__(self, codec: LatentCodec, settings: PrepareSettings, decoder: Decoder) -> None:
        self.codec, self._decoder = codec, TaskDecoder(settings, decoder)

    def submit(self, task: EncodeTask) -> None:
        """Queue a task's windows for decoding."""
        self._decoder.submit(task)

    def result(self, task: EncodeTask) -> list[EncodedWindow]:
        """The encoded windows of the oldest submitted task, in its order."""
        done: dict[WindowKey, EncodedWindow] = {}
        problems: Problems = {}
        for found in self._decoder.batches(task):
            if isinstance(found, FrameBatch):
                done |= {(one.source, one.window): one for one in encode_windows(self.codec, found)}
            else:
                problems = found
        return list(windows_of(task, done, problems))


def encode_windows(codec: LatentCodec, batch: FrameBatch) -> list[EncodedWindow]:
    """Encode a batch."""
    latents = encode_batch(codec, batch.frames)
    return [encoded_window(key, latent) for key, latent in zip(batch.keys, latents, strict=True)]


def encoded_window(key: WindowKey, latent: Tensor) -> EncodedWindow:
    """The result for a latent, which no loader may be able to read."""
    problem = _problem(latent)
    return EncodedWindow(*key, None if problem else latent, problem)


def windows_of(
    task: EncodeTask, encoded: Mapping[WindowKey, EncodedWindow], problems: Problems
) -> Iterator[EncodedWindow]:
    """The results of a task in its order.

    Args:
        task: the task.
        encoded: its windows that were encoded.
        problems: see ``TaskDecoder.batches``.
    """
    for part in task.parts:
        for number in part.windows:
            key = part.source.name, number
            if key in problems and (key not in encoded or encoded[key].problem is None):
                yield EncodedWindow(*key, None, problems[key])
            else:
                yield encoded[key]


def _problem(latent: Tensor) -> str | None:
    """Why no loader would read a latent."""
    if not bool(torch.isfinite(latent).all()):
        return "the autoencoder gave values that are not finite; try --dtype float32"
    if (largest := float(latent.abs().max())) > LARGEST_LATENT:
        return f"the autoencoder gave a value of {largest:.3g}, beyond {LARGEST_LATENT:g}; try --dtype float32"
    return None


class TextEmbeddings:
    """A cache of text embeddings: equal captions are encoded once, unless too many others came between.

    Args:
        codec: a codec with its text encoder.
        most: bytes of the embeddings that are kept.
    """

    def __init__(self, codec: LatentCodec, most: int = 1 << 30) -> None:
        self._codec, self._most, self._bytes = codec, most, 0
        self._cache: collections.OrderedDict[str, tuple[Tensor, int]] = collections.OrderedDict()

    def get(self, caption: str) -> tuple[Float[Tensor, "L D"], int]:
        """The embedding of a caption, fp32 on the CPU, and the tokens of the whole caption, which may be more."""
        if caption not in self._cache:
            # One at a time: the other captions of a batch change the last digits of an embedding.
            embedding, tokens = self._codec.encode_prompt(caption)
            self._cache[caption] = embedding.cpu(), tokens
            self._bytes += embedding.nbytes
            while self._bytes > self._most and len(self._cache) > 1:
                self._bytes -= self._cache.popitem(last=False)[1][0].nbytes
        self._cache.move_to_end(caption)
        return self._cache[caption]


def make_sample(
    source: PlannedSource, number: int, latent: Tensor, text: Tensor, settings: PrepareSettings, fingerprint: str
) -> Sample:
    """The sample of a window, with NVIDIA's fields and ours (see FORMAT.md)."""
    window, size = source.windows[number], source.size
    info: dict[str, Any] = {
        "video_path": source.name,
        "processed_frames": window.length,
        "processed_height": size.height,
        "processed_width": size.width,
        "caption": source.caption,
        "deterministic_latents": True,
        "memory_optimization": False,
        "model_version": "wan2.1",
        "processing_mode": settings.mode,
        "resize_settings": {
            "target_size": [size.height, size.width],
            "resize_mode": settings.resize_mode,
            "maintain_aspect_ratio": settings.center_crop,
            "center_crop": settings.center_crop,
        },
        "fps": float(settings.fps),
        "frame_start": window.start,
        "frame_stop": window.stop,
        "source_fps": source.info.source_fps,
        "source_height": source.info.height,
        "source_width": source.info.width,
        "source_sha256": source.sha256,
        "text_tokens": text.shape[0],
        "latent_fingerprint": fingerprint,
    }
    if settings.mode == "frames":
        info |= {"frame_index": window.start, "total_frames_in_video": source.info.frames}
    return Sample(sample_key(source.name, window.start), latent, text, info)
