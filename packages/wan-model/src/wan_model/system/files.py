"""Atomic writes: a file is complete and flushed to the disk before it is renamed to its name. Imports no torch."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL_SUFFIX = ".partial"
# pathlib makes one slash of two.
_OBJECT = re.compile(r"(s3|gs|msc):/|[A-Za-z][A-Za-z0-9+.-]+://", re.IGNORECASE)


def require_local(setting: str, path: str | os.PathLike[str] | None) -> None:
    """Refuse the URL of an object where only a file or folder of this machine can be used.

    Args:
        setting: its name, for the message.
        path: its value; None for none.

    Raises:
        ValueError: the path is a URL.
    """
    if path is not None and _OBJECT.match(name := os.fspath(path)):
        raise ValueError(
            f"{setting} is {name}, and only datasets may lie in an object store; expected a path of this machine or of "
            "a shared file system: copy it there"
        )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an ``OSError`` that has none, such as that of a failed write."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk: a rename is not durable before that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, *, required: bool = True) -> Iterator[int]:
    """Create a file if it does not exist, and hold its exclusive lock; the system releases it if this process dies.

    Args:
        path: of the file, whose descriptor is yielded.
        required: whether a file system without locks is an error.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be opened, or locked although that is required.
    """
    with contextlib.ExitStack() as stack:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                if required:
                    raise
                break
            # The previous holder may have renamed or removed the file before it was locked here; then try again.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
        yield descriptor


@contextlib.contextmanager
def atomic_path(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path``; its file is flushed and renamed when the block ends without an error.

    A link is followed, and an existing file keeps its permissions. What is no file, such as ``/dev/null``, is written
    directly.

    Args:
        path: the final name of the file; an existing file is replaced.
        unique: include the process id in the temporary name, for files that several processes may write concurrently.
            Otherwise the next attempt overwrites a temporary file that a killed process has left.

    Raises:
        OSError: the write fails, or another process is writing this file; the error names the path. After any error
            the temporary file of this process is removed.
    """
    named, path = path, Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        with naming(named):
            yield path
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}" if unique else path.name + PARTIAL_SUFFIX)
    with contextlib.nullcontext() if unique else _only_writer(partial, named):
        try:
            with naming(named):
                yield partial
                if path.exists():
                    shutil.copymode(path, partial)
                sync_file(partial)
                partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


@contextlib.contextmanager
def _only_writer(partial: Path, path: Path) -> Iterator[None]:
    """Create the temporary file and hold its lock, which the system releases if this process dies."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(partial, required=False))
        except BlockingIOError:
            text = "another process is writing this file; wait for its end, or choose another name"
            raise OSError(errno.EBUSY, text, str(path)) from None
        yield


@contextlib.contextmanager
def atomic_write(path: Path, *, unique: bool = False) -> Iterator[BinaryIO]:
    """A file to write, renamed to its name when the block ends without an error; see ``atomic_path``."""
    with atomic_path(path, unique=unique) as partial, partial.open("wb") as file:
        yield file


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with atomic_write(path) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys atomically."""
    write_bytes(path, (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_line(path: Path, line: str) -> None:
    """Append a line to a UTF-8 file, which is created if it does not exist.

    A last line without its end, as a killed process or a full disk leaves one, is ended first: nothing is deleted, and
    the new line stands alone.

    Args:
        path: of the file; links are followed.
        line: without its end.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    with naming(path), path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        else:
            torn = False
        file.write(b"\n" * torn + line.encode("utf-8") + b"\n")
