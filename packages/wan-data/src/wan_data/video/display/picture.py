"""A picture as it is displayed: orientation and pixel aspect, of videos and images alike.

Shapes: H rows, W columns, 3 colours.
"""

import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import Type
from jaxtyping import UInt8

from wan_data.video.source_file import Rejected

Rgb = UInt8[np.ndarray, "H W 3"]

_SIDE_DATA_KINDS = 64  # more than FFmpeg has


@dataclasses.dataclass(frozen=True)
class Orientation:
    """One of the eight orientations: rows and columns exchanged, then mirrored, then turned upside down."""

    exchanged: bool = False
    mirrored: bool = False
    flipped: bool = False

    def apply(self, image: UInt8[np.ndarray, "rows columns 3"]) -> Rgb:
        """The image as it is displayed."""
        if self.exchanged:
            image = image.swapaxes(0, 1)
        if self.mirrored:
            image = image[:, ::-1]
        if self.flipped:
            image = image[::-1]
        # torch does not support the negative strides of a view.
        return np.ascontiguousarray(image)

    @property
    def exif(self) -> int:
        """EXIF's number of the orientation, 1 to 8."""
        return next(number for number, orientation in _EXIF.items() if orientation == self)


_EXIF = {
    1: Orientation(),
    2: Orientation(mirrored=True),
    3: Orientation(mirrored=True, flipped=True),
    4: Orientation(flipped=True),
    5: Orientation(exchanged=True),
    6: Orientation(exchanged=True, mirrored=True),
    7: Orientation(exchanged=True, mirrored=True, flipped=True),
    8: Orientation(exchanged=True, flipped=True),
}


def orientation_of_exif(number: Any) -> Orientation:
    """The orientation of EXIF's number; upright for anything else, as viewers have it."""
    return _EXIF.get(number, _EXIF[1]) if isinstance(number, int) else _EXIF[1]


def orientation_of_matrix(matrix: bytes) -> Orientation:
    """The orientation of a display matrix: nine 32-bit integers [a b u c d v x y w], native byte order.

    A point (column, row) of the picture is displayed at (a column + c row, b column + d row), up to a shift; see
    ``libavutil/display.h``. A negative determinant mirrors.

    Raises:
        Rejected: the matrix is no multiple of a quarter turn, mirrored or not.
    """
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32)[:5])
    straight, exchanged = min(abs(a), abs(d)), min(abs(b), abs(c))
    # One degree of tolerance, as FFmpeg's command has it.
    if max(abs(b), abs(c)) < 0.02 * straight or not (straight or exchanged):
        return Orientation(mirrored=a < 0, flipped=d < 0)
    if max(abs(a), abs(d)) < 0.02 * exchanged:
        return Orientation(exchanged=True, mirrored=c < 0, flipped=b < 0)
    raise Rejected(
        f"its display matrix [{a} {b}; {c} {d}] is not of a rotation by 0, 90, 180 or 270 degrees, mirrored or not; "
        "only these are supported"
    )


def orientation_of_frame(frame: Any) -> Orientation:
    """The orientation of a decoded frame (an ``av.VideoFrame``).

    Raises:
        Rejected: see ``orientation_of_matrix``.
    """
    try:
        side_data = frame.side_data
    except ValueError:
        # PyAV lists no side data where one is of a kind that it does not know, such as EXIF.
        side_data = _with_known_side_data(frame).side_data
    try:
        return orientation_of_matrix(bytes(side_data["DISPLAYMATRIX"]))
    except KeyError:
        return Orientation()


def _with_known_side_data(frame: Any) -> Any:
    known: set[Any] = {kind.value for kind in Type}
    graph = av.filter.Graph()
    steps = [graph.add_buffer(None, frame.width, frame.height, frame.format, "frame", Fraction(1, 1000))]
    for kind in range(_SIDE_DATA_KINDS):
        if kind not in known:
            steps.append(graph.add("sidedata", f"mode=delete:type={kind}"))
    steps.append(graph.add("buffersink"))
    for one, following in itertools.pairwise(steps):
        one.link_to(following)
    graph.configure()
    graph.push(frame)
    return graph.pull()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it is displayed.

    Attributes:
        height, width: in square pixels.
        rgb: gives the pixels, upright, before their aspect is applied; costly, so it is called for those that are used.
        quick_rgb: the same for measuring: some levels off, in a tenth of the time.
    """

    height: float
    width: float
    rgb: Callable[[], Rgb]
    quick_rgb: Callable[[], Rgb]


def picture_of(
    pixels: Callable[[], Rgb],
    height: int,
    width: int,
    orientation: Orientation,
    pixel_aspect: Fraction = Fraction(1),
    quick_pixels: Callable[[], Rgb] | None = None,
) -> Picture:
    """A picture from what its file holds.

    Args:
        pixels: gives the pixels as stored.
        height, width: of the stored pixels.
        orientation: of the display.
        pixel_aspect: width over height of a stored pixel.
        quick_pixels: gives nearly the same pixels, sooner; None if there is no quicker way.
    """
    shown = float(height), float(width * pixel_aspect)
    if orientation.exchanged:
        shown = shown[::-1]
    quick = quick_pixels or pixels
    return Picture(*shown, lambda: orientation.apply(pixels()), lambda: orientation.apply(quick()))
