"""Files by their location, read the same way whether they are of the file system or objects of a store.

What others have written is bounded as in ``wan_model.system.safe_reading``: one sentence names the file or the object.
A store that fails stays ``StoreUnavailableError``, because it says nothing of the object.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import os
import stat
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from wan_data.storage.failures import StoreUnavailableError
from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import StoredObject, download, list_objects, look, read
from wan_model.system import safe_reading
from wan_model.system.safe_reading import SMALL_FILE

# Bytes that are asked for at once where a whole object is read in order.
_CHUNK = 8 << 20
_MOST_REPLACED = 5


@contextlib.contextmanager
def failures_named(path: Location) -> Iterator[None]:
    """Raise what is wrong with an object as a ``ValueError`` that names it; one that is missing, and a store, as is."""
    try:
        yield
    except (FileNotFoundError, StoreUnavailableError):
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def is_file(path: Location) -> bool:
    """Whether there is a file, or an object, of that name."""
    return file_size(path) is not None


def is_there(path: Location) -> bool:
    """Whether anything, or an object, has that name."""
    return path.exists() if isinstance(path, Path) else is_file(path)


def file_size(path: Location) -> int | None:
    """Bytes of a file or an object; None if there is none of that name."""
    if isinstance(path, Path):
        return path.stat().st_size if path.is_file() else None
    try:
        with failures_named(path):
            return look(path).bytes
    except FileNotFoundError:
        return None


def read_small(path: Location, limit: int = SMALL_FILE) -> bytes:
    """The content of a file or an object of at most ``limit`` bytes.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read, is no regular file, or larger.
        StoreUnavailableError: the store fails.
    """
    if isinstance(path, Path):
        return safe_reading.read_bytes(path, limit)
    with failures_named(path):
        for _ in range(_MOST_REPLACED):
            if (size := look(path).bytes) > limit:
                raise ValueError(f"{path} has {size:,} bytes; expected at most {limit:,}")
            # One byte more tells one that was replaced after it was looked at. None can be asked for of an empty one.
            content = read(path, 0, size + 1) if size else b""
            if len(content) == size:
                return content
    raise ValueError(f"{path} was replaced {_MOST_REPLACED} times while it was read; try again when it stays as it is")


def read_text(path: Location, limit: int = SMALL_FILE) -> str:
    """The text of a UTF-8 file or object, with or without a byte order mark; see ``read_small``."""
    try:
        return read_small(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def read_json(path: Location, limit: int = SMALL_FILE) -> Any:
    """The value of a JSON file or object; see ``read_small`` and ``wan_model.system.safe_reading.parse_json``."""
    return safe_reading.parse_json(read_text(path, limit), str(path), limit)


def read_yaml(path: Location, limit: int = safe_reading.SMALL_YAML) -> Any:
    """The value of a YAML file or object; see ``read_small`` and ``wan_model.system.safe_reading.parse_yaml``."""
    return safe_reading.parse_yaml(read_text(path, limit), str(path))


def names_like(folder: Location, pattern: str) -> list[str]:
    """Names of the files, or the objects, directly in a folder that match a pattern of ``fnmatch``, in order."""
    if isinstance(folder, Path):
        return sorted(path.name for path in folder.glob(pattern))
    with failures_named(folder):
        names = [one.path.relative_to(folder) for one in list_objects(folder)]
    return [name for name in names if "/" not in name and fnmatch.fnmatchcase(name, pattern)]


@contextlib.contextmanager
def as_local(path: Location) -> Iterator[Path]:
    """A file by its path: an object is downloaded into a temporary one, for libraries that open a path.

    Raises:
        FileNotFoundError, ValueError, StoreUnavailableError: see ``read_small``.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="wan-data-") as folder:
        with failures_named(path):
            download(look(path), copy := Path(folder, path.name))
        yield copy


class _ObjectFile(io.RawIOBase):
    """An object as a file for reading in order: each ``readinto`` is one request."""

    def __init__(self, path: StorePath, size: int) -> None:
        super().__init__()
        self._path, self._size, self._place = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._place)
        if wanted <= 0:
            return 0
        with failures_named(self._path):
            content = read(self._path, self._place, wanted)
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def open_for_reading(path: Location) -> BinaryIO:
    """Open a file, or an object that is then read in parts.

    Raises:
        FileNotFoundError, ValueError, StoreUnavailableError: see ``read_small``.
    """
    if isinstance(path, Path):
        return safe_reading.open_file(path)
    with failures_named(path):
        found = look(path)
    return io.BufferedReader(_ObjectFile(path, found.bytes), _CHUNK)


def sha256_of(path: Location) -> str:
    """SHA-256 of a file or an object, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open_for_reading(path) as file:
        while content := file.read(_CHUNK):
            digest.update(content)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Listing:
    """The objects of a folder of a store, as they were at one time.

    Attributes:
        folder: of the objects.
        found: bytes and time of each, by name; see ``wan_data.storage.store.StoredObject``.
        taken: when, by the system's monotonic clock.
    """

    folder: StorePath
    found: Mapping[str, tuple[int, int]]
    taken: float

    def object_of(self, name: str) -> StoredObject | None:
        """The object of that name; None if there was none."""
        found = self.found.get(name)
        return None if found is None else StoredObject(self.folder / name, *found)


# Of each folder the last one, with the object that it was asked for with.
_listings: dict[StorePath, tuple[StoredObject, int, Listing]] = {}


def listing_of(folder: StorePath, names: Collection[str], marker: StoredObject) -> Listing:
    """The objects of a folder that have names between the first and the last of these: a request for a thousand.

    Args:
        folder: of the objects.
        names: of objects directly in it.
        marker: an object of which every change of the others changes the time; while it stays as it is, the folder is
            listed once.
    """
    known = _listings.get(folder)
    if known is not None and known[:2] == (marker, len(names)):
        return known[2]
    found: dict[str, tuple[int, int]] = {}
    if names:
        # Names have ASCII characters only, in whose order stores list.
        first, last = min(names), max(names)
        for one in list_objects(folder, after=first[:-1]):
            name = one.path.relative_to(folder)
            if name > last + "\x7f":
                break
            if "/" not in name:
                found[name] = one.bytes, one.mtime_ns
    listing = Listing(folder, found, time.monotonic())
    _listings[folder] = marker, len(names), listing
    return listing


def forget_listing(folder: StorePath) -> None:
    """Let the folder be listed anew, because an object was not as it was listed."""
    _listings.pop(folder, None)


def sizes_of(folder: Path, names: Collection[str]) -> dict[str, int]:
    """Bytes of those of the names that are regular files of a folder; each takes some microseconds."""
    base, sizes = str(folder), dict[str, int]()
    for name in names:
        with contextlib.suppress(OSError):
            found = os.stat(os.path.join(base, name))
            if stat.S_ISREG(found.st_mode):
                sizes[name] = found.st_size
    return sizes
