"""How much moves in a clip: the optical flow between neighbouring pictures, and how many frames stand still."""

import collections
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8

from wan_data.curation.libraries import opencv

Luma = UInt8[np.ndarray, "H W"]

# Flow is computed with the longer side nearest to this, reduced by a whole factor, which is fast and exact.
_LONGER_SIDE = 200
# The algorithm needs some pixels: smaller pictures are enlarged.
_LEAST_SIDE = 32
# Pictures are equal if no block of the reduced picture differs by more than this many levels in the mean.
_BLOCK, _NOISE = 8, 2


def reduced(luma: Luma) -> UInt8[np.ndarray, "rows columns"]:
    """The luma of a frame with the longer side nearest to 200, by the mean of blocks of pixels."""
    cv2 = opencv()
    height, width = luma.shape
    factor = max(1, round(max(height, width) / _LONGER_SIDE))
    rows, columns = height // factor, width // factor
    if min(rows, columns) < _LEAST_SIDE:
        # Very small, or of an extreme shape.
        return np.asarray(cv2.resize(luma, (max(columns, _LEAST_SIDE), max(rows, _LEAST_SIDE))))
    if factor == 1:
        return luma
    whole = luma[: rows * factor, : columns * factor]
    return np.asarray(cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA))


class Movement:
    """Accumulates ``motion`` and ``stillness`` of a clip, in constant memory.

    Motion is the mean over time of the length of the optical flow, over all pixels, between each picture and the one
    before. It is given per second, as a share of the diagonal: a camera that pans over a whole diagonal in a second has
    a motion of 1, whatever the size and the rate. Flow, because a difference of pixels grows with contrast and texture
    and stops growing after a few pixels of movement. It is OpenCV's dense inverse search (DIS, preset "ultrafast") of
    the luma with a longer side of about 200 pixels. Between the pictures on both sides of a cut nothing moves: such a
    pair is left out.

    Stillness is the share of the frames after the first that are equal to the one before: the reduced luma differs by
    at most 2 levels in the mean of every block of 8 x 8. A frame that is repeated because the source has a lower rate
    is equal.

    Args:
        fps: the rate of the frames.
    """

    def __init__(self, fps: Fraction) -> None:
        cv2 = opencv()
        self._flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        self._fps = float(fps)
        self._picture: np.ndarray | None = None
        self._blocks: np.ndarray | None = None
        self._number = 0
        # Of pairs of which it is not known yet whether there is a cut between them: number, speed, frames.
        self._undecided: collections.deque[tuple[int, float, int]] = collections.deque()
        self._distance, self._frames = 0.0, 0
        self._still, self._pairs = 0, 0

    def add(self, picture: Luma, number: int, height: int, width: int) -> None:
        """Add the next picture.

        Args:
            picture: the luma, ``reduced``.
            number: of the first frame that shows it.
            height, width: of the frame itself, in pixels.
        """
        cv2 = opencv()
        rows, columns = picture.shape
        whole = picture[: rows - rows % _BLOCK, : columns - columns % _BLOCK]
        size = whole.shape[1] // _BLOCK, whole.shape[0] // _BLOCK
        blocks = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
        if self._picture is not None and self._blocks is not None:
            shown = number - self._number
            flow = self._flow.calc(self._picture, picture, None)
            length = float(cv2.magnitude(flow[..., 0] * (width / columns), flow[..., 1] * (height / rows)).mean())
            self._undecided.append((number, length / float(np.hypot(height, width)), shown))
            self._pairs += shown
            self._still += shown - 1 + bool(cv2.absdiff(blocks, self._blocks).max() <= _NOISE)
        self._picture, self._blocks, self._number = picture, blocks, number

    def repeated(self, number: int) -> None:
        """The last picture is shown up to this frame, and the clip ends."""
        self._pairs += number - self._number
        self._still += number - self._number
        if number > self._number:
            self._undecided.append((number, 0.0, number - self._number))
        self._number = number

    def undecided(self) -> collections.deque[tuple[int, float, int]]:
        """The pairs that wait for ``decide``, the oldest first: number, distance in diagonals, frames."""
        return self._undecided

    def decide(self, *, cut: bool) -> None:
        """Count the oldest undecided pair, unless there is a ``cut`` between its pictures."""
        _, distance, frames = self._undecided.popleft()
        if not cut:
            self._distance += distance
            self._frames += frames

    @property
    def motion(self) -> float | None:
        """See above; None without a pair of frames."""
        return self._distance / self._frames * self._fps if self._frames else None

    @property
    def stillness(self) -> float | None:
        """See above; None without a pair of frames."""
        return self._still / self._pairs if self._pairs else None
