"""Dataclasses from JSON, with every value checked: files may be damaged, or of another version.

A dataclass stands as an object of its fields or as a list of their values, a tuple as a list, a path as text.
"""

import collections.abc
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from wan_data.storage.location import Location, location

T = TypeVar("T")


class _MismatchError(Exception):
    """A value of another kind than expected, at ``place`` within the whole."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__()
        self.found, self.expected, self.place = found, expected, ""


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Convert plain JSON values to a type.

    Args:
        kind: a dataclass, or another type that its fields may have: numbers, text, ``bool``, ``Path``, tuples,
            mappings from text, ``X | None``, ``Location`` and ``Any``.
        value: of ``json.loads``.
        where: the file, for messages.

    Raises:
        ValueError: a value is of another type, or a field is missing or unknown; the message names its place.
    """
    reader: Callable[[Any], Any] = _reader(kind)  # type: ignore[arg-type]  # a type is hashable
    try:
        return cast(T, reader(value))
    except _MismatchError as error:
        place = f" at {error.place.lstrip('.')}" if error.place else ""
        raise ValueError(f"{where} has {error.found}{place}; expected {error.expected}") from None


def _wrong(value: Any, expected: str) -> _MismatchError:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return _MismatchError(names.get(type(value)) or f"the number {str(value)[:40]}", expected)


def _at(place: str, reader: Callable[[Any], Any], value: Any) -> Any:
    try:
        return reader(value)
    except _MismatchError as error:
        error.place = place + error.place
        raise


# A manifest may list millions of sources: what a type needs is found out once.
@functools.cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    if kind is Any:
        return lambda value: value
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        assert len(inner) == 2, "only X | None"
        other = _reader(next(one for one in inner if one is not types.NoneType))
        return lambda value: None if value is None else other(value)
    if origin is tuple and inner[-1] is Ellipsis:
        return _sequence(_reader(inner[0]))
    if origin is tuple:
        return _row([_reader(one) for one in inner])
    if origin in (dict, collections.abc.Mapping):
        return _mapping(_reader(inner[1]))
    return _dataclass(kind)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise _wrong(value, "a whole number")
    return value


def _number(value: Any) -> float:
    # A whole number stays one: the fingerprint of a latent space is of its values as they are written.
    if type(value) is not int and not (type(value) is float and math.isfinite(value)):
        raise _wrong(value, "a number")
    return cast(float, value)


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise _wrong(value, "true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(value, "text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _MismatchError("half of a surrogate pair", "valid Unicode text") from None
    return value


def _path(value: Any) -> Path:
    text = _text(value)
    if "\0" in text:
        raise _MismatchError("a zero byte", "a path")
    return Path(text)


def _location(value: Any) -> Location:
    try:
        return location(_path(value) if "://" not in _text(value) else value)
    except ValueError:
        raise _MismatchError("a URL that cannot be read", "a path, or a URL of a store") from None


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    int: _whole,
    float: _number,
    bool: _truth,
    str: _text,
    Path: _path,
    Location: _location,
}


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(value, "a list")
    return value


def _sequence(inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> tuple[Any, ...]:
        try:
            return tuple(map(inner, _list(value)))
        except _MismatchError:  # again, for its place: one in millions
            return tuple(_at(f"[{number}]", inner, one) for number, one in enumerate(_list(value)))

    return read


def _row(readers: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def read(value: Any) -> tuple[Any, ...]:
        if len(_list(value)) != len(readers):
            raise _MismatchError(f"a list of {len(value)}", f"one of {len(readers)} values")
        return tuple(_at(f"[{number}]", one, value[number]) for number, one in enumerate(readers))

    return read


def _mapping(inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _wrong(value, "an object")
        return {_text(name): _at(f".{name}", inner, one) for name, one in value.items()}

    return read


def _dataclass(kind: Any) -> Callable[[Any], Any]:
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields}
    none = dataclasses.MISSING
    required = {field.name for field in fields if field.default is none and field.default_factory is none}
    values = _row(list(readers.values()))

    def read(value: Any) -> Any:
        if isinstance(value, list):
            return kind(*values(value))
        if not isinstance(value, dict):
            raise _wrong(value, "an object")
        if missing := required - value.keys():
            raise _MismatchError(f"no {', '.join(sorted(missing))}", "all fields")
        if unknown := value.keys() - readers.keys():
            raise _MismatchError(f"the unknown field {min(unknown)[:80]!r}", f"{', '.join(readers)}")
        try:
            return kind(**{name: readers[name](one) for name, one in value.items()})
        except _MismatchError:
            return kind(**{name: _at(f".{name}", readers[name], one) for name, one in value.items()})

    return read
