"""Videos as H.264 mp4 files, single frames as PNG, with their settings as metadata.

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
from pathlib import Path
from typing import IO, Any, BinaryIO

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wan_infer.output.output_names import check_save_file, output_file
from wan_model.system.safe_reading import open_file, parse_json

FPS = 16
# A constant rate factor of 17 is visually lossless or nearly so.
_X264 = {"preset": "medium", "crf": "17", "x264-params": "cpu-independent=1"}
_X264_THREADS = 4
_PNG_KEY = "wan-infer"
_PNG_START = b"\x89PNG\r\n\x1a\n"
# Flags of libswscale (bicubic, ACCURATE_RND, FULL_CHR_H_INT, FULL_CHR_H_INP). As numbers, because PyAV names them from
# version 18 on only. The fast conversion, its default, makes every pixel darker by one level of 255.
_EXACT = 4 | 0x40000 | 0x2000 | 0x4000

Frames = UInt8[np.ndarray, "T H W 3"]


def to_frames(video_3THW: Float[Tensor, "3 T H W"]) -> Frames:
    """Eight-bit RGB from [-1, 1]."""
    scaled = ((video_3THW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(scaled, "c t h w -> t h w c").contiguous().cpu().numpy()


def _encode_mp4(
    file: IO[bytes], pieces: Iterable[Frames], fps: int | Fraction, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write an mp4 while its frames are computed: H.264, 4:2:0, tagged as BT.709 limited range."""
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
                interpolation=_EXACT,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _encode_beside(
    file: IO[bytes], pieces: Iterable[Frames], fps: int | Fraction, metadata: Mapping[str, Any] | None
) -> None:
    """Encode in a thread, while this one computes the next frames."""
    waiting: queue.Queue[Frames | None] = queue.Queue(maxsize=2)

    def received() -> Iterator[Frames]:
        while (piece := waiting.get()) is not None:
            yield piece

    with ThreadPoolExecutor(1, thread_name_prefix="mp4") as executor:
        encoding = executor.submit(_encode_mp4, file, received(), fps, metadata)

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
        info.add_itxt(_PNG_KEY, json.dumps(metadata, ensure_ascii=False))
    Image.fromarray(pixels).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_video(
    video_3THW: Float[Tensor, "3 T H W"],
    path: str | Path,
    *,
    fps: int | Fraction = FPS,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a video, or one frame as a picture; the file is written atomically.

    Args:
        video_3THW: RGB in [-1, 1].
        path: ends in .mp4, or in .png for one frame.
        fps: frames a second.
        metadata: JSON values to store in the file.

    Raises:
        ValueError: a wrong suffix, or the file cannot be written.
    """
    frames = to_frames(video_3THW)
    write_video([frames], len(frames), Path(path), fps=fps, metadata=metadata)


def write_video(
    pieces: Iterable[Frames],
    count: int,
    path: Path,
    *,
    fps: int | Fraction = FPS,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a video beside the computation of its frames, or one frame as a picture; the file is written atomically.

    Args:
        pieces: consecutive frames, some at a time.
        count: of the frames.
        path, fps, metadata: see ``save_video``.

    Raises:
        ValueError: a wrong suffix, or the file cannot be written.
    """
    check_save_file(path, count)
    if count == 1:
        (frame,) = itertools.chain.from_iterable(pieces)
        with output_file(path) as file:
            file.write(encode_png(frame, metadata))
        return
    with output_file(path) as file:
        try:
            _encode_beside(file, pieces, fps, metadata)
        except av.error.ExternalError as error:  # of x264, such as threads that the system does not start
            raise ValueError(f"cannot write {path}: the encoder x264 fails ({error.strerror})") from error


def read_video(path: str | Path) -> tuple[Frames, float, dict[str, Any]]:
    """Frames, frames a second, and metadata of a file that ``save_video`` has written.

    The content decides and not the name: only mp4 and PNG are read, and never another file that the content names.

    Args:
        path: of the file.

    Returns:
        RGB frames [T, H, W, 3]; frames a second, 0 for a picture; the metadata, empty if there are none.

    Raises:
        ValueError: the file is missing, is no regular file, or is neither mp4 nor PNG.
    """
    try:
        with open_file(Path(path)) as file:
            picture = file.read(len(_PNG_START)) == _PNG_START
            file.seek(0)
            frames, rate, text = _decode_png(file) if picture else _decode_mp4(file)
    except av.FFmpegError as error:
        raise ValueError(f"cannot read {path} as a video: {error.strerror}") from error
    except (OSError, IndexError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path} as a video: {error}") from error
    try:
        metadata = parse_json(text, f"the metadata of {path}")
    except ValueError:
        metadata = {}
    return frames, rate, metadata if isinstance(metadata, dict) else {}


def _decode_mp4(file: BinaryIO) -> tuple[Frames, float, str]:
    # FFmpeg opens the files that a playlist or an mp4 names: no demuxer but mp4's, no further file.
    with av.open(file, "r", format="mp4", container_options={"protocol_whitelist": "none"}) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24", interpolation=_EXACT) for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate or 0), container.metadata.get("comment", "{}")


def _decode_png(file: BinaryIO) -> tuple[Frames, float, str]:
    with Image.open(file, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))[None], 0.0, str(image.info.get(_PNG_KEY, "{}"))
