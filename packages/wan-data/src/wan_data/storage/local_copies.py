"""Local copies of objects, within a bound of bytes, downloaded ahead of their use."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import StoredObject, download, look

_DOWNLOADS = 8


@dataclasses.dataclass
class _Copy:
    """A local copy.

    Attributes:
        file: where it is, or will be.
        bytes: its size.
        done: of its download.
        users: blocks that use it now; it is not deleted meanwhile.
        awaited: it was downloaded ahead, and nobody has used it yet.
    """

    file: Path
    bytes: int
    done: concurrent.futures.Future[None]
    users: int = 0
    awaited: bool = False


class LocalCopies:
    """Objects as local files; a context manager that deletes them. Threads may use it.

    Every object is downloaded once while there is room: the copy that was not used for the longest time goes first.

    Args:
        most: bytes of all copies. A larger object is alone.
        folder: for the copies, in which a folder of this object's own is made; the system's temporary folder if None.
        downloads: number of objects that are downloaded at a time.
    """

    def __init__(self, most: int, *, folder: Path | None = None, downloads: int = _DOWNLOADS) -> None:
        self._most, self._parent, self._downloads = most, folder, downloads
        self._folder: Path | None = None
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._copies: collections.OrderedDict[StoredObject, _Copy] = collections.OrderedDict()
        self._bytes, self._count = 0, 0
        self._changed = threading.Condition()

    def __enter__(self) -> "LocalCopies":
        """Nothing is made before it is needed."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the downloads and delete the copies."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def ahead(self, found: StoredObject) -> None:
        """Begin to download an object if there is room for it beside those that are in use or on their way."""
        with self._changed:
            if found not in self._copies and self._make_room(found.bytes, for_awaited=False):
                self._begin(found).awaited = True

    @contextlib.contextmanager
    def open(self, found: StoredObject) -> Iterator[Path]:
        """The local copy of an object, which stays in the block.

        Raises:
            OSError: it cannot be downloaded; see ``wan_data.storage.store``.
        """
        with self._changed:
            while (copy := self._copies.get(found)) is None:
                if self._make_room(found.bytes, for_awaited=True) or not self._copies:
                    copy = self._begin(found)
                    break
                self._changed.wait()
            copy.users, copy.awaited = copy.users + 1, False
            self._copies.move_to_end(found)
        try:
            copy.done.result()
            yield copy.file
        finally:
            with self._changed:
                copy.users -= 1
                if copy.done.done() and copy.done.exception() is not None and not copy.users:
                    self._forget(found)  # the next who wants it tries again
                self._changed.notify_all()

    def _make_room(self, size: int, *, for_awaited: bool) -> bool:
        """Whether there is room for more bytes, after copies that nobody uses were deleted as far as needed.

        Args:
            size: the bytes.
            for_awaited: delete awaited copies too, the last ones first.
        """
        idle = [(found, copy) for found, copy in self._copies.items() if not copy.users and copy.done.done()]
        unused = [found for found, copy in reversed(idle) if copy.awaited] if for_awaited else []
        for found in (*(found for found, copy in idle if not copy.awaited), *unused):
            if self._bytes + size <= self._most:
                break
            self._forget(found)
        return self._bytes + size <= self._most

    def _begin(self, found: StoredObject) -> _Copy:
        if self._pool is None or self._folder is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self._downloads, "downloads")
            self._folder = Path(tempfile.mkdtemp(prefix="wan-data-", dir=self._parent))
        file = self._folder / f"{self._count}{found.path.suffix}"
        self._count += 1
        self._bytes += found.bytes
        copy = self._copies[found] = _Copy(file, found.bytes, self._pool.submit(download, found, file))
        copy.done.add_done_callback(self._tell)
        return copy

    def _tell(self, done: concurrent.futures.Future[None]) -> None:
        del done
        with self._changed:
            self._changed.notify_all()

    def _forget(self, found: StoredObject) -> None:
        copy = self._copies.pop(found, None)
        if copy is not None:
            self._bytes -= copy.bytes
            copy.file.unlink(missing_ok=True)


@contextlib.contextmanager
def local_file(path: Location, copies: LocalCopies) -> Iterator[tuple[Path, StoredObject | None]]:
    """A file by its location: itself, or the local copy of the object as it is now, which is named beside it."""
    if isinstance(path, StorePath):
        found = look(path)
        with copies.open(found) as file:
            yield file, found
    else:
        yield path, None
