"""YAML files and ``key.path=value`` on the command line, applied to a configuration of nested dataclasses."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wan_model.system.safe_reading import BoundedLoader, parse_yaml, read_yaml
from wan_train.config.tutorial_names import SAME, translate


def _names(node: Any) -> list[str]:
    if dataclasses.is_dataclass(node):
        return [field.name for field in dataclasses.fields(node) if not field.name.startswith("_")]
    return [str(key) for key in node] if isinstance(node, Mapping) else []


def _child(node: Any, name: str, path: str) -> Any:
    if name not in _names(node):
        prefix = path[: -len(name)]
        # A key without its section, as other trainers have it.
        near = [f"{one}.{name}" for one in _names(node) if name in _names(_value(node, one))]
        near = near or difflib.get_close_matches(name, _names(node), n=1, cutoff=0.0)
        hint = f"; the nearest known one is {' or '.join(prefix + one for one in near)}" if near else ""
        raise ValueError(f"unknown configuration key {path}{hint}")
    return _value(node, name)


def _value(node: Any, name: str) -> Any:
    return node[name] if isinstance(node, Mapping) else getattr(node, name)


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin is not None:
        return _fits(value, origin)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (bool, str, list, dict, tuple):
        return isinstance(value, list if kind is tuple else kind)
    return True  # a class of Megatron's, which validates itself


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(map(_describe, typing.get_args(kind)))
    if (typing.get_origin(kind) or kind) is list:
        return "a list, such as [a, b]"
    return "null" if kind is type(None) else getattr(kind, "__name__", str(kind))


def _set(node: Any, names: list[str], value: Any, path: str, done: str = "") -> Any:
    """Set one value below ``node`` and return the node, a copy if it is frozen."""
    name = names[0]
    done = f"{done}{name}"
    current = _child(node, name, done)
    if len(names) > 1:
        if not (dataclasses.is_dataclass(current) or isinstance(current, Mapping)):
            raise ValueError(f"{done} is a value, not a section: {path} cannot be set")
        value = _set(current, names[1:], value, path, f"{done}.")
    elif dataclasses.is_dataclass(current):
        raise ValueError(f"{path} is a section; set one of {', '.join(_names(current))} in it")
    elif dataclasses.is_dataclass(node):
        kind = typing.get_type_hints(type(node)).get(name, Any)
        # Some of Megatron's settings are None by default although their type does not allow it.
        if not (_fits(value, kind) or value is current is None):
            raise ValueError(f"{path} is {value!r}; expected {_describe(kind)}")
        if isinstance(value, int) and not isinstance(value, bool) and isinstance(current, float):
            value = float(value)
    if isinstance(node, dict):
        node[name] = value
    elif getattr(type(node), "__dataclass_params__").frozen:  # noqa: B009  mypy does not know the attribute
        node = dataclasses.replace(node, **{name: value})
    else:
        setattr(node, name, value)
    return node


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settable(node: Any, path: str = "") -> dict[str, Any]:
    """Every key below a section that can be set, with its value, in the form of ``apply_sections``.

    Values that YAML cannot express (dtypes, functions) follow from other settings and are omitted.
    """
    found: dict[str, Any] = {}
    for name in _names(node):
        value = node[name] if isinstance(node, Mapping) else getattr(node, name)
        if f"{path}{name}" in SAME:
            continue
        if dataclasses.is_dataclass(value):
            if below := settable(value, f"{path}{name}."):
                found[name] = below
        elif value is None or type(value) in (bool, int, float, str, list, dict):
            found[name] = value
    return found


class _Loader(BoundedLoader):
    """Reads 1e-4 as a number, which YAML 1.1 takes for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_file(path: Path) -> dict[str, Any]:
    """Read a YAML file of nested sections, with an optional ``recipe``.

    Raises:
        ValueError: the file cannot be read, or is not such a file.
    """
    try:
        values = read_yaml(path, loader=_Loader)
    except FileNotFoundError as error:
        raise ValueError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected sections such as train: and model:")
    return values


def apply_sections(config: Any, values: Mapping[str, Any]) -> None:
    """Apply nested sections.

    Raises:
        ValueError: an unknown key, a value of the wrong kind.
    """
    for key, value in _leaves(values):
        _apply(config, key, value)


def _apply(config: Any, key: str, value: Any) -> None:
    if (name := translate(key, value)) is not None:
        _set(config, name.split("."), value, name)


def parse_overrides(overrides: typing.Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Split ``key.path=value`` settings into keys and values, which are read as YAML.

    Raises:
        ValueError: no ``=``, or a value that is no YAML.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not an override; expected key.path=value")
        yield key, parse_yaml(text, override, _Loader)


def apply_overrides(config: Any, overrides: typing.Sequence[str]) -> None:
    """Apply ``key.path=value`` settings.

    Raises:
        ValueError: no ``=``, an unknown key (the nearest known one is named), a value of the wrong kind.
    """
    for key, value in parse_overrides(overrides):
        _apply(config, key, value)
