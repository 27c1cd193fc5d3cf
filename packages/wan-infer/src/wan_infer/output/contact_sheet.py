"""A contact sheet: frames of one or several videos in one picture.

Shapes: T frames, H rows, W columns.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from wan_infer.output.output_names import output_file

# Unnamed sizes: the videos of a sheet may differ in them.
AnyFrames = UInt8[np.ndarray, "_ _ _ 3"]

_GAP = 4
_LARGEST = 320


def chosen_frames(count: int, most: int = 12) -> list[int]:
    """Indices of at most ``most`` of ``count`` frames: the first, the last, and evenly spaced ones between."""
    return [int(index) for index in np.linspace(0, count - 1, min(most, count)).round()]


def _tiles(frames: AnyFrames, most: int) -> list[Image.Image]:
    chosen = chosen_frames(len(frames), most)
    scale = min(1.0, _LARGEST / max(frames.shape[1:3]))
    size = (max(1, round(frames.shape[2] * scale)), max(1, round(frames.shape[1] * scale)))
    return [Image.fromarray(frames[index]).resize(size, Image.Resampling.LANCZOS) for index in chosen]


def draw_contact_sheet(
    videos: Sequence[AnyFrames], *, columns: int = 4, most: int = 12
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Frames in reading order, each video beginning a row.

    Args:
        videos: of any sizes; frames larger than 320 pixels are scaled down.
        columns: frames in a row.
        most: frames of a video, evenly chosen.

    Raises:
        ValueError: there is nothing to show.
    """
    if not videos or columns < 1 or most < 1:
        raise ValueError(
            f"a contact sheet of {len(videos)} videos with {columns} columns and {most} frames each has nothing to show"
        )
    rows = []
    for frames in videos:
        tiles = _tiles(frames, most)
        rows += [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    width = max(sum(tile.width + _GAP for tile in row) for row in rows) + _GAP
    height = sum(row[0].height + _GAP for row in rows) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    y = _GAP
    for row in rows:
        x = _GAP
        for tile in row:
            sheet.paste(tile, (x, y))
            x += tile.width + _GAP
        y += row[0].height + _GAP
    return np.asarray(sheet)


def save_contact_sheet(videos: Sequence[AnyFrames], path: str | Path, *, columns: int = 4, most: int = 12) -> None:
    """Write a contact sheet as PNG; the file is written atomically.

    Raises:
        ValueError: there is nothing to show, or the file cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(draw_contact_sheet(videos, columns=columns, most=most)).save(buffer, format="PNG")
    with output_file(Path(path)) as file:
        file.write(buffer.getvalue())
