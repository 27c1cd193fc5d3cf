"""Size, time and content of a source, whether it is a file or an object of a store."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from wan_data.sources.source import SourceFile
from wan_data.storage.local_copies import LocalCopies
from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import StoredObject, check_copy, look
from wan_data.video.source_file import check_regular


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """Size and modification time of a source; see ``wan_data.storage.store.StoredObject``."""

    bytes: int
    mtime_ns: int


def status_of(source: SourceFile) -> Status:
    """Size and time of a source, which for an object that was listed need no request.

    Raises:
        Rejected: it is no regular file.
        OSError: it is not there, or cannot be looked at.
    """
    assert source.path is not None, "a source without a path has a problem"
    if isinstance(source.path, StorePath):
        found = source.listed.clip if source.listed is not None else look(source.path)
        return Status(found.bytes, found.mtime_ns)
    status = source.path.stat()
    check_regular(status)
    return Status(status.st_size, status.st_mtime_ns)


def object_of(path: Location | None, bytes: int, mtime_ns: int) -> StoredObject | None:
    """The object that a source is; None for a file."""
    return StoredObject(path, bytes, mtime_ns) if isinstance(path, StorePath) else None


@contextlib.contextmanager
def content_of(path: Location, status: Status, copies: LocalCopies) -> Iterator[Path]:
    """The file with the content of a source, which stays in the block.

    Raises:
        OSError: an object cannot be downloaded, or its copy is gone when the block fails.
    """
    if isinstance(path, StorePath):
        with copies.open(StoredObject(path, status.bytes, status.mtime_ns)) as file:
            try:
                yield file
            except (OSError, ValueError):
                check_copy(file)
                raise
    else:
        yield path
