"""Where results go: names that owe nothing to the prompt, and files that appear whole or not at all."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from wan_model.system.files import atomic_write


def output_name(index: int, record: Mapping[str, Any], frames: int) -> str:
    """``0003-1a2b3c4d5e6f.mp4``: the place in the call, and a digest of all that defines the video.

    A prompt may hold anything, path separators too, and is nobody else's business; so no letter of it is used.
    """
    canonical = json.dumps(record, sort_keys=True, ensure_ascii=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    return f"{index:04d}-{digest}{ending(frames)}"


def ending(frames: int) -> str:
    """The file name's ending: one frame is a picture."""
    return ".png" if frames == 1 else ".mp4"


def check_save_file(path: Path, frames: int) -> None:
    """Refuse a name whose ending does not say what will be in the file.

    Raises:
        ValueError: naming the ending that is expected.
    """
    if path.suffix.lower() != ending(frames):
        what = "one frame is saved as a picture" if frames == 1 else f"{frames} frames are saved as a video"
        raise ValueError(f"cannot save to {path}: {what}, so the name must end in {ending(frames)}")


def check_writable(path: Path) -> None:
    """Refuse a place that cannot be written to, before hours are spent on what should go there.

    Raises:
        ValueError: it is a folder, its folder cannot be made, or it may not be written.
    """
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: {folder} may not be written to")


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, whose folder is made if absent; it gets its name, replacing a file of that name, when the block
    ends well.

    Raises:
        ValueError: the system refuses (a full disk, say), with its reason; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, unique=True) as file:
            yield file
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error} (errno {error.errno})") from error
