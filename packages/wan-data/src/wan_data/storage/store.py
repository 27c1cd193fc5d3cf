"""Objects of a store: listing, looking, reading, downloading, uploading and deleting, with retries.

All functions raise ``FileNotFoundError``, ``PermissionError`` or another ``OSError`` whose ``strerror`` is a sentence
for users and whose ``filename`` is the URL; a store that fails for longer than ``wan_data.storage.failures.patience``
raises ``StoreUnavailableError``.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import random
import re
import secrets
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from wan_data.storage.failures import (
    ChangedObjectError,
    LocalCopyError,
    UnusableCredentialsError,
    UnusableStoreError,
    final_error,
    has_no_reason,
    patience,
    refuses_credentials,
    unavailable,
    waiting,
)
from wan_data.storage.location import StorePath

T = TypeVar("T")
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 15.0
_DELETED_TOGETHER = 1_000
# Bytes that are read with one request; larger objects in parts at a time, after one for their size.
_ONE_REQUEST = 32 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class StoredObject:
    """An object of a store.

    Attributes:
        path: its name.
        bytes: its size.
        mtime_ns: time of its last change; below the second a checksum of its entity tag, so that an object of the
            same size that replaces it within the second has another value. Google's times have milliseconds themselves.
    """

    path: StorePath
    bytes: int
    mtime_ns: int

    def is_same(self, other: "StoredObject") -> bool:
        """Whether another object of that name has this one's size, and its tag, or its time if it has no tag."""
        tags = self.mtime_ns % 10**9, other.mtime_ns % 10**9
        equal = tags[0] == tags[1] if all(tags) else self.mtime_ns == other.mtime_ns
        return self.bytes == other.bytes and equal


def list_objects(
    folder: StorePath, after: str | None = None, *, unusable: Callable[[str], None] | None = None
) -> Iterator[StoredObject]:
    """All objects below a folder, by ascending keys (in the order of their UTF-8 bytes).

    Markers of folders, and objects with a part that is empty, ``.`` or ``..``, are left out.

    Args:
        folder: of the objects.
        after: only objects whose names below the folder are beyond this one.
        unusable: is told the names below the folder that are left out, but not those of markers.
    """
    last = None if after is None else folder.prefix + after
    tagged: bool | None = None
    while True:
        try:
            # After a failure the list goes on after the last object that came.
            for found in _attempt(folder, "listing", _listing, folder, last):
                last = found.key
                tagged = _has_tags(folder) if tagged is None else tagged
                try:
                    listed = _object(folder / found.key.removeprefix(folder.prefix), found, tagged)
                except ValueError:
                    if unusable is not None and not found.key.endswith("/"):
                        unusable(found.key.removeprefix(folder.prefix))
                    continue
                yield listed
            return
        except _InterruptedListing:
            continue


class _InterruptedListing(Exception):
    """A list broke off after its first objects."""


def _listing(folder: StorePath, after: str | None) -> Iterator[Any]:
    """A list whose first object has come."""
    objects = iter(_client(folder).list(path=folder.prefix, start_after=after))
    first = next(objects, None)
    return _rest(first, objects) if first is not None else iter(())


def _rest(first: Any, objects: Iterator[Any]) -> Iterator[Any]:
    yield first
    while True:
        try:
            found = next(objects)
        except StopIteration:
            return
        except Exception as error:
            raise _InterruptedListing from error
        yield found


def look(path: StorePath) -> StoredObject:
    """Size and time of an object."""
    found = _attempt(path, "looking", _info, path)
    if found.type != "file":
        raise final_error(FileNotFoundError(), path, "looking") or AssertionError
    return _object(path, found, _has_tags(path))


def _info(path: StorePath) -> Any:
    try:
        return _client(path).info(path.key, strict=False)
    except Exception as error:
        if has_no_reason(error):  # the request has no body in its answer, where S3 says that credentials have expired
            _raise_refusal(path)
        raise


def _raise_refusal(path: StorePath) -> None:
    """Raise the error of reading an object if that says that the store refuses the credentials."""
    from multistorageclient.types import Range

    try:
        _client(path).read(path.key, Range(0, 1))
    except Exception as error:
        if refuses_credentials(error):
            raise


def exists(path: StorePath) -> bool:
    """Whether there is such an object."""
    try:
        look(path)
    except FileNotFoundError:
        return False
    return True


def read(path: StorePath, start: int = 0, length: int | None = None) -> bytes:
    """Bytes of an object, all or from ``start`` on as many as it has of ``length``.

    Raises:
        OSError: also if the store answers with more.
    """

    def get() -> bytes:
        from multistorageclient.types import Range

        data = _client(path).read(path.key, None if length is None and not start else Range(start, length or 1 << 62))
        return bytes(data)

    if length == 0:
        return b""
    content = _attempt(path, "reading", get)
    if length is not None and len(content) > length:
        what = (
            f"{len(content)} bytes came where {length} were asked for: the store, or a proxy before it, reads no ranges"
        )
        raise OSError(errno.EIO, what, str(path))
    return content


def download(found: StoredObject, target: Path) -> None:
    """Copy an object into a file, which appears whole or not at all.

    Raises:
        LocalCopyError: the file cannot be written.
        OSError: also if the object was replaced: one that is read with one request has another size by now, a larger
            one another size or tag.
    """
    partial = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")

    def get() -> None:
        _check_folder(partial)  # multi-storage-client would make it
        if found.bytes <= _ONE_REQUEST:
            content = _client(found.path).read(found.path.key)
            try:
                partial.write_bytes(content)
            except OSError as error:
                raise _local(error, partial) from error
        else:
            try:
                _client(found.path).download_file(found.path.key, str(partial))
            except Exception:
                _check_folder(partial)
                raise
            now = _object(found.path, _info(found.path), _has_tags(found.path))
            if not found.is_same(now):  # its parts may be of several objects
                raise ChangedObjectError(errno.EIO, "it was replaced meanwhile", str(found.path))
        if partial.stat().st_size != found.bytes:
            _check_size(found.path, found.bytes)
            raise _CutTransferError

    try:
        _attempt(found.path, "downloading", get)
        try:
            partial.replace(target)
        except OSError as error:
            raise _local(error, partial) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_folder(partial: Path) -> None:
    try:
        partial.touch()
    except OSError as error:
        raise _local(error, partial) from error


def _local(error: OSError, partial: Path) -> OSError:
    """The error of a local file, which says nothing of the object."""
    why = "the folder is gone" if not partial.parent.is_dir() else error.strerror or str(error)
    return LocalCopyError(
        error.errno, f"copies of objects cannot be written here: {why}; run the same command again", str(partial.parent)
    )


def check_copy(file: Path) -> None:
    """Check that the local copy of an object is still there, after it could not be used.

    Raises:
        LocalCopyError: another program has deleted it.
    """
    if not file.is_file():
        what = (
            "the local copy of an object was deleted by another program while it was used; run the same command again"
        )
        raise LocalCopyError(errno.ENOENT, what, str(file))


class _CutTransferError(Exception):
    """Fewer bytes have come than the object has."""


def _check_size(path: StorePath, size: int) -> None:
    now = int(_client(path).info(path.key, strict=False).content_length)
    if now != size:
        raise ChangedObjectError(errno.EIO, f"it had {size} bytes and has {now}: it was replaced meanwhile", str(path))


def upload(source: Path, path: StorePath) -> None:
    """Copy a file into an object, which appears whole or not at all; an object of this name is replaced."""

    def put() -> None:
        _client(path).upload_file(path.key, str(source))
        _check_size(path, source.stat().st_size)

    _attempt(path, "uploading", put)


def write(path: StorePath, content: bytes) -> None:
    """Write an object, which appears whole or not at all; an object of this name is replaced."""
    _attempt(path, "writing", lambda: _client(path).write(path.key, content))


def delete(paths: Iterable[StorePath]) -> None:
    """Delete objects of one bucket; those that are not there are of no matter."""
    left = list(paths)
    while left:
        some, left = left[:_DELETED_TOGETHER], left[_DELETED_TOGETHER:]
        keys = [one.key for one in some]
        with contextlib.suppress(FileNotFoundError):
            _attempt(some[0], "deleting", lambda keys=keys, one=some[0]: _client(one).delete_many(keys))


def _object(path: StorePath, found: Any, tagged: bool) -> StoredObject:
    seconds = int(found.last_modified.timestamp())
    tag = zlib.crc32(str(found.etag).encode()) % 10**9 if found.etag else 0
    below = tag if tagged else found.last_modified.microsecond * 1000
    return StoredObject(path, int(found.content_length), max(seconds, 0) * 10**9 + below)


def _has_tags(path: StorePath) -> bool:
    """Whether an object has one tag, whatever is asked for it.

    Of Google's objects multi-storage-client gives the entity tag in a list, and the generation of a single one.
    """
    if path.scheme == "msc":
        return getattr(getattr(_client(path), "_storage_provider", None), "_provider_name", "") != "gcs"
    return path.scheme != "gs"


def _client(path: StorePath) -> Any:
    """The client of a bucket or profile, which multi-storage-client keeps."""
    try:
        import multistorageclient

        logger = logging.getLogger("multistorageclient")
        if logger.level == logging.NOTSET:  # it logs with a traceback what is raised here in a sentence
            logger.setLevel(logging.CRITICAL)
        # Read when a client is made. Stores that keep the checksum of an upload answer a range with that of the whole.
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        return multistorageclient.resolve_storage_client(path.root)[0]
    except ImportError as error:
        name = error.name or "a package"
        extra = "gs" if path.scheme == "gs" or name.startswith("google") else "s3"
        raise UnusableStoreError(
            f"{path.root} needs {name}, which is not installed: pip install 'wan-data[{extra}]'"
        ) from None
    except Exception as error:
        if isinstance(final := final_error(error, path, "opening"), UnusableCredentialsError):
            raise final from None
        # What it says may repeat the configuration, which has credentials.
        raise UnusableStoreError(f"{path.root} cannot be opened: {_wrong_setting(path, error)}") from None


def _wrong_setting(path: StorePath, error: Exception) -> str:
    """What is wrong with the settings by which no client could be made, without their values."""
    if path.scheme == "s3":
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
            if (url := os.environ.get(name)) and not re.match(r"https?://[^/]", url):
                return f"{name} is no URL; expected one such as https://store.example.org"
    what = "has no such profile, or its configuration" if path.scheme == "msc" else "was not set up: its configuration"
    return f"multi-storage-client {what} (MSC_CONFIG) is damaged ({type(error).__name__})"


def _attempt(path: StorePath, doing: str, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function, again while it fails for a reason that may pass."""
    limit, jitter = patience(), random.SystemRandom()
    begin, delay, attempts = time.monotonic(), _FIRST_DELAY, 0
    while True:
        attempts += 1
        try:
            return function(*arguments)
        except Exception as error:
            if (final := final_error(error, path, doing)) is not None:
                raise final from None
            if (spent := time.monotonic() - begin) + delay > limit:
                raise unavailable(error, path, doing, spent, attempts) from error
            waiting.say(error, path, doing, spent)
        time.sleep(delay * jitter.uniform(0.5, 1.0))
        delay = min(2 * delay, _LONGEST_DELAY)
