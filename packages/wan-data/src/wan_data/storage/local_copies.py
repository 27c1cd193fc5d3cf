"""Local copies of objects, within a bound of bytes, downloaded ahead of their use."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from wan_data.storage.background import Background, give_up
from wan_data.storage.store import StoredObject, download
from wan_model.system.files import locked

_DOWNLOADS = 8
# Of the bytes of all copies, unless they are given.
_MOST, _SHARE_OF_FREE = 20 * 10**9, 0.1
_PREFIX, _LOCK = "wan-data-copies-", "lock"
_END_SECONDS = 2.0


@dataclasses.dataclass
class _Copy:
    """A local copy.

    Attributes:
        file: where it is, or will be.
        bytes: its size.
        done: of its download.
        users: those that hold it now; it is not deleted meanwhile.
        awaited: it was downloaded ahead, and nobody has used it yet.
    """

    file: Path
    bytes: int
    done: concurrent.futures.Future[None]
    users: int = 0
    awaited: bool = False


class Held:
    """Copies that stay until they are released.

    Args:
        copies: of which they are some.
        found: the objects.
        held: the copy of each.
    """

    def __init__(self, copies: "LocalCopies", found: Sequence[StoredObject], held: Sequence[_Copy]) -> None:
        self._copies, self._held = copies, dict(zip(found, held, strict=True))

    def file(self, found: StoredObject) -> Path:
        """The copy of one of the objects.

        Raises:
            OSError: it cannot be downloaded; see ``wan_data.storage.store``.
        """
        copy = self._held[found]
        copy.done.result()
        return copy.file

    def done(self) -> bool:
        """Whether all downloads have ended."""
        return all(copy.done.done() for copy in self._held.values())

    def release(self) -> None:
        """Let go of them."""
        self._copies._release(self._held)


class LocalCopies:
    """Objects as local files; a context manager that deletes them. Threads may use it.

    Every object is downloaded once while there is room: the copy that was not used for the longest time goes first.
    Copies that a killed process has left in the same folder are deleted.

    Args:
        most: bytes of all copies. Those that are held together are alone if they have more. None is 20 GB, or a tenth
            of the free disk if that is less.
        folder: for the copies, in which a folder of this object's own is made; the system's temporary folder if None.
        downloads: number of objects that are downloaded at a time.
        share: number of such objects among which the bytes are divided.
    """

    def __init__(
        self,
        most: int | None = None,
        *,
        folder: Path | None = None,
        downloads: int = _DOWNLOADS,
        share: int = 1,
    ) -> None:
        self._given, self._parent, self._downloads = most, folder or Path(tempfile.gettempdir()), downloads
        self._share = share
        self._most = (most or 0) // share
        self._folder: Path | None = None
        self._stack = contextlib.ExitStack()
        self._pool: Background | None = None
        self._copies: collections.OrderedDict[StoredObject, _Copy] = collections.OrderedDict()
        self._bytes, self._count = 0, 0
        self._changed = threading.Condition()
        self._stopped = False

    def __enter__(self) -> "LocalCopies":
        """Nothing is made before it is needed."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the downloads and delete the copies."""
        self.stop()
        if self._pool is not None:
            self._pool.join(_END_SECONDS / self._downloads)  # not for transfers that are stalled
        self._stack.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def stop(self) -> None:
        """Begin no more downloads; who waits for one gets a ``CancelledError``."""
        with self._changed:
            self._stopped = True
            for copy in self._copies.values():
                give_up(copy.done)
            if self._pool is not None:
                self._pool.end()
            self._changed.notify_all()

    def ahead(self, found: StoredObject) -> None:
        """Begin to download an object if there is room for it beside those that are in use or on their way."""
        with self._changed:
            if not self._stopped and found not in self._copies and self._make_room(found.bytes, for_awaited=False):
                self._begin(found).awaited = True

    @contextlib.contextmanager
    def open(self, found: StoredObject) -> Iterator[Path]:
        """The local copy of an object, which stays in the block.

        Raises:
            OSError: it cannot be downloaded; see ``wan_data.storage.store``.
        """
        held = self.hold([found])
        assert held is not None, "it was waited for"
        try:
            yield held.file(found)
        finally:
            held.release()

    def hold(self, objects: Sequence[StoredObject], *, wait: bool = True) -> Held | None:
        """Hold the copies of some objects, all or none; those that are not there are on their way.

        A thread that holds some and waits for others may wait for ever.

        Args:
            objects: the objects.
            wait: until there is room for them; otherwise None is returned if there is none.
        """
        wanted = list(dict.fromkeys(objects))
        with self._changed:
            while True:
                if self._stopped:
                    raise concurrent.futures.CancelledError
                here = [copy for found in wanted if (copy := self._copies.get(found)) is not None]
                missing = [found for found in wanted if found not in self._copies]
                for copy in here:
                    copy.users += 1
                room = self._make_room(sum(found.bytes for found in missing), for_awaited=True)
                if room or self._copies.keys() <= {*wanted}:
                    break
                for copy in here:
                    copy.users -= 1
                if not wait:
                    return None
                self._changed.wait()
            for found in missing:
                self._begin(found).users = 1
            for found in wanted:
                self._copies[found].awaited = False
                self._copies.move_to_end(found)
            return Held(self, wanted, [self._copies[found] for found in wanted])

    def _release(self, held: dict[StoredObject, _Copy]) -> None:
        with self._changed:
            for found, copy in held.items():
                copy.users -= 1
                if not copy.users and copy.done.done() and (copy.done.cancelled() or copy.done.exception()):
                    self._forget(found)  # the next who wants it tries again
            held.clear()
            self._changed.notify_all()

    def _make_room(self, size: int, *, for_awaited: bool) -> bool:
        """Whether there is room for more bytes, after copies that nobody uses were deleted as far as needed.

        Args:
            size: the bytes.
            for_awaited: delete awaited copies too, the last ones first.
        """
        self._make_folder()
        idle = [(found, copy) for found, copy in self._copies.items() if not copy.users and copy.done.done()]
        unused = [found for found, copy in reversed(idle) if copy.awaited] if for_awaited else []
        for found in (*(found for found, copy in idle if not copy.awaited), *unused):
            if self._bytes + size <= self._most:
                break
            self._forget(found)
        return self._bytes + size <= self._most

    def _make_folder(self) -> None:
        if self._folder is not None:
            return
        self._parent.mkdir(parents=True, exist_ok=True)
        for left in self._parent.glob(f"{_PREFIX}*"):
            # Whoever uses it holds its lock.
            with contextlib.suppress(OSError), locked(left / _LOCK):
                shutil.rmtree(left, ignore_errors=True)
        # By its last name only when it is locked: another process that begins now would delete it.
        new = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=self._parent))
        self._stack.enter_context(locked(new / _LOCK, required=False))
        folder = new.rename(new.with_name(new.name.removeprefix(".")))
        self._folder = folder
        if self._given is None:
            self._most = min(_MOST, int(_SHARE_OF_FREE * shutil.disk_usage(folder).free)) // self._share
        self._pool = Background(self._downloads, "downloads")

    def _begin(self, found: StoredObject) -> _Copy:
        assert self._folder is not None, "room was made"
        assert self._pool is not None
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
