"""Files that are whole as soon as they are visible, and one writer a folder."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL_SUFFIX = ".partial"
LOCK_NAME = ".wan-data.lock"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A failing write does not say of which file; the error that leaves the block does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name only when the block ends well: flushed to the disk, then renamed."""
    aside = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with naming(path), aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk too.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, whole or not at all."""
    with written_aside(path) as file:
        file.write((json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the folder for as long as the block runs; the lock goes with the process, however it ends.

    Raises:
        ValueError: another process holds it; the message names it.
    """
    path = folder / LOCK_NAME
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ValueError(
                    f"{folder} is being written by {holder}; wait for it or choose another folder"
                ) from None
            # The holder before may have removed this very file in between: the lock on it would lock nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
