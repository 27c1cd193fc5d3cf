"""Decoding videos and images with PyAV: rotated, resampled and resized, one frame in memory at a time.

Shapes: T frames, H rows, W columns, 3 colours.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from wan_data.video.buckets import Size
from wan_data.video.limits import Limits
from wan_data.video.media_types import IMAGE_SUFFIXES
from wan_data.video.windows import TimedFrame, Window, resample


class Rejected(ValueError):
    """A source cannot be used; the message continues the sentence "SOURCE: ..."."""


_DEFAULT_LIMITS = Limits()


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """Properties of a source, from decoding it completely.

    Attributes:
        frames: number of frames at the target rate.
        source_frames: number of frames in the file.
        source_fps: average frame rate of the file; 0 for an image.
        height, width: pixels as displayed: rotated, and with square pixels.
        rotation: degrees by which frames are rotated counter-clockwise for display (0, 90, 180 or 270).
    """

    frames: int
    source_frames: int
    source_fps: float
    height: float
    width: float
    rotation: int


def _rotation(frame: av.VideoFrame) -> int:
    rotation = int(frame.rotation) % 360
    if rotation % 90:
        raise Rejected(
            f"its display matrix rotates it by {rotation} degrees; only multiples of 90 degrees are supported"
        )
    return rotation


def _display_size(frame: av.VideoFrame, pixel_aspect: Fraction) -> tuple[float, float]:
    height, width = float(frame.height), float(frame.width * pixel_aspect)
    return (width, height) if _rotation(frame) % 180 else (height, width)


class _Reader:
    """One pass over a file; collects the properties that need a complete pass."""

    def __init__(self, path: Path, limits: Limits, on_frame: Callable[[int], None]) -> None:
        self.path, self.limits, self.on_frame = path, limits, on_frame
        self.decoded = 0
        self.first: av.VideoFrame | None = None
        self.pixel_aspect = Fraction(1)
        self.source_fps = 0.0
        self._last_time = Fraction(0)

    def frames(self) -> Iterator[TimedFrame[av.VideoFrame]]:
        size = self.path.stat().st_size
        if size > self.limits.bytes:
            raise Rejected(f"it has {size} bytes; at most {self.limits.bytes} are read (--max-source-bytes)")
        try:
            with av.open(str(self.path), mode="r", metadata_errors="ignore") as container:
                yield from self._frames(container)
        except av.error.FFmpegError as error:
            raise Rejected(f"it cannot be decoded: {error.strerror or error}") from None
        if not self.decoded:
            raise Rejected("no frame could be decoded from it")

    def _frames(self, container: Any) -> Iterator[TimedFrame[av.VideoFrame]]:
        if not container.streams.video:
            raise Rejected("it has no video stream")
        stream = container.streams.video[0]
        declared, discarded = stream.frames, 0
        if stream.sample_aspect_ratio:
            self.pixel_aspect = Fraction(stream.sample_aspect_ratio)
        if stream.average_rate and self.path.suffix.lower() not in IMAGE_SUFFIXES:
            self.source_fps = float(stream.average_rate)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise Rejected(f"its data are damaged after frame {self.decoded}")
            discarded += packet.is_discard
            for frame in packet.decode():
                yield self._timed(frame, stream.time_base)
        if self.decoded < declared - discarded:
            raise Rejected(f"only {self.decoded} of the {declared} frames that its header declares can be decoded")

    def _timed(self, frame: av.VideoFrame, time_base: Fraction) -> TimedFrame[av.VideoFrame]:
        if frame.is_corrupt:
            raise Rejected(f"its frame {self.decoded} is damaged")
        if frame.width * frame.height > self.limits.pixels:
            raise Rejected(
                f"its frames have {frame.width} x {frame.height} pixels; at most {self.limits.pixels} are read "
                "(--max-source-pixels)"
            )
        if self.decoded == self.limits.frames:
            raise Rejected(
                f"it has more than the {self.limits.frames} frames that are read at most (--max-source-frames)"
            )
        if self.first is None:
            self.first = frame
        elif (frame.width, frame.height) != (self.first.width, self.first.height):
            raise Rejected(
                f"its size changes at frame {self.decoded} from {self.first.width} x {self.first.height} "
                f"to {frame.width} x {frame.height}"
            )
        if frame.pts is None and self.decoded:
            raise Rejected(f"its frame {self.decoded} has no presentation time")
        base = frame.time_base or time_base
        timed = TimedFrame((frame.pts or 0) * base, (frame.duration or 0) * base, frame)
        self.decoded += 1
        self.on_frame(self.decoded)
        return timed


def _resampled(reader: _Reader, fps: Fraction) -> Iterator[av.VideoFrame]:
    try:
        yield from resample(reader.frames(), fps)
    except Rejected:
        raise
    except ValueError as error:
        raise Rejected(str(error)) from None


def _ignore(decoded: int) -> None:
    """Default of ``on_frame``."""


def probe(
    path: Path, fps: Fraction, *, limits: Limits = _DEFAULT_LIMITS, on_frame: Callable[[int], None] = _ignore
) -> ClipInfo:
    """Decode a source to its end and return its properties.

    Args:
        path: a video or an image.
        fps: the target rate.
        limits: limits of the source.
        on_frame: called after each decoded frame with the number of frames so far.

    Raises:
        Rejected: the source exceeds a limit, cannot be decoded completely, or disagrees with its header.
    """
    reader = _Reader(path, limits, on_frame)
    frames = sum(1 for _ in _resampled(reader, fps))
    assert reader.first is not None, "frames() refuses a file without frames"
    height, width = _display_size(reader.first, reader.pixel_aspect)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        frames = 1
    return ClipInfo(frames, reader.decoded, reader.source_fps, height, width, _rotation(reader.first))


def to_size(
    frame: av.VideoFrame, size: Size, *, resize_mode: str, center_crop: bool, pixel_aspect: Fraction = Fraction(1)
) -> UInt8[Tensor, "H W 3"]:
    """Convert a frame to RGB of a given size, rotated as it is displayed.

    Args:
        frame: as decoded.
        size: of the result.
        resize_mode: ``bicubic``, ``bilinear`` (both antialiased) or ``nearest``.
        center_crop: keep the aspect ratio and crop the margins; otherwise stretch.
        pixel_aspect: width over height of a pixel of the file.
    """
    # ascontiguousarray: rot90 returns a view with negative strides, which torch does not support.
    rgb = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), _rotation(frame) // 90))
    image = rearrange(torch.from_numpy(rgb), "h w c -> 1 c h w")
    height, width = size.height, size.width
    if center_crop:
        shown_height, shown_width = _display_size(frame, pixel_aspect)
        scale = max(size.height / shown_height, size.width / shown_width)
        # round() may give one pixel less than the cropped size
        height, width = max(size.height, round(shown_height * scale)), max(size.width, round(shown_width * scale))
    if image.shape[2:] != (height, width):
        smooth = resize_mode != "nearest"
        resized = torch.nn.functional.interpolate(
            image.float(), (height, width), mode=resize_mode, antialias=smooth, align_corners=False if smooth else None
        )
        image = resized.round_().clamp_(0, 255).to(torch.uint8)
    top, left = (height - size.height) // 2, (width - size.width) // 2
    return rearrange(image[:, :, top : top + size.height, left : left + size.width], "1 c h w -> h w c").contiguous()


def read_windows(
    path: Path,
    windows: Sequence[Window],
    size: Size,
    *,
    fps: Fraction,
    resize_mode: str,
    center_crop: bool,
    limits: Limits = _DEFAULT_LIMITS,
    on_frame: Callable[[int], None] = _ignore,
) -> Iterator[UInt8[Tensor, "T H W 3"]]:
    """Yield the frames of each window; one window is in memory at a time.

    Args:
        path: a video or an image that ``probe`` has accepted.
        windows: in order, without overlap.
        size: of the returned frames.
        fps: the target rate.
        resize_mode, center_crop: as in ``to_size``.
        limits, on_frame: as in ``probe``.

    Raises:
        Rejected: the file has changed since it was probed.
    """
    reader = _Reader(path, limits, on_frame)
    frames = enumerate(_resampled(reader, fps))
    for window in windows:
        out = torch.empty(window.length, size.height, size.width, 3, dtype=torch.uint8)
        filled, last, resized = 0, None, None
        for tick, frame in frames:
            if tick < window.start:
                continue
            if frame is not last or resized is None:  # a repeated frame is resized once
                resized = to_size(
                    frame, size, resize_mode=resize_mode, center_crop=center_crop, pixel_aspect=reader.pixel_aspect
                )
            out[filled], last, filled = resized, frame, filled + 1
            if filled == window.length:
                break
        if filled < window.length:
            raise Rejected(f"it had {window.stop} frames when it was probed and now has fewer: was it changed?")
        yield out
