"""Frames as H.264 in mp4, single frames as PNG, with values as metadata.

Equal frames give equal bytes. With x264's defaults they do not: its SIMD code for macroblock-tree rate control reads
uninitialised memory. ``cpu-independent`` selects its C code instead. The bytes also depend on the number of threads, by
default that of the processors, so it is fixed.

Shapes: T frames, H rows, W columns.
"""

import contextlib
import io
import itertools
import json
import queue
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import IO, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from wan_model.extras import requires_extra

with requires_extra("sampling"):
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

FPS = 16
# A constant rate factor of 17 is visually lossless or nearly so.
_X264 = {"preset": "medium", "crf": "17", "x264-params": "cpu-independent=1"}
_X264_THREADS = 4
PNG_KEY = "wan-infer"
# Flags of libswscale (bicubic, ACCURATE_RND, FULL_CHR_H_INT, FULL_CHR_H_INP). As numbers, because PyAV names them from
# version 18 on only. The fast conversion, its default, makes every pixel darker by one level of 255.
EXACT = 4 | 0x40000 | 0x2000 | 0x4000

Frames = UInt8[np.ndarray, "T H W 3"]


def to_frames(video_3THW: Float[Tensor, "3 T H W"]) -> Frames:
    """Eight-bit RGB from [-1, 1]."""
    scaled = ((video_3THW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(scaled, "c t h w -> t h w c").contiguous().cpu().numpy()


def encode_mp4(
    file: IO[bytes], pieces: Iterable[Frames], fps: int | Fraction, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write an mp4 while its frames are computed: H.264, 4:2:0, tagged as BT.709 limited range.

    Args:
        file: to write to.
        pieces: consecutive frames, some at a time.
        fps: frames a second.
        metadata: JSON values to store in the file.

    Raises:
        av.error.ExternalError: of x264, such as threads that the system does not start.
    """
    with av.open(file, "w", format="mp4") as container:
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False)
        stream = container.add_stream("libx264", rate=fps, options=_X264)
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        # Of frames and not of slices, which make files larger.
        codec.thread_type, codec.thread_count = "FRAME", _X264_THREADS
        codec.colorspace, codec.color_range = int(Colorspace.ITU709), int(ColorRange.MPEG)
        codec.color_primaries, codec.color_trc = int(ColorPrimaries.BT709), int(ColorTrc.BT709)
        for pixels in itertools.chain.from_iterable(pieces):
            if not codec.is_open:
                stream.height, stream.width = pixels.shape[:2]
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=EXACT,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def encode_mp4_beside(
    file: IO[bytes], pieces: Iterable[Frames], fps: int | Fraction, metadata: Mapping[str, Any] | None = None
) -> None:
    """``encode_mp4`` in a thread, while this one computes the next frames."""
    waiting: queue.Queue[Frames | None] = queue.Queue(maxsize=2)

    def received() -> Iterator[Frames]:
        while (piece := waiting.get()) is not None:
            yield piece

    with ThreadPoolExecutor(1, thread_name_prefix="mp4") as executor:
        encoding = executor.submit(encode_mp4, file, received(), fps, metadata)

        def send(piece: Frames | None) -> None:
            while not encoding.done():  # before its end only if it has failed
                with contextlib.suppress(queue.Full):
                    waiting.put(piece, timeout=0.1)
                    return

        try:
            for piece in pieces:
                send(piece)
                if encoding.done():
                    break
        finally:
            send(None)
        encoding.result()


def encode_png(pixels: UInt8[np.ndarray, "H W 3"], metadata: Mapping[str, Any] | None = None) -> bytes:
    """A PNG file's bytes; the metadata are JSON in a text field named ``wan-infer``."""
    buffer, info = io.BytesIO(), PngInfo()
    if metadata is not None:
        info.add_itxt(PNG_KEY, json.dumps(metadata, ensure_ascii=False))
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()
