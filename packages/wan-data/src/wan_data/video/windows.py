"""Resampling frames to a target rate, and cutting a clip into windows of 4n+1 frames."""

import dataclasses
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Generic, TypeVar

from wan_data.video.limits import Limits
from wan_model.video_shape import trim_frames

WINDOW_KINDS = ("consecutive", "first", "whole")
# Matroska and Flash round times to milliseconds: a frame may appear this much after its tick.
TOLERANCE = Fraction(1, 1000)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TimedFrame(Generic[T]):
    """A decoded frame.

    Attributes:
        time: presentation time in seconds.
        duration: in seconds; 0 if the file does not specify it.
        image: the frame itself.
    """

    time: Fraction
    duration: Fraction
    image: T


@dataclasses.dataclass(frozen=True)
class Window:
    """A range of resampled frames, from ``start`` to ``stop`` exclusive, counted at the target rate."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of frames."""
        return self.stop - self.start


def resample(frames: Iterable[TimedFrame[T]], fps: Fraction, *, longest: int = Limits.still) -> Iterator[T]:
    """Yield the frame displayed at each tick k/fps after the first frame, by presentation time.

    A frame is displayed from its own time until that of the next frame; the last one for its own duration, or as long
    as the frame before it if the file gives none. A variable frame rate thus becomes constant, a higher rate drops
    frames and a lower rate repeats them. Times may be rounded by a millisecond. One frame is in memory at a time.

    Args:
        frames: in order of presentation.
        fps: ticks per second.
        longest: seconds that a frame may be displayed.

    Raises:
        ValueError: a presentation time is less than the one before, or more than ``longest`` after it.
    """
    previous: TimedFrame[T] | None = None
    first, gap, tick = Fraction(0), Fraction(0), 0
    for frame in frames:
        if previous is None:
            first = frame.time
        else:
            gap = frame.time - previous.time
            if gap < 0:
                raise ValueError(f"its presentation times run backwards at {float(frame.time):.3f} s")
            if gap > longest:
                raise ValueError(
                    f"its frame at {float(previous.time):.3f} s stays for {float(gap):.0f} s; "
                    f"more than {longest} s indicates damaged presentation times (--max-source-still)"
                )
            while first + tick / fps + TOLERANCE < frame.time:
                yield previous.image
                tick += 1
        previous = frame
    if previous is not None:
        # At least one tick: a clip of a single frame is an image.
        end = previous.time + (min(previous.duration, Fraction(longest)) or gap)
        while tick == 0 or first + tick / fps + TOLERANCE < end:
            yield previous.image
            tick += 1


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The allowed numbers of frames of a window, 4n+1 each.

    Attributes:
        shortest, longest: the bounds.
        only: the allowed lengths between the bounds; None allows all.
    """

    shortest: int
    longest: int
    only: tuple[int, ...] | None = None

    def at_most(self, frames: int) -> int:
        """The largest allowed length of at most ``frames``; 0 if there is none."""
        if self.only is not None:
            return max((length for length in self.only if length <= frames), default=0)
        length = min(self.longest, trim_frames(frames))
        return length if length >= self.shortest else 0


def plan_windows(total: int, kind: str, lengths: Lengths) -> list[Window]:
    """Cut a clip into windows.

    Args:
        total: number of resampled frames of the clip.
        kind: ``whole`` (the clip without the frames beyond the largest allowed length), ``first`` (the first window) or
            ``consecutive`` (adjacent windows without overlap; the rest at the end becomes a shorter window, or is
            dropped if it is too short).
        lengths: allowed lengths of windows.

    Returns:
        Windows in order.

    Raises:
        ValueError: no window fits, or a ``whole`` clip is too long; the message names the option to change.
    """
    if kind not in WINDOW_KINDS:
        raise ValueError(f"windows are {kind!r}; expected one of {', '.join(WINDOW_KINDS)}")
    if not lengths.at_most(total):
        raise ValueError(f"it has {total} frames at the target rate; the shortest window is {lengths.shortest}")
    if kind == "whole":
        if trim_frames(total) > lengths.longest:
            raise ValueError(
                f"it has {total} frames at the target rate, more than the longest window of {lengths.longest}: "
                "raise --frames, or cut with --windows first or consecutive"
            )
        return [Window(0, lengths.at_most(total))]
    if kind == "first":
        return [Window(0, lengths.at_most(total))]
    windows, start = [], 0
    while length := lengths.at_most(total - start):
        windows.append(Window(start, start + length))
        start += length
    return windows
