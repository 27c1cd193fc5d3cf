"""Decoding videos and images as they are displayed: resampled and resized, one frame in memory at a time.

Shapes: T frames, H rows, W columns, 3 colours.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from wan_data.video.buckets import Size
from wan_data.video.containers.video_reader import VideoReader
from wan_data.video.display.options import DisplayOptions
from wan_data.video.display.picture import Picture, Rgb
from wan_data.video.images import read_image
from wan_data.video.limits import Limits
from wan_data.video.media_types import IMAGE_SUFFIXES
from wan_data.video.source_file import Rejected, open_source
from wan_data.video.windows import TimedFrame, Window, resample

_DEFAULT_LIMITS = Limits()
_DEFAULT_DISPLAY = DisplayOptions()


@dataclasses.dataclass(frozen=True)
class ClipInfo:
    """Properties of a source, from decoding it completely.

    Attributes:
        frames: number of frames at the target rate.
        source_frames: number of frames in the file.
        source_fps: average frame rate of the file; 0 for an image.
        height, width: pixels as displayed: oriented, and with square pixels.
        orientation: in which it is displayed, as EXIF numbers it (1 to 8; 1 is as stored).
    """

    frames: int
    source_frames: int
    source_fps: float
    height: float
    width: float
    orientation: int


@runtime_checkable
class Measuring(Protocol):
    """What sees the frames of a clip while it is decoded: ``wan_data.curation.measuring_pass.MeasuringPass``."""

    def add(self, frame: Rgb, number: int) -> None:
        """The next frame at the target rate; the same object again if it is only repeated."""

    def result(self) -> Any:
        """What was measured, after the last frame."""


class _Source:
    """One pass over a source, an image or a video."""

    def __init__(self, path: Path, limits: Limits, display: DisplayOptions, on_frame: Callable[[int], None]) -> None:
        self.path, self.limits, self.on_frame = path, limits, on_frame
        self.display = display
        self.frames = 0
        self.fps = 0.0
        self.first: Picture | None = None
        self.orientation = 1

    def resampled(self, fps: Fraction) -> Iterator[Picture]:
        """The pictures at the target rate."""
        with contextlib.closing(self._timed()) as timed:
            try:
                yield from resample(timed, fps, longest=self.limits.still)
            except Rejected:
                raise
            except ValueError as error:
                raise Rejected(str(error)) from None

    def _timed(self) -> Generator[TimedFrame[Picture], None, None]:
        with open_source(self.path, self.limits) as file:
            if self.path.suffix.lower() in IMAGE_SUFFIXES:
                picture = self.first = read_image(file, self.limits, self.display)
                self.frames = 1
                yield TimedFrame(Fraction(0), Fraction(0), picture)
                return
            reader = VideoReader(file, self.limits, self.display, self.on_frame)
            for frame in reader.frames():
                if self.first is None:
                    self.first, self.fps, self.orientation = frame.image, reader.fps, reader.orientation.exif
                self.frames = reader.decoded
                yield frame


def _ignore(decoded: int) -> None:
    """Default of ``on_frame``."""


def probe(
    path: Path,
    fps: Fraction,
    *,
    limits: Limits = _DEFAULT_LIMITS,
    display: DisplayOptions = _DEFAULT_DISPLAY,
    on_frame: Callable[[int], None] = _ignore,
    measuring: Measuring | None = None,
) -> ClipInfo:
    """Decode a source to its end and return its properties.

    Args:
        path: a video or an image.
        fps: the target rate.
        limits: limits of the source.
        display: how it is displayed.
        on_frame: called after each decoded frame with the number of frames so far.
        measuring: is given every frame at the target rate, upright, with colours that are a few levels off.

    Raises:
        Rejected: the source exceeds a limit, cannot be decoded completely, or disagrees with its header.
    """
    source = _Source(path, limits, display, on_frame)
    frames, last, pixels = 0, None, None
    for picture in source.resampled(fps):
        if measuring is not None:
            if picture is not last or pixels is None:
                last, pixels = picture, picture.quick_rgb()
            measuring.add(pixels, frames)
        frames += 1
    assert source.first is not None, "a file without frames is refused"
    return ClipInfo(frames, source.frames, source.fps, source.first.height, source.first.width, source.orientation)


def to_size(picture: Picture, size: Size, *, resize_mode: str, center_crop: bool) -> UInt8[Tensor, "H W 3"]:
    """Resize a picture, with its pixel aspect.

    Args:
        picture: as it is displayed.
        size: of the result.
        resize_mode: ``bicubic``, ``bilinear`` (both antialiased) or ``nearest``.
        center_crop: keep the aspect ratio and crop the margins; otherwise stretch.
    """
    image = rearrange(torch.from_numpy(picture.rgb()), "h w c -> 1 c h w")
    height, width = size.height, size.width
    if center_crop:
        scale = max(size.height / picture.height, size.width / picture.width)
        # round() may give one pixel less than the cropped size
        height, width = max(size.height, round(picture.height * scale)), max(size.width, round(picture.width * scale))
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
    display: DisplayOptions = _DEFAULT_DISPLAY,
    on_frame: Callable[[int], None] = _ignore,
) -> Iterator[UInt8[Tensor, "T H W 3"]]:
    """Yield the frames of each window; one window is in memory at a time.

    Args:
        path: a video or an image that ``probe`` has accepted.
        windows: in order, without overlap.
        size: of the returned frames.
        fps: the target rate.
        resize_mode, center_crop: as in ``to_size``.
        limits, display, on_frame: as in ``probe``.

    Raises:
        Rejected: the file has changed since it was probed.
    """
    frames = enumerate(_Source(path, limits, display, on_frame).resampled(fps))
    for window in windows:
        out = torch.empty(window.length, size.height, size.width, 3, dtype=torch.uint8)
        filled, last, resized = 0, None, None
        for tick, frame in frames:
            if tick < window.start:
                continue
            if frame is not last or resized is None:  # a repeated frame is resized once
                resized = to_size(frame, size, resize_mode=resize_mode, center_crop=center_crop)
            out[filled], last, filled = resized, frame, filled + 1
            if filled == window.length:
                break
        if filled < window.length:
            raise Rejected(f"it had {window.stop} frames when it was probed and now has fewer: was it changed?")
        yield out
