"""Opening a source: the decoders get the bytes of an open regular file and never a name.

FFmpeg takes names for URLs, options and patterns: ``12:30.mp4`` for a protocol, ``http:/host/a.mp4`` for a request,
``%d.png`` for a series of files. A demuxer of lists opens the files that a list names.
"""

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import av

from wan_data.video.limits import Limits
from wan_data.video.media_types import DEMUXERS, list_of_files

# No file, no network: a demuxer has only the bytes that it is given.
_CLOSED = {"format_whitelist": ",".join(DEMUXERS), "protocol_whitelist": "none"}
_READ_BYTES = 256 * 1024


class Rejected(ValueError):
    """A source cannot be used; the message continues the sentence "SOURCE: ..."."""


def check_regular(status: os.stat_result) -> None:
    """Refuse folders, named pipes and devices.

    Raises:
        Rejected: it is no regular file.
    """
    if not stat.S_ISREG(status.st_mode):
        raise Rejected("it is no regular file")


def check_bytes(size: int, limits: Limits) -> None:
    """Compare the bytes of a file with the limit.

    Raises:
        Rejected: it has more.
    """
    if size > limits.bytes:
        raise Rejected(f"it has {size} bytes; at most {limits.bytes} are read (--max-source-bytes)")


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Compare the pixels of a frame, as it is stored, with the limit.

    Raises:
        Rejected: it has more.
    """
    if width * height > limits.pixels:
        raise Rejected(
            f"its frames have {width} x {height} pixels; at most {limits.pixels} are read (--max-source-pixels)"
        )


@contextlib.contextmanager
def open_source(path: Path, limits: Limits) -> Iterator[BinaryIO]:
    """The open file of a source.

    Raises:
        Rejected: it is no regular file, or has more bytes than are read.
        OSError: it cannot be opened.
    """
    # Without O_NONBLOCK opening a FIFO waits for its writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        check_regular(status)
        if not status.st_size:
            raise Rejected("it is empty (0 bytes)")
        check_bytes(status.st_size, limits)
        yield file


@contextlib.contextmanager
def open_container(file: BinaryIO, options: Mapping[str, str] | None = None) -> Iterator[Any]:
    """FFmpeg's view of an open video file.

    Args:
        file: of ``open_source``.
        options: further options of the demuxer.

    Yields:
        An ``av.container.InputContainer``.

    Raises:
        Rejected: its content is no video, or a text that names other files.
        av.error.FFmpegError: it cannot be decoded.
    """
    file.seek(0)
    if (kind := list_of_files(file.read(256))) is not None:
        raise Rejected(f"its content is {kind} and no video; files that it names are not read")
    file.seek(0)
    try:
        container = av.open(
            _Nameless(file),
            mode="r",
            metadata_errors="ignore",
            container_options={
                **_CLOSED,
                **(options or {}),
            },  # as "options" PyAV 17 would give them to the decoders too
            buffer_size=_READ_BYTES,
        )
    except av.error.ArgumentError:
        # FFmpeg's answer to a kind of content that is not on the list.
        raise Rejected(
            f"it cannot be decoded: its content is of no container that is read ({', '.join(DEMUXERS)})"
        ) from None
    with container:
        yield container


class _Nameless:
    """An open file without a name, from which FFmpeg would guess."""

    name = ""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell
