"""What is measured of single frames: sharpness, and black borders.

Shapes: H rows, W columns.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, UInt8

from wan_data.curation.libraries import opencv

Luma = UInt8[np.ndarray, "H W"]

# Sharpness is that of a picture of the area of Wan's 480p.
_AREA = 480 * 832
_SMOOTHING = 1.0
# Black of limited range, and what codecs make of it.
_BLACK = 24
# A row is black if this share of its pixels always is: some noise may be in it.
_ALWAYS = 0.99
# A border ends at a straight line: within these rows, this share of the picture's width is not black.
_EDGE_ROWS, _EDGE_SHARE = 3, 0.25


@dataclasses.dataclass(frozen=True)
class Box:
    """The picture within its borders: rows ``top`` to ``bottom``, columns ``left`` to ``right``, both exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """In pixels."""
        return (self.bottom - self.top) * (self.right - self.left)


class Stills:
    """Accumulates ``sharpness`` and ``black_borders`` of a clip from some of its frames, in the memory of one frame.

    Sharpness is the variance of the Laplacian (the kernel 0 1 0, 1 -4 1, 0 1 0) of the luma within the borders, scaled
    so that the frame has the area of 480 x 832, and smoothed by a Gaussian of 1 pixel; the mean of the frames. Blur and
    enlargement lower it; it grows with the square of the contrast. Without smoothing it would depend by half on how a
    picture was made smaller.

    Black borders are the rows at the top and at the bottom, and the columns at the left and at the right, of which 99 %
    of the pixels are at most 24 levels bright in all frames, and which end at a straight line: within three rows, a
    quarter of the width is not black. A dark sky ends at an uneven line, and is none; nor is anything in a clip that is
    black all over.
    """

    def __init__(self) -> None:
        self._brightest: np.ndarray | None = None
        self._variances, self._count = 0.0, 0

    def add(self, luma: Luma) -> None:
        """Add a frame."""
        if self._brightest is None:
            self._brightest = luma.copy()
        else:
            opencv().max(self._brightest, luma, self._brightest)
        box = self.box
        self._variances += _variance_of_laplacian(luma, box)
        self._count += 1

    @property
    def sharpness(self) -> float:
        """See above."""
        assert self._count, "add a frame first"
        return self._variances / self._count

    @property
    def black_borders(self) -> float:
        """See above."""
        assert self._brightest is not None, "add a frame first"
        return 1 - self.box.area / self._brightest.size

    @property
    def box(self) -> Box:
        """The picture of the frames so far."""
        assert self._brightest is not None, "add a frame first"
        return _box(self._brightest > _BLACK)


def _variance_of_laplacian(luma: Luma, box: Box) -> float:
    cv2 = opencv()
    scale = math.sqrt(_AREA / luma.size)
    luma = np.ascontiguousarray(luma[box.top : box.bottom, box.left : box.right])
    height, width = max(1, round(luma.shape[0] * scale)), max(1, round(luma.shape[1] * scale))
    if (height, width) != luma.shape:
        luma = cv2.resize(luma, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    # Not in whole levels: their rounding has a Laplacian of its own.
    smooth = cv2.GaussianBlur(luma.astype(np.float32), (0, 0), _SMOOTHING)
    _, deviation = cv2.meanStdDev(cv2.Laplacian(smooth, cv2.CV_32F))
    return float(deviation[0, 0] ** 2)


def _box(lit: Bool[np.ndarray, "H W"]) -> Box:
    """The box of a picture, from which of its pixels are ever bright."""
    height, width = lit.shape
    top, bottom = _edge(lit), height - _edge(lit[::-1])
    if top >= bottom:
        return Box(0, height, 0, width)
    within = lit[top:bottom].T
    left, right = _edge(within), width - _edge(within[::-1])
    # Borders at the sides hide from the rows how wide the picture is; now it is known.
    within = lit[:, left:right]
    top, bottom = _edge(within), height - _edge(within[::-1])
    return Box(top, bottom, left, right)


def _edge(lit: np.ndarray) -> int:
    """The number of rows of the border at the top; 0 if there is none."""
    if lit[0].mean() > 1 - _ALWAYS:  # as of most clips
        return 0
    picture = np.flatnonzero(lit.mean(1) > 1 - _ALWAYS)
    if not picture.size:
        return 0
    first = int(picture[0])
    reached = lit[first : first + _EDGE_ROWS].any(0).mean()
    return first if reached >= _EDGE_SHARE else 0
