"""Names of output files, checks of their paths, and atomic writes."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from wan_model.system.files import atomic_write


def output_name(index: int, record: Mapping[str, Any], frames: int) -> str:
    """``0003-1a2b3c4d5e6f.mp4``: the index in the call, and a digest of everything that defines the video.

    No part of the prompt is used, which may contain anything, path separators too, and may be private.
    """
    canonical = json.dumps(record, sort_keys=True, ensure_ascii=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    return f"{index:04d}-{digest}{file_suffix(frames)}"


def file_suffix(frames: int) -> str:
    """The suffix: one frame is a picture."""
    return ".png" if frames == 1 else ".mp4"


def check_save_file(path: Path, frames: int) -> None:
    """Refuse a file name whose suffix does not match its content.

    Raises:
        ValueError: naming the suffix that is expected.
    """
    if path.suffix.lower() != file_suffix(frames):
        what = "one frame is saved as a picture" if frames == 1 else f"{frames} frames are saved as a video"
        raise ValueError(f"cannot save to {path}: {what}, so the name must end in {file_suffix(frames)}")


def check_writable(path: Path) -> None:
    """Refuse a path that cannot be written to, before hours are spent on sampling.

    Raises:
        ValueError: it is a folder, its folder cannot be created, or it may not be written to.
    """
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a folder")
    # Of the effective user, who will write; not every system can tell.
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError(f"cannot write {path}: {folder} may not be written to")


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write atomically; its folder is created if absent, and an existing file is replaced.

    Raises:
        ValueError: the operating system's error, such as a full disk; no partial file is left.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, unique=True) as file:
            yield file
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error} (errno {error.errno})") from error
