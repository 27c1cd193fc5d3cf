"""Encoding planned sources: windows to latents, captions to text embeddings.

Shapes: T frames, H rows, W columns, 3 colours; a latent is [C, F, h, w]; L text tokens, D text width.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from wan_data.prepare.planned_source import PlannedSource
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import EncodeTask, SourceWindows
from wan_data.shards.serialization import LARGEST_LATENT
from wan_data.shards.writer import Sample, sample_key
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.source_file import Rejected
from wan_model.codec.convolutions import PRECISIONS
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.files import sha256_of
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


def _has_changed(source: PlannedSource) -> bool:
    """Whether a file has another content than when it was probed."""
    try:
        status = source.path.stat()
    except OSError:
        return False  # it was there to be decoded
    if status.st_size != source.bytes:
        return True
    return status.st_mtime_ns != source.mtime_ns and _digest(source.path, status.st_mtime_ns) != source.sha256


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, mtime_ns: int) -> str:
    return sha256_of(path)


class WindowEncoder:
    """Encodes windows in this process, while a decoder process decodes the next ones.

    Args:
        codec: a codec with its autoencoder.
        settings: of the preparation.
        decoder: the decoder process; the caller ends it.
    """

    def __init__(self, codec: LatentCodec, settings: PrepareSettings, decoder: Decoder) -> None:
        self.codec, self.settings, self._decoder = codec, settings, decoder

    def submit(self, task: EncodeTask) -> None:
        """Queue a task's windows for decoding."""
        for part in task.parts:
            self._decoder.submit(self._job(part))

    def result(self, task: EncodeTask) -> list[EncodedWindow]:
        """The encoded windows of the oldest submitted task, in its order."""
        return list(self._encode(task))

    def _job(self, part: SourceWindows) -> Job:
        settings, source = self.settings, part.source
        return Job(
            source.path,
            settings.fps,
            settings.limits,
            tuple(source.windows[number] for number in part.windows),
            source.size,
            settings.resize_mode,
            settings.center_crop,
            settings.display,
        )

    def _encode(self, task: EncodeTask) -> Iterator[EncodedWindow]:
        done: dict[tuple[str, int], EncodedWindow] = {}
        waiting: dict[int, list[tuple[tuple[str, int], Tensor]]] = {}
        for part in task.parts:
            name = part.source.name
            # results() comes first in zip, so that it is read to its end: one item per window, or a rejection.
            for frames, number in zip(self._decoder.results(), part.windows, strict=False):
                if isinstance(frames, Rejected):
                    # The source was decoded to its end when it was probed.
                    problem = f"{frames}, although it could be decoded before"
                    for missing in range(number, part.windows.stop):
                        done[name, missing] = EncodedWindow(name, missing, None, problem)
                    continue
                batch = waiting.setdefault(len(frames), [])
                batch.append(((name, number), frames))
                if len(batch) == self.settings.batch_size:
                    done |= self._latents(waiting.pop(len(frames)))
        for batch in waiting.values():
            done |= self._latents(batch)
        for part in task.parts:
            changed = _has_changed(part.source)
            for number in part.windows:
                one = done[part.source.name, number]
                if changed and one.latent is not None:
                    one = EncodedWindow(one.source, number, None, "the file has changed since it was probed")
                yield one

    def _latents(self, batch: list[tuple[tuple[str, int], Tensor]]) -> dict[tuple[str, int], EncodedWindow]:
        latents = encode_batch(self.codec, [frames for _, frames in batch])
        done = {}
        for ((name, number), _), latent in zip(batch, latents, strict=True):
            problem = _problem(latent)
            done[name, number] = EncodedWindow(name, number, None if problem else latent, problem)
        return done


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
