"""Tone mapping: HDR frames (PQ, HLG) become frames of standard dynamic range in BT.709, by libswscale.

libswscale of FFmpeg 8 maps luminance and gamut together ("perceptual"): the luminance that the mastering display had,
10,000 cd/m2 where none is stated, becomes white, and what an SDR display can show keeps its luminance as nearly as
that leaves it; 203 cd/m2 is SDR white (ITU-R BT.2408). Colours outside BT.709 are compressed into it.
"""

import functools
import itertools
from typing import Any

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorRange
from jaxtyping import UInt8

from wan_data.video.source_file import Rejected

_UNSPECIFIED = 2  # of primaries and of a matrix, as in ITU-T H.273
_FLAGS = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
_SCALE = f"out_primaries=bt709:out_transfer=bt709:out_range=pc:intent=perceptual:{_FLAGS}"
# Metadata of single frames would change the mapping from frame to frame, and cost seconds each time.
_DYNAMIC = (17, 25)  # HDR10+, HDR Vivid


def tone_mapped(frame: Any, transfer: int, primaries: int, *, alpha: bool) -> UInt8[np.ndarray, "H W colours"]:
    """A decoded HDR frame in BT.709, full range: RGB, or RGBA.

    Args:
        frame: an ``av.VideoFrame``.
        transfer, primaries: its colours as in ITU-T H.273. Primaries that are not stated are BT.2020, and so is a
            matrix that is not stated, as players take them for HDR.
        alpha: keep its transparency.

    Raises:
        Rejected: this FFmpeg cannot map tones.
    """
    stored = frame.format
    guessed = []
    if primaries == _UNSPECIFIED:
        guessed.append("color_primaries=bt2020")
    if frame.colorspace == _UNSPECIFIED and not stored.is_rgb:
        guessed.append("colorspace=bt2020nc")
    matrix = "gbr" if stored.is_rgb else int(frame.colorspace)
    source = (
        f"video_size={frame.width}x{frame.height}:pix_fmt={stored.name}:time_base=1/1000:colorspace={matrix}:"
        f"range={'pc' if has_full_range(frame) else 'tv'}"
    )
    graph = _graph(source, ":".join(guessed), "rgba" if alpha else "rgb24", (transfer, primaries))
    try:
        graph.push(frame)
        return graph.pull().to_ndarray()
    except BaseException:
        _graph.cache_clear()  # a frame may have stayed in it
        raise


def has_full_range(frame: Any) -> bool:
    """The values of a decoded frame (an ``av.VideoFrame``) go from 0 to the largest of their bits."""
    return bool(frame.format.is_rgb or frame.color_range == ColorRange.JPEG)


@functools.lru_cache(maxsize=4)
def _graph(source: str, guessed: str, out: str, kind: tuple[int, int]) -> Any:
    """The filters for frames of one kind; kept, because the table of a kind takes seconds to compute.

    ``kind`` is what the frames state themselves; the filters see it, and would compute the table again if it changed.
    """
    graph = av.filter.Graph()
    filters = [("buffer", source), *(("sidedata", f"mode=delete:type={kind}") for kind in _DYNAMIC)]
    if guessed:
        filters.append(("setparams", guessed))
    try:
        # As RGB before the tones are mapped: behind its table libswscale takes the matrix of YUV for BT.601.
        filters += [("scale", _FLAGS), ("format", "gbrap16le" if out == "rgba" else "gbrp16le")]
        steps = [graph.add(*one) for one in [*filters, ("scale", _SCALE), ("format", out), ("buffersink", "")]]
    except (ValueError, av.error.FFmpegError):
        raise Rejected("its HDR cannot be tone-mapped by this FFmpeg: PyAV 17 or later brings one that can") from None
    for one, following in itertools.pairwise(steps):
        one.link_to(following)
    graph.configure()
    return graph
