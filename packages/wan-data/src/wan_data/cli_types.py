"""Values of the options of ``wan-data`` that are more than a number or a text."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from wan_data.storage.location import Location, StorePath, location

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class FractionType(click.ParamType[Fraction]):
    """A number such as 16 or 24000/1001."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        """The number."""
        try:
            return Fraction(str(value))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is no number such as 16 or 24000/1001", param, ctx)


class LocationType(click.ParamType[Location]):
    """A path, or a URL of a store."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Location:
        """The path or the URL."""
        try:
            return location(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class LocalPathType(LocationType):
    """A path of this machine.

    Args:
        instead: what to do about a URL of a store.
    """

    name = "path"

    def __init__(self, instead: str) -> None:
        self._instead = instead

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        found = super().convert(value, param, ctx)
        if isinstance(found, StorePath):
            self.fail(f"{found} is in a store; {self._instead}", param, ctx)
        return found


class OutputFileType(LocalPathType):
    """A file that a command writes at its end: its folder must be there before the work begins."""

    name = "file"

    def __init__(self) -> None:
        super().__init__("name a file of this machine, and copy it there")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path."""
        found = super().convert(value, param, ctx)
        if found.is_dir():
            self.fail(f"{found} is a folder; name a file in it", param, ctx)
        if not found.parent.is_dir():
            self.fail(f"{found.parent} is no folder; make it first, or name a file elsewhere", param, ctx)
        return found


class SizeType(click.ParamType[int]):
    """A number of bytes, such as 500MB or 20GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is no size such as 500MB or 20GB", param, ctx)
        return int(Fraction(match[1]) * _UNITS[match[2]])
