"""From planned sources to samples: windows to latents, captions to embeddings.

Shapes: T frames, H rows, W columns, 3 colours; a latent is [C, F, h, w]; L text tokens, D text width.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from wan_data.prepare.probe import PlannedSource
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import Part, Task
from wan_data.shards.writer import Sample, sample_key
from wan_data.video.decode import Rejected
from wan_data.video.decoder_process import Decoder, Job
from wan_model.codec.latent_codec import LatentCodec

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str, process: int = 0) -> torch.device:
    """``auto`` is a CUDA device where there is one, else the CPU; several processes share out the devices."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        return torch.device("cuda", process % torch.cuda.device_count())
    return torch.device(name)


def load_codec(model: str, settings: PrepareSettings, device: torch.device, *, vae: bool, text: bool) -> LatentCodec:
    """The codec of a model, in the precision that the settings ask for."""
    dtype = _TORCH_DTYPES[settings.dtype]
    return LatentCodec.from_pretrained(
        model,
        device=device,
        vae_dtype=dtype,
        text_dtype=dtype,
        load_vae=vae,
        load_text=text,
        text_length=settings.text_length,
    )


def encode_batch(codec: LatentCodec, windows: Sequence[UInt8[Tensor, "T H W 3"]]) -> list[Float[Tensor, "C F h w"]]:
    """The latents of windows of one shape, fp32 on the CPU."""
    # To the device as bytes: a quarter of what floats would take.
    frames = torch.stack(list(windows)).to(codec.vae.device)
    video = rearrange(frames, "b t h w c -> b c t h w").float() / 127.5 - 1
    return list(codec.encode_video(video).cpu())


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What became of a window.

    Attributes:
        source: its source's name.
        window: its number.
        latent: [C, F, h, w], or None.
        problem: why there is no latent, or None.
    """

    source: str
    window: int
    latent: Tensor | None
    problem: str | None = None


class WindowEncoder:
    """Encodes windows in this process, while a process of its own decodes the next ones.

    Args:
        codec: with its autoencoder.
        settings: of the preparation.
        decoder: that process; the caller ends it.
    """

    def __init__(self, codec: LatentCodec, settings: PrepareSettings, decoder: Decoder) -> None:
        self.codec, self.settings, self._decoder = codec, settings, decoder

    def begin(self, task: Task) -> None:
        """Start to decode a task's windows, behind those of the tasks that are begun."""
        for part in task.parts:
            self._decoder.begin(self._job(part))

    def finish(self, task: Task) -> list[Encoded]:
        """What became of the windows of the oldest task that was begun, in its order."""
        return list(self._encode(task))

    def _job(self, part: Part) -> Job:
        settings, source = self.settings, part.source
        return Job(
            source.path,
            settings.fps,
            settings.caps,
            tuple(source.windows[number] for number in part.windows),
            source.size,
            settings.resize_mode,
            settings.center_crop,
        )

    def _encode(self, task: Task) -> Iterator[Encoded]:
        done: dict[tuple[str, int], Encoded] = {}
        waiting: dict[int, list[tuple[tuple[str, int], Tensor]]] = {}
        for part in task.parts:
            name = part.source.name
            # The results are asked first, and so read to their end: one a window, or a rejection behind the last.
            for frames, number in zip(self._decoder.results(), part.windows, strict=False):
                if isinstance(frames, Rejected):
                    # It was decoded to its end when it was examined.
                    problem = f"{frames}, although it could be decoded before"
                    for missing in range(number, part.windows.stop):
                        done[name, missing] = Encoded(name, missing, None, problem)
                    continue
                batch = waiting.setdefault(len(frames), [])
                batch.append(((name, number), frames))
                if len(batch) == self.settings.batch_size:
                    done |= self._latents(waiting.pop(len(frames)))
        for batch in waiting.values():
            done |= self._latents(batch)
        for part in task.parts:
            for number in part.windows:
                yield done[part.source.name, number]

    def _latents(self, batch: list[tuple[tuple[str, int], Tensor]]) -> dict[tuple[str, int], Encoded]:
        latents = encode_batch(self.codec, [frames for _, frames in batch])
        done = {}
        for ((name, number), _), latent in zip(batch, latents, strict=True):
            finite = bool(torch.isfinite(latent).all())
            problem = None if finite else "the autoencoder gave values that are not finite; try --dtype float32"
            done[name, number] = Encoded(name, number, latent if finite else None, problem)
        return done


class TextCache:
    """Embeddings of captions; equal captions are encoded once and forgotten after their last use.

    Args:
        codec: with its text encoder.
        captions: every caption that will be asked for, as often as it will be at most.
    """

    def __init__(self, codec: LatentCodec, captions: Iterable[str]) -> None:
        self._codec = codec
        self._left = collections.Counter(captions)
        self._known: dict[str, Tensor] = {}

    def take(self, caption: str) -> Float[Tensor, "L D"]:
        """The embedding, fp32 on the CPU."""
        embedding = self._known.get(caption)
        if embedding is None:
            # One at a time: what stands beside a caption in a batch moves its last digits.
            embedding = self._codec.encode_text([caption])[0].cpu()
        self._left[caption] -= 1
        if self._left[caption] > 0:
            self._known[caption] = embedding
        else:
            self._known.pop(caption, None)
        return embedding


def make_sample(
    source: PlannedSource, number: int, latent: Tensor, text: Tensor, settings: PrepareSettings, fingerprint: str
) -> Sample:
    """A window as it is stored, with NVIDIA's fields and ours (FORMAT.md)."""
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
