"""Probe results in a file of an unfinished preparation: there may be ten million, which are read one at a time."""

import contextlib
import dataclasses
import heapq
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from wan_data.prepare.planned_source import PlannedSource, ProbeResult, RejectedSource
from wan_data.prepare.work_files import remedy_named
from wan_data.shards.database import damage_named, new_database, open_database
from wan_data.shards.json_records import from_json

# Without windows it is a rejected source.
_TABLE = "CREATE TABLE results (name TEXT PRIMARY KEY, sha256 TEXT, windows INTEGER, value TEXT NOT NULL) WITHOUT ROWID"
T = TypeVar("T")


class Entry(NamedTuple):
    """What planning needs of a result, which is not decoded for it.

    Attributes:
        name: of the source.
        sha256: digest of its content.
        windows: number of its windows; None if it was rejected.
        value: the result, for ``planned_of_json`` or ``rejected_of_json``.
        file: that it is in, for messages.
    """

    name: str
    sha256: str
    windows: int | None
    value: str
    file: str


class Again(Generic[T]):
    """An iterable that can be read several times, although its values are made while it is read.

    Args:
        begin: begins to read.
    """

    def __init__(self, begin: Callable[[], Iterator[T]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[T]:
        """The values from the first."""
        return self._begin()


class ProbeResults:
    """Results in files, one for each rank; they can be read any number of times.

    Args:
        paths: the files.
        without: names of sources whose results are left out.
    """

    def __init__(self, paths: Sequence[Path], without: Collection[str] = ()) -> None:
        self._paths, self._without = paths, without

    def without(self, names: Collection[str]) -> "ProbeResults":
        """The results of the other sources."""
        return ProbeResults(self._paths, {*self._without, *names})

    def entries(self, *, accepted: bool) -> Iterator[Entry]:
        """What is known of the accepted, or of the rejected sources, by name.

        Raises:
            ValueError: a file is damaged; the message says what to do.
        """
        found = heapq.merge(*(_read(path, accepted) for path in self._paths), key=lambda entry: entry.name)
        return (entry for entry in found if entry.name not in self._without)

    def accepted(self) -> Iterator[PlannedSource]:
        """The accepted sources, by name; see ``entries``."""
        for entry in self.entries(accepted=True):
            with remedy_named():
                source = planned_of_json(entry.value, entry.file)
            yield source

    def rejected(self) -> Iterator[RejectedSource]:
        """The rejected sources, by name; see ``entries``."""
        for entry in self.entries(accepted=False):
            with remedy_named():
                source = rejected_of_json(entry.value, entry.file)
            yield source


def write_results(path: Path, results: Iterable[ProbeResult]) -> None:
    """Write results into a file while they are made."""
    with new_database(path, [_TABLE]) as database:
        for result in results:
            windows = len(result.windows) if isinstance(result, PlannedSource) else None
            row = (result.name, result.sha256 or "", windows, to_json(result))
            database.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?)", row)


def to_json(result: ProbeResult) -> str:
    """A result as JSON."""
    value = result.to_dict() if isinstance(result, PlannedSource) else dataclasses.asdict(result)
    return json.dumps(value, ensure_ascii=False)


def planned_of_json(text: str, where: str) -> PlannedSource:
    """An accepted source from what ``to_json`` made of it.

    Raises:
        ValueError: it is damaged; the message begins with ``where``.
    """
    return _of_json(PlannedSource, text, where)


def rejected_of_json(text: str, where: str) -> RejectedSource:
    """A rejected source; see ``planned_of_json``."""
    return _of_json(RejectedSource, text, where)


def _of_json(kind: type[T], text: str, where: str) -> T:
    with damage_named(where):
        return from_json(kind, json.loads(text), where)


def _read(path: Path, accepted: bool) -> Iterator[Entry]:
    with remedy_named(), contextlib.closing(_opened(path)) as database, damage_named(str(path)):
        query = f"SELECT * FROM results WHERE windows IS {'NOT ' * accepted}NULL ORDER BY name"
        for name, sha256, windows, value in database.execute(query):
            kinds = str, str, int if accepted else type(None), str
            if [*map(type, (name, sha256, windows, value))] != [*kinds]:
                raise ValueError("a number or a text is missing")
            yield Entry(name, sha256, windows, value, str(path))


def _opened(path: Path) -> sqlite3.Connection:
    try:
        return open_database(path, [_TABLE])
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
