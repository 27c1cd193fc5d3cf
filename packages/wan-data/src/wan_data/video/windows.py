"""Time: which frame is shown at each tick of the target rate, and how a clip is cut into windows of 4n+1 frames."""

import dataclasses
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Generic, TypeVar

WINDOW_KINDS = ("consecutive", "first", "whole")
TEMPORAL_STRIDE = 4
# A frame that stays on screen longer than this belongs to a file whose times are broken.
LONGEST_FRAME_SECONDS = 60
# Matroska and Flash write times in whole milliseconds: a frame of a tick may seem to come this much after it.
TOLERANCE = Fraction(1, 1000)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TimedFrame(Generic[T]):
    """A decoded frame.

    Attributes:
        time: seconds at which it is shown.
        duration: seconds it is meant to stay; 0 where the file does not say.
        image: whatever the frame is.
    """

    time: Fraction
    duration: Fraction
    image: T


@dataclasses.dataclass(frozen=True)
class Window:
    """A run of resampled frames: ``start`` included, ``stop`` excluded, counted at the target rate."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Frames in it."""
        return self.stop - self.start


def resample(frames: Iterable[TimedFrame[T]], fps: Fraction) -> Iterator[T]:
    """Yield the frame on screen at each tick k/fps after the first frame, by presentation time.

    A frame is on screen from its own time until the next one's; the last one for its own duration, or for as long as
    the frame before it where the file gives none. So a variable frame rate becomes a constant one, a higher rate drops
    frames and a lower one repeats them. A millisecond of rounding is forgiven. Only one frame is held at a time.

    Args:
        frames: in order of presentation.
        fps: ticks a second.

    Raises:
        ValueError: times that run backwards or stand still for a minute.
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
            if gap > LONGEST_FRAME_SECONDS:
                raise ValueError(
                    f"its frame at {float(previous.time):.3f} s stays for {float(gap):.0f} s; "
                    f"more than {LONGEST_FRAME_SECONDS} s is taken for broken presentation times"
                )
            while first + tick / fps + TOLERANCE < frame.time:
                yield previous.image
                tick += 1
        previous = frame
    if previous is not None:
        # At least one tick: a clip of a single frame is an image.
        end = previous.time + (min(previous.duration, Fraction(LONGEST_FRAME_SECONDS)) or gap)
        while tick == 0 or first + tick / fps + TOLERANCE < end:
            yield previous.image
            tick += 1


def trim(frames: int) -> int:
    """The largest 4n+1 that is at most ``frames`` (0 for 0): the autoencoder would silently drop the rest."""
    return 0 if frames < 1 else frames - (frames - 1) % TEMPORAL_STRIDE


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Which numbers of frames a window may have, 4n+1 each.

    Attributes:
        shortest, longest: the bounds.
        only: the lengths between them that are allowed; None for all.
    """

    shortest: int
    longest: int
    only: tuple[int, ...] | None = None

    def at_most(self, frames: int) -> int:
        """The largest length that ``frames`` frames make; 0 if there is none."""
        if self.only is not None:
            return max((length for length in self.only if length <= frames), default=0)
        length = min(self.longest, trim(frames))
        return length if length >= self.shortest else 0


def plan_windows(total: int, kind: str, lengths: Lengths) -> list[Window]:
    """Cut a clip.

    Args:
        total: resampled frames of the clip.
        kind: ``whole`` (all of it, but for the frames that its length exceeds an allowed one by), ``first`` (its first
            window) or ``consecutive`` (one behind another without overlap; what is left at the end makes a shorter
            window, or is dropped if it is too short for any).
        lengths: that windows may have.

    Returns:
        Windows in order.

    Raises:
        ValueError: no window of that length fits; the message says what to change.
    """
    if kind not in WINDOW_KINDS:
        raise ValueError(f"windows are {kind!r}; expected one of {', '.join(WINDOW_KINDS)}")
    if not lengths.at_most(total):
        raise ValueError(f"it has {total} frames at the target rate; the shortest window is {lengths.shortest}")
    if kind == "whole":
        if trim(total) > lengths.longest:
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
