"""Parts of objects on a local disk, within a bound of bytes that all processes of a machine share.

A part is a file that is named by the object as it was (its URL, size and tag), so that another object of the same name
has other files. Whoever would exceed the bound deletes those first that were not used for the longest time.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from wan_data.storage.store import StoredObject, read

FOLDER_VARIABLE = "WAN_DATA_CACHE"
_TOTAL_NAME, _LOCK_NAME, _SUFFIX = "total", "lock", ".part"
# Of the bound: what is left after files were deleted, so that not each new one deletes.
_LEFT = 0.9
# Seconds after which a file that was never finished is of a process that was killed.
_ABANDONED = 3600.0


def cache_folder() -> Path:
    """The folder of caches: ``WAN_DATA_CACHE``, or that of wan-data in the user's folder for caches."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wan-data"


class RangeCache:
    """Reads parts of objects, and keeps them. Threads and processes may use the same folder.

    A folder that cannot be written is no error: the part is read from the store again.

    Args:
        most: bytes of all files; a larger part is not kept.
        folder: of the files, which is made if it does not exist.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, most: int, folder: Path | None = None) -> None:
        self._most = most
        self._folder = (folder or cache_folder()) / "ranges"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self._folder}, for a cache of what is read from a store, cannot be made: {error.strerror}; "
                f"{FOLDER_VARIABLE} names another folder, or use no cache"
            ) from error

    def read(self, found: StoredObject, start: int, length: int) -> bytes:
        """Bytes of an object, of the disk if they are there; see ``wan_data.storage.store.read``."""
        text = f"{found.path}\n{found.bytes}\n{found.mtime_ns}\n{start}\n{length}"
        file = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}{_SUFFIX}"
        with contextlib.suppress(OSError):
            content = file.read_bytes()
            if len(content) == length:
                os.utime(file)
                return content
        content = read(found.path, start, length)
        if len(content) == length <= self._most:
            with contextlib.suppress(OSError):
                self._keep(file, content)
        return content

    def _keep(self, file: Path, content: bytes) -> None:
        partial = file.with_suffix(f".{secrets.token_hex(8)}")
        try:
            partial.write_bytes(content)
            with self._exclusively():
                total = self._total()
                if total is None or total + len(content) > self._most:
                    total = self._make_room(len(content))
                new = not file.exists()
                partial.replace(file)
                (self._folder / _TOTAL_NAME).write_text(str(total + len(content) * new))
        finally:
            partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """One thread of one process at a time."""
        descriptor = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _total(self) -> int | None:
        """Bytes of all files, as the last process has counted them; None if that is not known."""
        try:
            return int((self._folder / _TOTAL_NAME).read_text())
        except (OSError, ValueError):
            return None

    def _make_room(self, size: int) -> int:
        """Delete files until there is room for so many bytes; the bytes of those that are left."""
        kept: list[tuple[float, int, Path]] = []
        now = time.time()
        for entry in os.scandir(self._folder):
            with contextlib.suppress(OSError):
                if entry.name.endswith(_SUFFIX):
                    found = entry.stat()
                    kept.append((found.st_mtime, found.st_size, Path(entry.path)))
                elif entry.name not in (_TOTAL_NAME, _LOCK_NAME) and now - entry.stat().st_mtime > _ABANDONED:
                    os.unlink(entry.path)
        total = sum(bytes_ for _, bytes_, _ in kept)
        if total + size > self._most:
            for _, bytes_, path in sorted(kept):
                if total + size <= self._most * _LEFT or not total:
                    break
                path.unlink(missing_ok=True)
                total -= bytes_
        return total
