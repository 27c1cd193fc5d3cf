"""Scene cuts, found by PySceneDetect in the frames that are decoded anyway, and windows that cross none.

Shapes: H rows, W columns, 3 colours.
"""

import collections
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jaxtyping import UInt8

from wan_data.curation.libraries import frame_timecode, opencv, scene_detectors
from wan_data.curation.measures import SCENE_KINDS
from wan_data.video.windows import Lengths, Window, plan_windows

Rgb = UInt8[np.ndarray, "H W 3"]

# Frames are compared at this width, as by PySceneDetect's own SceneManager.
_WIDTH = 256
# Frames before and after each whose scores the adaptive detector averages: PySceneDetect's default.
_NEIGHBOURS = 2
# A picture that is back after no more than this was interrupted by a flash.
_FLASH_SECONDS = Fraction(1, 5)
# A picture that differs less is the same: PySceneDetect's least change of an adaptive cut.
_SAME = 15.0
# A picture that is repeated for this long stands still; for less, the source has a lower rate.
_STILL_SECONDS = Fraction(1, 4)


class CutDetector:
    """Finds the hard cuts of a clip, of which it is given one frame after the other.

    ``content`` is PySceneDetect's ``ContentDetector``: a cut changes hue, saturation and brightness by at least 27
    levels, in the mean. ``adaptive`` is its ``AdaptiveDetector``: a cut changes them by at least 15 levels, and three
    times as much as the mean of two frames before and two after it, so that fast motion is no cut. Both have its
    defaults, except for these:

    - a scene may be as short as one frame, and the first and the last frame may be cuts;
    - a change is no cut if the picture before it is back within 0.2 s: a flash;
    - a frame that is repeated because the source has a lower rate is left out, unless it is shown for 0.25 s.

    Fades and dissolves are found by neither; one to full black may have a cut where the black begins or ends. In memory
    are the pictures of 0.2 s, 256 pixels wide, and the cuts.

    Args:
        kind: ``content`` or ``adaptive``.
        fps: the rate of the frames.

    Raises:
        ValueError: another kind, or PySceneDetect is not installed.
    """

    def __init__(self, kind: str, fps: Fraction) -> None:
        if kind not in SCENE_KINDS[1:]:
            raise ValueError(f"scene cuts are found by {kind!r}; expected one of {', '.join(SCENE_KINDS[1:])}")
        detectors, timecode = scene_detectors(), frame_timecode()
        self._neighbours = _NEIGHBOURS if kind == "adaptive" else 0
        self._detector: Any = (
            detectors.AdaptiveDetector(min_scene_len=0, window_width=_NEIGHBOURS)
            if kind == "adaptive"
            else detectors.ContentDetector(min_scene_len=0)
        )
        self._timecode = lambda place: timecode(place, fps)
        self._flash = math.floor(_FLASH_SECONDS * fps)
        self._still = max(2, math.ceil(_STILL_SECONDS * fps))
        # The frame of now: the object, its number and for how many frames it is shown.
        self._frame: np.ndarray | None = None
        self._number, self._shown = -1, 0
        # PySceneDetect numbers the pictures that it is given; here are the numbers of their frames.
        self._given = 0
        self._recent: collections.deque[tuple[int, int, np.ndarray]] = collections.deque(maxlen=self._delay + 2)
        self._changes: list[int] = []
        self._cuts: set[int] = set()

    @property
    def _delay(self) -> int:
        # Pictures after a change until all is known about it.
        return self._flash + self._neighbours

    def add(self, frame: Rgb, number: int) -> None:
        """Add the next frame.

        Args:
            frame: as it is displayed. A frame that is only repeated is the same object again.
            number: at the target rate, from 0, without gaps.
        """
        assert number == self._number + 1, f"frame {number} came after {self._number}"
        self._number = number
        if frame is self._frame:
            self._shown += 1
            return
        if self._shown >= self._still:
            self._repeat(self._neighbours)
        picture = _small(frame)
        self._give(number, picture)
        if self._frame is None:
            self._repeat(self._neighbours)
        self._frame, self._shown = frame, 1

    def cuts(self) -> tuple[int, ...]:
        """The numbers of the frames that begin a scene, without that at 0; after the last frame."""
        if self._recent:
            self._repeat(self._neighbours)
        while self._changes:
            self._decide()
        return tuple(sorted(self._cuts))

    @property
    def settled(self) -> int:
        """Whether a frame before this one is a cut no longer changes; see ``is_cut``."""
        return self._recent[-self._delay][1] if len(self._recent) > self._delay else 0

    def is_cut(self, number: int) -> bool:
        """Whether a frame that is ``settled`` begins a scene."""
        return number in self._cuts

    def _repeat(self, times: int) -> None:
        _, number, picture = self._recent[-1]
        for _ in range(times):
            self._give(number, picture)

    def _give(self, number: int, picture: np.ndarray) -> None:
        self._recent.append((self._given, number, picture))
        found = self._detector.process_frame(self._timecode(self._given), picture)
        self._changes += [one.frame_num for one in found]
        if self._changes and self._given >= self._changes[0] + self._delay:
            self._decide()
        self._given += 1

    def _decide(self) -> None:
        """Make a cut of the oldest change, or drop it with those until its picture is back."""
        change = self._changes.pop(0)
        pictures = {place: (number, picture) for place, number, picture in self._recent}
        number, _ = pictures[change]
        _, before = pictures[change - 1]
        for place, (later, picture) in pictures.items():
            if place > change and later <= number + self._flash and self._same(before, picture):
                self._changes = [one for one in self._changes if one > place]
                return
        self._cuts.add(number)

    def _same(self, one: np.ndarray, other: np.ndarray) -> bool:
        detector = scene_detectors().ContentDetector(threshold=_SAME, min_scene_len=0)
        detector.process_frame(self._timecode(0), one)
        return not detector.process_frame(self._timecode(1), other)


def _small(frame: Rgb) -> np.ndarray:
    """The frame at the width of comparison, in the order of colours that PySceneDetect takes."""
    height, width = frame.shape[:2]
    cv2 = opencv()
    if width > _WIDTH:
        size = _WIDTH, max(1, round(height * _WIDTH / width))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)
    return np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))


def scenes_of(total: int, cuts: Sequence[int]) -> list[Window]:
    """The scenes of a clip: from each cut to the next.

    Args:
        total: number of its frames.
        cuts: the frames that begin a scene, in order, without that at 0.

    Raises:
        ValueError: a cut is outside the clip, or they are not in order.
    """
    edges = [0, *cuts, total]
    if any(start >= stop for start, stop in itertools.pairwise(edges)):
        raise ValueError(f"cuts at {', '.join(map(str, cuts))} of {total} frames; expected rising numbers within")
    return [Window(start, stop) for start, stop in itertools.pairwise(edges)]


def plan_scene_windows(total: int, cuts: Sequence[int], kind: str, lengths: Lengths) -> list[Window]:
    """Cut a clip into windows that cross no cut: each scene is cut as ``plan_windows`` cuts a clip.

    Scenes shorter than the shortest window are left out; every other one has its own windows, also for ``first``.

    Args:
        total: number of resampled frames of the clip.
        cuts: see ``scenes_of``.
        kind, lengths: see ``plan_windows``.

    Returns:
        Windows in order.

    Raises:
        ValueError: no window fits into any scene, a scene is too long for ``whole``, or see ``scenes_of``.
    """
    if not cuts:
        return plan_windows(total, kind, lengths)
    scenes = scenes_of(total, cuts)
    fitting = [scene for scene in scenes if lengths.at_most(scene.length)]
    if not fitting:
        longest = max(scene.length for scene in scenes)
        raise ValueError(
            f"the longest of its {len(scenes)} scenes has {longest} frames at the target rate; the shortest window is "
            f"{lengths.shortest}"
        )
    windows = []
    for scene in fitting:
        try:
            planned = plan_windows(scene.length, kind, lengths)
        except ValueError as error:
            raise ValueError(f"of its scene from frame {scene.start} to {scene.stop}: {error}") from None
        windows += [Window(scene.start + window.start, scene.start + window.stop) for window in planned]
    return windows
