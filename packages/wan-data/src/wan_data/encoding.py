"""From planned sources to samples: windows to latents, captions to embeddings, in one process or several.

Shapes: T frames, H rows, W columns, 3 colours; a latent is [C, F, h, w]; L text tokens, D text width.
"""

import collections
import concurrent.futures
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from wan_data.decode import read_windows
from wan_data.settings import PrepareSettings
from wan_data.shards import Sample, sample_key
from wan_data.sources import PlannedSource
from wan_model.codec import LatentCodec

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


def encode_frames(codec: LatentCodec, frames: UInt8[Tensor, "T H W 3"]) -> Float[Tensor, "C F h w"]:
    """The latent of a window, fp32 on the CPU.

    Raises:
        ValueError: the autoencoder gave values that are not finite.
    """
    video = rearrange(frames, "t h w c -> 1 c t h w").float() / 127.5 - 1
    latent = codec.encode_video(video)[0].cpu()
    if not bool(torch.isfinite(latent).all()):
        raise ValueError("the autoencoder gave values that are not finite; try --dtype float32")
    return latent


def _latents_of(codec: LatentCodec, source: PlannedSource, settings: PrepareSettings) -> Iterator[Tensor]:
    windows = read_windows(
        source.path,
        source.windows,
        source.size,
        fps=settings.fps,
        resize_mode=settings.resize_mode,
        center_crop=settings.center_crop,
    )
    for frames in windows:
        yield encode_frames(codec, frames)


class TextCache:
    """Embeddings of captions; equal captions are encoded once and forgotten after their last use.

    Args:
        codec: with its text encoder.
        captions: every caption that will be asked for, as often as it will be.
    """

    def __init__(self, codec: LatentCodec, captions: Sequence[str]) -> None:
        self._codec = codec
        self._left = collections.Counter(captions)
        self._known: dict[str, Tensor] = {}
        self.encoded = 0

    def take(self, caption: str) -> Float[Tensor, "L D"]:
        """The embedding, fp32 on the CPU."""
        embedding = self._known.get(caption)
        if embedding is None:
            embedding = self._codec.encode_text([caption])[0].cpu()
            self.encoded += 1
        self._left[caption] -= 1
        if self._left[caption] > 0:
            self._known[caption] = embedding
        else:
            self._known.pop(caption, None)
        return embedding


# -- several processes ------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}  # of a worker process: its codec, loaded once


def _start_worker(model: str, settings: PrepareSettings, device: str, processes: int, number: Any) -> None:
    with number.get_lock():
        place, number.value = number.value, number.value + 1
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    _worker["codec"] = load_codec(model, settings, choose_device(device, place), vae=True, text=False)


def _encode_source(source: PlannedSource, settings: PrepareSettings) -> list[Any]:
    # As arrays: tensors would travel through shared memory, which containers keep small.
    return [latent.numpy() for latent in _latents_of(_worker["codec"], source, settings)]


class SourceEncoder:
    """Latents of sources, in the order of the sources, whatever the number of processes.

    Args:
        model: folder or hub id.
        settings: of the preparation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        processes: 1 encodes here, with ``codec``; more start that many, each with an autoencoder of its own.
        codec: with its autoencoder where ``processes`` is 1.
    """

    def __init__(self, model: str, settings: PrepareSettings, device: str, processes: int, codec: LatentCodec) -> None:
        self.model, self.settings, self.device, self.processes, self.codec = model, settings, device, processes, codec
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "SourceEncoder":
        """Start the processes, if there are to be several."""
        if self.processes > 1:
            # spawn: a forked copy of a process that has used CUDA or threads may hang.
            context = multiprocessing.get_context("spawn")
            arguments = (self.model, self.settings, self.device, self.processes, context.Value("i", 0))
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.processes, mp_context=context, initializer=_start_worker, initargs=arguments
            )
        return self

    def __exit__(self, *error: object) -> None:
        """End them; what they have not begun is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def latents(self, sources: Sequence[PlannedSource]) -> Iterator[tuple[PlannedSource, int, Tensor]]:
        """Each source's windows in turn: the source, the window's number, its latent."""
        if self._pool is None:
            for source in sources:
                for number, latent in enumerate(_latents_of(self.codec, source, self.settings)):
                    yield source, number, latent
            return
        waiting: collections.deque[tuple[PlannedSource, Any]] = collections.deque()
        rest = iter(sources)
        while True:
            # Only so many ahead: what is done waits in memory for its turn.
            for source in itertools.islice(rest, 2 * self.processes - len(waiting)):
                waiting.append((source, self._pool.submit(_encode_source, source, self.settings)))
            if not waiting:
                return
            source, future = waiting.popleft()
            for number, array in enumerate(future.result()):
                yield source, number, torch.from_numpy(array)


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
