"""How a decoded picture is displayed: orientation, pixel aspect, colour and transparency, of videos and images alike.

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
from jaxtyping import UInt8, UInt16

from wan_data.video.display_options import TONE_MAP, DisplayOptions
from wan_data.video.source_file import Rejected
from wan_data.video.tone_mapping import tone_mapped

Rgb = UInt8[np.ndarray, "H W 3"]

# Flags of libswscale (bicubic, ACCURATE_RND, FULL_CHR_H_INT, FULL_CHR_H_INP). As numbers, because PyAV names them from
# version 18 on only. The fast conversion, its default, makes pixels darker by 0.5 to 1.7 levels of 255.
_EXACT = 4 | 0x40000 | 0x2000 | 0x4000

_FULL = 2  # FFmpeg's number of a range
_SIDE_DATA_KINDS = 64  # more than FFmpeg has

# Transfer characteristics (ITU-T H.273) that are not those of standard dynamic range.
_PQ, _HLG = 16, 18
HDR = {_PQ: "HDR (PQ, SMPTE 2084)", _HLG: "HDR (HLG, ARIB STD-B67)"}
_NOT_DISPLAYABLE = {8: "linear light", 9: "a logarithm", 10: "a logarithm", 17: "a cinema's (SMPTE 428)"}


# Matrix coefficients (ITU-T H.273) that libswscale knows or that are not stated; it takes all others for BT.601.
_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)


# Colour primaries (ITU-T H.273) from which libswscale converts, or that are not stated.
_PRIMARIES = (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 22)


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
    """

    height: float
    width: float
    rgb: Callable[[], Rgb]


def picture_of(
    pixels: Callable[[], Rgb], height: int, width: int, orientation: Orientation, pixel_aspect: Fraction = Fraction(1)
) -> Picture:
    """A picture from what its file holds.

    Args:
        pixels: gives the pixels as stored.
        height, width: of the stored pixels.
        orientation: of the display.
        pixel_aspect: width over height of a stored pixel.
    """
    shown = float(height), float(width * pixel_aspect)
    if orientation.exchanged:
        shown = shown[::-1]
    return Picture(*shown, lambda: orientation.apply(pixels()))


def over_background(rgba: UInt8[np.ndarray, "H W 4"], background: tuple[int, int, int]) -> Rgb:
    """Blend a picture whose colours are not multiplied by its alpha, as viewers do: in 8 bits, without linear light."""
    alpha = rgba[..., 3:].astype(np.uint32)
    blended = rgba[..., :3] * alpha + np.array(background, np.uint32) * (255 - alpha)
    return ((blended + 127) // 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Colours:
    """What a frame states of its colours, as numbered in ITU-T H.273 (2: not stated)."""

    transfer: int
    primaries: int


def colours_of_frame(frame: Any, codec: Any) -> Colours:
    """The colours of a decoded frame (an ``av.VideoFrame``); of its decoder where PyAV does not give the frame's."""
    return Colours(
        *(int(getattr(frame, name, getattr(codec, name))) for name in ("color_trc", "color_primaries")),
    )


def check_colours(frame: Any, colours: Colours, display: DisplayOptions) -> None:
    """Refuse a decoded frame (an ``av.VideoFrame``) whose colours cannot be converted to those of standard displays.

    Args:
        frame: the frame.
        colours: of the frame.
        display: whether HDR is refused.

    Raises:
        Rejected: they are those of HDR, of linear light or of a logarithm, or its matrix is not one of those read.
    """
    transfer = colours.transfer
    if transfer in HDR and display.hdr != TONE_MAP:
        raise Rejected(
            f"its transfer characteristics are those of {HDR[transfer]}; pass --hdr tone-map, or convert it to "
            "standard dynamic range with a tone mapping of your choice"
        )
    if transfer in _NOT_DISPLAYABLE:
        raise Rejected(
            f"its transfer characteristics are {_NOT_DISPLAYABLE[transfer]}; only standard dynamic range is read: "
            "convert it with a tone mapping of your choice"
        )
    if transfer in HDR and colours.primaries not in _PRIMARIES:
        raise Rejected(
            f"its colour primaries are number {colours.primaries} of ITU-T H.273, which are not known to be those of "
            "HDR: convert it to standard dynamic range"
        )
    if not frame.format.is_rgb and frame.colorspace not in _MATRICES:
        raise Rejected(
            f"its matrix coefficients are number {int(frame.colorspace)} of ITU-T H.273; BT.601, BT.709, BT.2020 and "
            "SMPTE 240M are read: convert it to one of these"
        )


def rgb_of_frame(frame: Any, colours: Colours, display: DisplayOptions) -> Rgb:
    """Convert a decoded frame (an ``av.VideoFrame``), by the matrix and range that it states, to RGB.

    A matrix that is not stated is BT.601, a range that is not stated is limited, except in formats that are full by
    definition: FFmpeg's rules. HDR is tone-mapped; ``check_colours`` has refused it where that is not chosen.
    """
    stored, components = frame.format, frame.format.components
    alpha = stored.has_palette or any(component.is_alpha for component in components)
    if colours.transfer in HDR:
        pixels = tone_mapped(frame, colours.transfer, colours.primaries, alpha=alpha)
        return over_background(pixels, display.rgb) if alpha else pixels
    # libswscale reduces more than 8 bits exactly from limited range; from full range it is 0.4 levels too bright.
    bits = max(component.bits for component in components)
    deep = bits > 8 and (stored.is_rgb or frame.color_range == _FULL)
    name = {(0, 0): "rgb24", (0, 1): "rgba", (1, 0): "rgb48le", (1, 1): "rgba64le"}[deep, alpha]
    pixels = frame.to_ndarray(format=name, interpolation=_EXACT)
    if deep:
        # Where YUV has fewer than 16 bits, libswscale shifts them: its white is a little less than 65535.
        pixels = eight_bits(pixels, 0xFFFF if stored.is_rgb else (1 << bits) - 1 << 16 - bits)
    return over_background(pixels, display.rgb) if alpha else pixels


def eight_bits(pixels: UInt16[np.ndarray, "H W *colours"], white: int = 0xFFFF) -> UInt8[np.ndarray, "H W *colours"]:
    """Round 16 bits to 8, of which ``white`` is the largest value."""
    return np.minimum((pixels.astype(np.uint32) * 255 + white // 2) // white, 255).astype(np.uint8)
