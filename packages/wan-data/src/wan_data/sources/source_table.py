"""Sources by name in a temporary file: there may be ten million, which memory would not hold."""

import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wan_data.sources.source import SourceFile
from wan_data.storage.location import Location, StorePath, location


class SourceTable:
    """Sources that can be read any number of times, by name.

    SQLite keeps a few megabytes in memory and the rest in a file without a name, in the folder of temporary files.

    Args:
        folder: of most of the sources.
        sources: the first ones.
    """

    def __init__(self, folder: Location, sources: Iterable[SourceFile] = ()) -> None:
        self._folder, self._count = folder, 0
        self._inside = f"{folder}/" if isinstance(folder, StorePath) else str(folder / "x")[:-1]
        # One transaction, which never ends.
        self._database = sqlite3.connect("", check_same_thread=False)
        weakref.finalize(self, self._database.close)
        self._database.execute(
            "CREATE TABLE sources (name TEXT PRIMARY KEY, path TEXT, caption TEXT, problem TEXT) WITHOUT ROWID"
        )
        for source in sources:
            self.add(source)

    def __len__(self) -> int:
        """The number of sources."""
        return self._count

    def __iter__(self) -> Iterator[SourceFile]:
        """The sources, by name."""
        return map(self._source, self._database.execute("SELECT * FROM sources ORDER BY name"))

    def _path(self, name: str, path: str | bytes | None) -> Location | None:
        if path == "":
            return self._folder / name
        # A path of the file system, which may be no valid Unicode, stands as its bytes; a URL as text.
        return Path(os.fsdecode(path)) if isinstance(path, bytes) else None if path is None else location(path)

    def add(self, source: SourceFile) -> bool:
        """Add a source.

        Returns:
            Whether its name is new; the table stays as it is if not.
        """
        path: str | bytes | None = None if source.path is None else str(source.path)
        if path == self._inside + source.name:
            path = ""
        elif isinstance(source.path, Path):
            path = os.fsencode(source.path)
        row = (source.name, path, source.caption, source.problem)
        added = self._database.execute("INSERT OR IGNORE INTO sources VALUES (?, ?, ?, ?)", row).rowcount
        self._count += added
        return bool(added)

    def find(self, name: str) -> SourceFile | None:
        """The source of a name, if there is one."""
        found = self._database.execute("SELECT * FROM sources WHERE name = ?", [name]).fetchone()
        return None if found is None else self._source(found)

    def _source(self, row: tuple[Any, ...]) -> SourceFile:
        name, path, caption, problem = row
        return SourceFile(name, self._path(name, path), caption, problem)
