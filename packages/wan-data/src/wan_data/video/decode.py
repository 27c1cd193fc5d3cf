"""Reading videos and images with PyAV: rotation applied, resampled, resized, one frame in memory at a time.

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
from wan_data.video.limits import Caps
from wan_data.video.media_types import IMAGE_SUFFIXES
from wan_data.video.windows import TimedFrame, Window, resample

RESIZE_MODES = ("bicubic", "bilinear", "nearest")


class Rejected(ValueError):
    """A source that cannot be used; the message completes the sentence "SOURCE: ..."."""


_NO_MORE_THAN = Caps()


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """What a full decode of a source found.

    Attributes:
        frames: frames at the target rate.
        source_frames: frames in the file.
        source_fps: the file's average frames a second; 0 for an image.
        height, width: pixels as displayed: rotated, and with square pixels.
        rotation: degrees that frames are turned counter-clockwise for display (0, 90, 180 or 270).
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
        raise Rejected(f"its display matrix turns it by {rotation} degrees; only quarter turns can be applied")
    return rotation


def _display_size(frame: av.VideoFrame, pixel_aspect: Fraction) -> tuple[float, float]:
    height, width = float(frame.height), float(frame.width * pixel_aspect)
    return (width, height) if _rotation(frame) % 180 else (height, width)


class _Reader:
    """One pass over a file; collects what only a full pass can tell."""

    def __init__(self, path: Path, caps: Caps, on_frame: Callable[[int], None]) -> None:
        self.path, self.caps, self.on_frame = path, caps, on_frame
        self.decoded = 0
        self.first: av.VideoFrame | None = None
        self.pixel_aspect = Fraction(1)
        self.source_fps = 0.0
        self._last_time = Fraction(0)

    def frames(self) -> Iterator[TimedFrame[av.VideoFrame]]:
        size = self.path.stat().st_size
        if size > self.caps.bytes:
            raise Rejected(f"it has {size} bytes; at most {self.caps.bytes} are read (--max-source-bytes)")
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
        promised, discarded = stream.frames, 0
        if stream.sample_aspect_ratio:
            self.pixel_aspect = Fraction(stream.sample_aspect_ratio)
        if stream.average_rate and self.path.suffix.lower() not in IMAGE_SUFFIXES:
            self.source_fps = float(stream.average_rate)
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise Rejected(f"its data are damaged behind frame {self.decoded}")
            discarded += packet.is_discard
            for frame in packet.decode():
                yield self._timed(frame, stream.time_base)
        if self.decoded < promised - discarded:
            raise Rejected(f"only {self.decoded} of the {promised} frames that its header promises can be decoded")

    def _timed(self, frame: av.VideoFrame, time_base: Fraction) -> TimedFrame[av.VideoFrame]:
        if frame.is_corrupt:
            raise Rejected(f"its frame {self.decoded} is damaged")
        if frame.width * frame.height > self.caps.pixels:
            raise Rejected(
                f"its frames have {frame.width} x {frame.height} pixels; at most {self.caps.pixels} are read "
                "(--max-source-pixels)"
            )
        if self.decoded == self.caps.frames:
            raise Rejected(
                f"it has more than the {self.caps.frames} frames that are read at most (--max-source-frames)"
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
    """Nobody watches."""


def probe(
    path: Path, fps: Fraction, *, caps: Caps = _NO_MORE_THAN, on_frame: Callable[[int], None] = _ignore
) -> ClipInfo:
    """Decode a source to its end and say what it is.

    Args:
        path: a video or an image.
        fps: the target rate.
        caps: what is read at most.
        on_frame: told after each decoded frame how many there were.

    Raises:
        Rejected: it cannot be decoded fully, or its header is untrue.
    """
    reader = _Reader(path, caps, on_frame)
    frames = sum(1 for _ in _resampled(reader, fps))
    assert reader.first is not None, "frames() refuses a file without frames"
    height, width = _display_size(reader.first, reader.pixel_aspect)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        frames = 1
    return ClipInfo(frames, reader.decoded, reader.source_fps, height, width, _rotation(reader.first))


def to_size(
    frame: av.VideoFrame, size: Size, *, resize_mode: str, center_crop: bool, pixel_aspect: Fraction = Fraction(1)
) -> UInt8[Tensor, "H W 3"]:
    """A frame as RGB of a given size, turned as it is displayed.

    Args:
        frame: as decoded.
        size: what is returned.
        resize_mode: ``bicubic``, ``bilinear`` (both antialiased) or ``nearest``.
        center_crop: keep the aspect ratio and cut the overhanging margins; otherwise stretch.
        pixel_aspect: width over height of a pixel of the file.
    """
    # ascontiguousarray: a quarter turn is a view with negative strides, which torch cannot take.
    rgb = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), _rotation(frame) // 90))
    image = rearrange(torch.from_numpy(rgb), "h w c -> 1 c h w")
    height, width = size.height, size.width
    if center_crop:
        shown_height, shown_width = _display_size(frame, pixel_aspect)
        scale = max(size.height / shown_height, size.width / shown_width)
        # round() may fall one short of the size that is to be cut out
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
    caps: Caps = _NO_MORE_THAN,
    on_frame: Callable[[int], None] = _ignore,
) -> Iterator[UInt8[Tensor, "T H W 3"]]:
    """The frames of each window in turn, holding one window in memory.

    Args:
        path: a video or an image that ``probe`` has accepted.
        windows: in order, without overlap.
        size: of the frames returned.
        fps: the target rate.
        resize_mode, center_crop: as in ``to_size``.
        caps, on_frame: as in ``probe``.

    Raises:
        Rejected: the file is no longer what it was.
    """
    reader = _Reader(path, caps, on_frame)
    frames = enumerate(_resampled(reader, fps))
    for window in windows:
        out = torch.empty(window.length, size.height, size.width, 3, dtype=torch.uint8)
        filled, last, resized = 0, None, None
        for tick, frame in frames:
            if tick < window.start:
                continue
            if frame is not last or resized is None:  # a frame that stays on screen is resized once
                resized = to_size(
                    frame, size, resize_mode=resize_mode, center_crop=center_crop, pixel_aspect=reader.pixel_aspect
                )
            out[filled], last, filled = resized, frame, filled + 1
            if filled == window.length:
                break
        if filled < window.length:
            raise Rejected(f"it had {window.stop} frames when it was examined and now has fewer: was it changed?")
        yield out
