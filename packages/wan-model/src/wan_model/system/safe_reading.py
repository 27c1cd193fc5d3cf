"""Reading of small files that others have written: text, JSON and YAML, each bounded in size, depth and expansion.

Whatever stands in the place of such a file (a named pipe, a device, a sparse file of gigabytes, a hundred thousand
brackets, YAML aliases of aliases) is one sentence, at once. Imports no torch.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

# Configurations, indices, metadata, prompts: the largest in use have some hundred kilobytes.
SMALL_FILE = 16 << 20
DEEPEST = 100
# Values of a YAML document after its aliases are followed; its parser takes a second for 100,000.
_MOST_VALUES = 1_000_000

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def read_bytes(path: Path, limit: int = SMALL_FILE) -> bytes:
    """Read a regular file.

    Args:
        path: of the file; links are followed.
        limit: the most bytes that it may have.

    Raises:
        OSError: it does not exist, or cannot be read.
        ValueError: it is no regular file, or larger.
    """
    # Without O_NONBLOCK, opening a named pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise ValueError(f"{path} is {kind}; expected a file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            # A file of the proc file system has no size.
            content = file.read(limit + 1) if found.st_size <= limit else b""
    finally:
        os.close(descriptor)
    if found.st_size > limit or len(content) > limit:
        raise ValueError(f"{path} has {max(found.st_size, limit + 1):,} bytes; expected at most {limit:,}")
    return content


def read_text(path: Path, limit: int = SMALL_FILE) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        OSError, ValueError: see ``read_bytes``; also, it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def parse_json(text: str, where: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON, or nested too deeply; the message begins with ``where``.
    """
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
        OSError, ValueError: see ``read_text`` and ``parse_json``.
    """
    return parse_json(read_text(path, limit), str(path))


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


def read_yaml(path: Path, limit: int = SMALL_FILE, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """Read a YAML file of plain values.

    Raises:
        OSError, ValueError: see ``read_text`` and ``parse_yaml``.
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
