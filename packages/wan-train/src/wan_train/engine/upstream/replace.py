"""Replacing functions of Megatron-Bridge and Megatron-Core.

A replacement can fail silently in two ways: the function has got another name, or who called it now calls another one.
So a missing function is an error, every module that has imported the function gets the replacement, and the code of a
function that is known to call it must contain its name.
"""

import contextlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from wan_train.engine.installed import PAIRS, EngineError, installed_versions


class EngineChangedError(EngineError):
    """Bridge or Core has no function that must be replaced, or nothing calls it any more."""


def changed(what: str, purpose: str) -> EngineChangedError:
    """The error for a version of Bridge or Core that works in another way than this package expects."""
    return EngineChangedError(
        f"{installed_versions()} cannot be used, because {what}, which wan-train relies on for {purpose}; "
        f"use a pair that it knows ({PAIRS})"
    )


@contextlib.contextmanager
def import_errors_explained() -> Iterator[None]:
    """In this context an import of Bridge that fails names the versions.

    Raises:
        EngineError: instead of ImportError or AttributeError.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        python = ".".join(map(str, sys.version_info[:3]))
        raise EngineError(
            f"{installed_versions()} cannot be imported by Python {python} ({error}); use a pair that wan-train knows, "
            f"with what it requires ({PAIRS}; from 0.4 on Bridge requires Python 3.12)"
        ) from error


def find(place: str) -> Any:
    """The object at ``module:name`` or ``module:Class.name``; None if there is none."""
    module, _, path = place.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        return None
    for name in path.split("."):
        found = vars(found).get(name)
        if found is None:
            return None
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def mentions(function: Callable[..., Any], name: str) -> bool:
    """Whether a function, or one that is defined in it, uses a global or an attribute of that name."""
    plain = inspect.unwrap(function)
    return any(name in code.co_names for code in _codes(plain.__code__))


def replace(place: str, make: Callable[[Any], Any], purpose: str, *, called_by: tuple[str, ...] = ()) -> None:
    """Replace a function in every module of Megatron that has it under its name.

    Args:
        place: ``module:name``, where it is defined or imported.
        make: makes the replacement out of the original.
        purpose: what it is for, in the words of the error.
        called_by: functions that call it, as places, the newest version's first; the first that exists must.

    Raises:
        EngineChangedError: there is no such function, or the caller does not call it.
    """
    module, _, name = place.partition(":")
    original = find(place)
    if original is None:
        raise changed(f"{module} has no {name}", purpose)
    new = make(original)
    modules = [one for key, one in sys.modules.items() if key.partition(".")[0] == "megatron"]
    for holder in [one for one in modules if isinstance(one, types.ModuleType)]:
        if vars(holder).get(name) is original:
            setattr(holder, name, new)
    if not called_by:
        return
    caller = next((one for one in called_by if find(one) is not None), None)
    if caller is None:
        raise changed(f"there is none of the functions that call {name} ({', '.join(called_by)})", purpose)
    function = inspect.unwrap(find(caller))
    if not mentions(function, name) or function.__globals__.get(name) is not new:
        raise changed(f"{caller} does not call {place}", purpose)


def by(new: Any) -> Callable[[Any], Any]:
    """For ``replace``: a replacement that has no need of the original."""
    return lambda original: new


def nothing(*args: object, **kwargs: object) -> None:
    """Replaces a function that is not needed."""


def drop(place: str, purpose: str) -> None:
    """Replace a function by one that does nothing; arguments are those of ``replace``."""
    replace(place, by(nothing), purpose)
