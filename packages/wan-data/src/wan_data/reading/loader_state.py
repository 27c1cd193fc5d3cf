"""Conversion of Energon's loader state to plain JSON values and back, so that a checkpoint needs no pickle.

The state consists of dataclasses with bytes, tuples, tensors and arrays. Each value of these types becomes an object
with a single key that begins with ``$``; other values are JSON already. Only the listed types are allowed.
"""

import base64
import dataclasses
from typing import Any

import numpy as np
import torch

from wan_data.energon.pipeline import MAPPING, STATES

_STATES = {state.__name__: state for state in STATES}
_ARRAYS = ("uint8", "uint32", "uint64", "int64")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def to_plain(value: Any) -> Any:
    """Convert a state to plain values.

    Raises:
        TypeError: the state holds a type that is not on the list, because Energon has changed.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.integer):
        return int(value)
    if type(value) is list:
        return [to_plain(item) for item in value]
    if type(value) is tuple:
        return {"$tuple": [to_plain(item) for item in value]}
    if type(value) in (dict, MAPPING):
        if any(type(key) is not str or key.startswith("$") for key in value):
            raise TypeError(f"the loader's state has the keys {list(value)}, which cannot be saved")
        fields = {key: to_plain(item) for key, item in value.items()}
        return {"$flex": fields} if type(value) is MAPPING else fields
    if isinstance(value, bytes):
        return {"$bytes": _text(value)}
    if isinstance(value, torch.Tensor):
        return {"$tensor": to_plain(value.numpy())}
    if isinstance(value, np.ndarray) and value.dtype.name in _ARRAYS and value.ndim == 1:
        return {"$array": [value.dtype.name, _text(value.tobytes())]}
    if dataclasses.is_dataclass(value) and _STATES.get(type(value).__name__) is type(value):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"$state": [type(value).__name__, fields]}
    raise TypeError(f"the loader's state holds a {type(value).__name__}, which cannot be saved")


def from_plain(value: Any) -> Any:
    """Inverse of ``to_plain``.

    Raises:
        ValueError: the value is not a result of ``to_plain``.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        raise ValueError(f"a loader's state cannot hold a {type(value).__name__}")
    if not any(isinstance(key, str) and key.startswith("$") for key in value):
        return {key: from_plain(item) for key, item in value.items()}
    if len(value) != 1:
        raise ValueError(f"a loader's state cannot hold an object with the keys {sorted(value)}")
    ((kind, content),) = value.items()
    try:
        return _READERS[kind](content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a loader's state holds a malformed {kind}: {error!r}") from None


def _array(content: Any) -> np.ndarray:
    name, text = content
    if name not in _ARRAYS:
        raise ValueError(f"a loader's state cannot hold an array of {name}")
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=name).copy()


def _state(content: Any) -> Any:
    name, fields = content
    if name not in _STATES:
        raise ValueError(f"a loader's state cannot hold a {name}")
    state = _STATES[name]
    wanted = {field.name for field in dataclasses.fields(state)}
    if set(fields) != wanted:
        raise ValueError(f"a {name} has the fields {sorted(wanted)}; got {sorted(fields)}")
    return state(**{key: from_plain(item) for key, item in fields.items()})


_READERS: dict[str, Any] = {
    "$tuple": lambda content: tuple(from_plain(item) for item in content),
    "$flex": lambda content: MAPPING({key: from_plain(item) for key, item in content.items()}),
    "$bytes": lambda content: base64.b64decode(content, validate=True),
    "$tensor": lambda content: torch.from_numpy(from_plain(content)),
    "$array": _array,
    "$state": _state,
}
