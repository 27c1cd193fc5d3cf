"""Videos as H.264 mp4 files, single frames as PNG, with their settings as metadata.

Shapes: T frames, H rows, W columns.
"""

import itertools
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from wan_infer.output.output_names import check_save_file, output_file
from wan_model.codec.video_encoding import (
    EXACT,
    FPS,
    PNG_KEY,
    Frames,
    encode_mp4_beside,
    encode_png,
    to_frames,
)
from wan_model.system.safe_reading import open_file, parse_json

_PNG_START = b"\x89PNG\r\n\x1a\n"


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
            encode_mp4_beside(file, pieces, fps, metadata)
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
        frames = [frame.to_ndarray(format="rgb24", interpolation=EXACT) for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate or 0), container.metadata.get("comment", "{}")


def _decode_png(file: BinaryIO) -> tuple[Frames, float, str]:
    with Image.open(file, formats=["PNG"]) as image:
        return np.asarray(image.convert("RGB"))[None], 0.0, str(image.info.get(PNG_KEY, "{}"))
