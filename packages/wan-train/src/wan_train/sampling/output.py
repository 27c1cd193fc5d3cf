"""Files of sampled videos, their records, and videos in TensorBoard and Weights & Biases.

Shapes: T frames, H rows, W columns.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wan_model.codec.latent_codec import LatentCodec
from wan_model.codec.video_encoding import Frames, encode_mp4_beside, encode_png, to_frames
from wan_model.system.files import append_line, atomic_write, naming
from wan_train.checkpoint.sample_videos import SAMPLES, records_path, samples_folder, suffix_of
from wan_train.sampling.latents import SamplePlan, SampleRequest

# Pixels of the longer side of the pictures for TensorBoard, which has no videos, only animated GIFs.
_LARGEST_GIF = 320


class VideoWriter:
    """Decodes and writes the videos of a step.

    Args:
        run: the run's folder.
        plan: the videos.
        codec: the decoder, on the CPU; it is moved to the device only while it decodes.
        device: that decodes.
        fps: frames a second.
        weights: ``weights`` or ``ema``, for the records.
    """

    def __init__(
        self, run: Path, plan: SamplePlan, codec: LatentCodec, device: torch.device, *, fps: int, weights: str
    ) -> None:
        self._run, self._plan, self._codec = run, plan, codec
        self._device, self._fps, self._weights = device, fps, weights
        self._written = 0

    def write(self, step: int, latents: Sequence[Tensor], state: Any) -> tuple[int, Exception | None]:
        """Write the videos, up to the first failure.

        Args:
            step: the optimizer steps done.
            latents: [C, F, h, w] of each.
            state: Megatron-Bridge's, which has the loggers of this rank.

        Returns:
            The number of videos that stand, with their records; and what failed, such as that a latent is not finite,
            or a file cannot be written.
        """
        self._written = 0
        try:
            self._write_all(step, latents, state)
        except Exception as error:
            return self._written, error
        return self._written, None

    def _write_all(self, step: int, latents: Sequence[Tensor], state: Any) -> None:
        decoder = self._codec.decoder
        assert decoder is not None, "it was loaded"
        decoder.to(self._device)
        try:
            for request, latent in zip(self._plan.requests, latents, strict=True):
                self._write_one(step, request, latent, state)
        finally:
            decoder.to("cpu")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # of sizes that training has no use for

    def _write_one(self, step: int, request: SampleRequest, latent: Tensor, state: Any) -> None:
        if not bool(torch.isfinite(latent).all()):
            raise ValueError(f"the latent of the video {request.name} is not finite")
        single = latent.shape[1] == 1
        path = samples_folder(self._run, step) / f"{request.name}{suffix_of(latent.shape[1])}"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept: list[np.ndarray] | None = [] if state.tensorboard_logger else None
        record = self._record(step, request, path)
        with naming(path), atomic_write(path, unique=True) as file:
            pieces = self._frames(latent, kept)
            if single:
                ((frame,),) = pieces
                file.write(encode_png(frame, record))
            else:
                encode_mp4_beside(file, pieces, self._fps, record)
        append_line(records_path(self._run), json.dumps(record, ensure_ascii=False))
        self._written += 1
        tag = f"{SAMPLES}/{request.name}"
        if kept is not None:
            add_gif(state.tensorboard_logger, tag, np.stack(kept), self._fps, step)
        if state.wandb_logger:
            kind = state.wandb_logger.Image if single else state.wandb_logger.Video
            state.wandb_logger.log({tag: kind(str(path), caption=request.caption)}, step)

    def _frames(self, latent: Tensor, kept: list[np.ndarray] | None) -> Iterator[Frames]:
        for piece in self._codec.decode_frames(latent):
            frames = to_frames(piece)
            if kept is not None:
                kept.extend(frames)
            yield frames

    def _record(self, step: int, request: SampleRequest, path: Path) -> dict[str, Any]:
        settings = self._plan.settings
        return {
            "step": step,
            "name": request.name,
            "caption": request.caption,
            "seed": request.seed,
            "weights": self._weights,
            "file": path.relative_to(self._run).as_posix(),
            "steps": settings.steps,
            "shift": settings.shift,
            "guidance": settings.guidance,
            "solver": settings.solver,
            "negative_prompt": settings.negative_prompt,
        }


def add_gif(writer: Any, tag: str, frames: Frames, fps: int, step: int) -> None:
    """Add an animated GIF to TensorBoard; torch's ``add_video`` does the same with the package moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

    pictures = [Image.fromarray(frame) for frame in frames]
    for picture in pictures:
        picture.thumbnail((_LARGEST_GIF, _LARGEST_GIF))
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
    )
    width, height = pictures[0].size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
