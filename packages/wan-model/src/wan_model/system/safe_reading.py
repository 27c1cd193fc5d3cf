"""Reading of small files that others have written: text, JSON and YAML, each bounded in size, depth and expansion.

Whatever stands in the place of such a file (a named pipe, a device, a sparse file of gigabytes, a hundred thousand
brackets, YAML aliases of aliases) is one sentence, at once. Imports no torch.
"""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import yaml

# Configurations, indices, metadata, prompts: the largest in use have some hundred kilobytes.
SMALL_FILE = 16 << 20
# Its parser takes some seconds for a megabyte, and more for many values.
SMALL_YAML = 4 << 20
DEEPEST = 100
# Values of a YAML document after its aliases are followed; its parser takes a second and 80 MB for some 30,000.
_MOST_VALUES = 250_000
# An empty list or object of JSON, two bytes and a comma, takes over 60 bytes of memory: one for so many bytes at most.
_BYTES_A_CONTAINER = 32

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


@contextlib.contextmanager
def _failures_named(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _require_regular(path: Path, found: os.stat_result, limit: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {_KINDS.get(stat.S_IFMT(found.st_mode), 'something else')}; expected a file")
    if limit is not None and found.st_size > limit:
        raise ValueError(f"{path} has {found.st_size:,} bytes; expected at most {limit:,}")


def require_file(path: Path, limit: int | None = None) -> int:
    """Check that a path names a regular file, without opening it: for files that a library opens.

    Args:
        path: of the file; links are followed.
        limit: the most bytes that it may have; None for any number.

    Returns:
        Its size in bytes.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no regular file, or larger, or a folder on the way to it cannot be read.
    """
    with _failures_named(path):
        found = os.stat(path)
    _require_regular(path, found, limit)
    return found.st_size


def open_file(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: of the file; links are followed.
        limit: the most bytes that it may have; None for any number.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read, is no regular file, or larger.
    """
    with _failures_named(path):
        # Without O_NONBLOCK, opening a named pipe waits for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    return _opened(path, descriptor, limit)


def _opened(path: Path, descriptor: int, limit: int | None) -> BinaryIO:
    try:
        _require_regular(path, os.fstat(descriptor), limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_below(folder: Path, path: Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file in a folder for reading, where nothing leads out of the folder, whoever changes it meanwhile.

    Args:
        folder: may be reached by a link.
        path: of the file, which begins with ``folder``; no part after that may be a link.
        limit: the most bytes that it may have; None for any number.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: a part is a link, or it cannot be read, is no regular file, or larger.
    """
    flags, reached = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, folder
    with _failures_named(folder):
        descriptor = os.open(folder, flags | os.O_DIRECTORY)
    *folders, name = path.relative_to(folder).parts
    for part, more in (*((part, os.O_DIRECTORY) for part in folders), (name, 0)):
        reached, parent = reached / part, descriptor
        try:
            with _failures_named(reached), _links_refused(reached, part, parent):
                descriptor = os.open(part, flags | os.O_NOFOLLOW | more, dir_fd=parent)
        finally:
            os.close(parent)
    return _opened(path, descriptor, limit)


@contextlib.contextmanager
def _links_refused(path: Path, name: str, parent: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # ENOTDIR is of a link where a folder is expected, and of a file there.
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and stat.S_ISLNK(
            os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        ):
            raise ValueError(f"{path} is a link, which may lead elsewhere; expected a file or folder there") from None
        raise


def read_bytes(path: Path, limit: int = SMALL_FILE) -> bytes:
    """Read a regular file.

    Args:
        path: of the file; links are followed.
        limit: the most bytes that it may have.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it cannot be read, is no regular file, or larger.
    """
    with open_file(path, limit) as file:
        return read_whole(file, path, limit)


def read_whole(file: BinaryIO, path: Path, limit: int) -> bytes:
    """Read an open file to its end.

    Args:
        file: as ``open_file`` and ``open_below`` return it.
        path: in messages.
        limit: the most bytes that it may have.

    Raises:
        ValueError: it cannot be read, or is larger.
    """
    with _failures_named(path):
        content = file.read(limit + 1)  # a file of the proc file system has no size
    if len(content) > limit:
        raise ValueError(f"{path} has over {limit:,} bytes; expected at most {limit:,}")
    return content


def read_text(path: Path, limit: int = SMALL_FILE) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        FileNotFoundError, ValueError: see ``read_bytes``; also, it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def complete_lines(file: BinaryIO, longest: int) -> Iterator[bytes | None]:
    """The lines of a file that another process may be writing, from where it stands.

    Args:
        file: open for reading. After each line it stands behind it.
        longest: bytes that a line may have.

    Yields:
        Each line with its end, or None for a longer one; not the last one while it has no end.
    """
    while line := file.readline(longest):
        if line.endswith(b"\n"):
            yield line
        elif len(line) < longest:
            return
        else:
            while line and not line.endswith(b"\n"):
                line = file.readline(longest)
            yield None


def parse_json(text: str, where: str, limit: int = SMALL_FILE) -> Any:
    """Parse JSON.

    Args:
        text: to parse.
        where: the beginning of messages.
        limit: bytes that such a text may have; the number of lists and objects is bounded accordingly.

    Raises:
        ValueError: it is not JSON, nested too deeply, or of too many lists and objects; the message begins with
            ``where``.
    """
    if text.count("[") + text.count("{") > (most := limit // _BYTES_A_CONTAINER):
        raise ValueError(f"{where} has over {most:,} lists and objects")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{where} is not JSON that can be read: {error}") from None
    _check_depth(value, where)
    return value


def read_json(path: Path, limit: int = SMALL_FILE) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError, ValueError: see ``read_text`` and ``parse_json``.
    """
    return parse_json(read_text(path, limit), str(path), limit)


class BoundedLoader(yaml.SafeLoader):
    """Plain values only; refuses deep nesting, and aliases that expand to millions of values."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = self._values = 0
        self._sizes: dict[int, int] = {}

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        """Refuse brackets within brackets before the parser looks for their ends; see PyYAML's scanner."""
        if self.flow_level >= DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count what a node stands for; see PyYAML's composer."""
        alias = self.check_event(yaml.AliasEvent)
        before, self._depth = self._values, self._depth + 1
        if self._depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested more than {DEEPEST} levels deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise yaml.YAMLError("it holds an alias of what the alias is in")
        self._values += self._sizes[id(node)] if alias else 1
        if self._values > _MOST_VALUES:
            raise yaml.YAMLError(f"it expands to more than {_MOST_VALUES:,} values")
        if not alias:
            self._sizes[id(node)] = self._values - before
        return node


def parse_yaml(text: str, where: str, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """Parse YAML of plain values.

    Raises:
        ValueError: it is not YAML, or beyond the bounds; the message begins with ``where``.
    """
    try:
        return yaml.load(text, loader)
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    # An impossible date or number raises ValueError, an unhashable key TypeError in old versions.
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path, limit: int = SMALL_YAML, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """Read a YAML file of plain values.

    Raises:
        FileNotFoundError, ValueError: see ``read_text`` and ``parse_yaml``.
    """
    return parse_yaml(read_text(path, limit), str(path), loader)


def _too_deep(where: str) -> str:
    return f"{where} is nested more than {DEEPEST} levels deep"


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        if not level:
            return
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
    raise ValueError(_too_deep(where))
