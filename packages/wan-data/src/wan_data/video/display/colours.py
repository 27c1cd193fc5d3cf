"""Colours and transparency of decoded pictures, converted to those of standard displays, of videos and images alike.

Shapes: H rows, W columns, 3 colours.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8, UInt16

from wan_data.video.display.options import TONE_MAP, DisplayOptions
from wan_data.video.display.picture import Rgb
from wan_data.video.display.tone_mapping import has_full_range, tone_mapped
from wan_data.video.source_file import Rejected

# Flags of libswscale (bicubic, ACCURATE_RND, FULL_CHR_H_INT, FULL_CHR_H_INP). As numbers, because PyAV names them from
# version 18 on only. The fast conversion, its default, makes pixels darker by 0.5 to 1.7 levels of 255.
_EXACT = 4 | 0x40000 | 0x2000 | 0x4000
_FAST = 1  # FAST_BILINEAR

# Transfer characteristics (ITU-T H.273) that are not those of standard dynamic range.
_PQ, _HLG = 16, 18
HDR = {_PQ: "HDR (PQ, SMPTE 2084)", _HLG: "HDR (HLG, ARIB STD-B67)"}
_NOT_DISPLAYABLE = {8: "linear light", 9: "a logarithm", 10: "a logarithm", 17: "a cinema's (SMPTE 428)"}

# Matrix coefficients (ITU-T H.273) that libswscale knows or that are not stated; it takes all others for BT.601.
_MATRICES = (0, 1, 2, 4, 5, 6, 7, 9)

# Colour primaries (ITU-T H.273) from which libswscale converts, or that are not stated.
_PRIMARIES = (1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 22)


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
    deep = bits > 8 and has_full_range(frame)
    name = {(0, 0): "rgb24", (0, 1): "rgba", (1, 0): "rgb48le", (1, 1): "rgba64le"}[deep, alpha]
    pixels = frame.to_ndarray(format=name, interpolation=_EXACT)
    if deep:
        # Where YUV has fewer than 16 bits, libswscale shifts them: its white is a little less than 65535.
        pixels = eight_bits(pixels, 0xFFFF if stored.is_rgb else (1 << bits) - 1 << 16 - bits)
    return over_background(pixels, display.rgb) if alpha else pixels


def quick_rgb_of_frame(frame: Any, colours: Colours, display: DisplayOptions) -> Rgb:
    """As ``rgb_of_frame``, by libswscale's fast conversion where it suffices to be a few levels off."""
    if colours.transfer in HDR or frame.format.has_palette or any(one.is_alpha for one in frame.format.components):
        return rgb_of_frame(frame, colours, display)
    pixels: Rgb = frame.to_ndarray(format="rgb24", interpolation=_FAST)
    return pixels


def eight_bits(pixels: UInt16[np.ndarray, "H W *colours"], white: int = 0xFFFF) -> UInt8[np.ndarray, "H W *colours"]:
    """Round 16 bits to 8, of which ``white`` is the largest value."""
    return np.minimum((pixels.astype(np.uint32) * 255 + white // 2) // white, 255).astype(np.uint8)


def over_background(rgba: UInt8[np.ndarray, "H W 4"], background: tuple[int, int, int]) -> Rgb:
    """Blend a picture whose colours are not multiplied by its alpha, as viewers do: in 8 bits, without linear light."""
    alpha = rgba[..., 3:].astype(np.uint32)
    blended = rgba[..., :3] * alpha + np.array(background, np.uint32) * (255 - alpha)
    return ((blended + 127) // 255).astype(np.uint8)
