"""SQLite files that are written once, in one go, and then only read; what others wrote into them is not trusted."""

import contextlib
import errno
import glob
import json
import sqlite3
import threading
import urllib.parse
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from wan_model.system.files import atomic_path, naming
from wan_model.system.safe_reading import require_file

# Bytes of a value, such as the reasons of a source whose windows were dropped.
_LONGEST = 64 << 20
MEMORY = ":memory:"
_IN_A_QUERY = 400  # SQLite takes at least 999 values, and some need two for each
T = TypeVar("T")


@contextlib.contextmanager
def new_database(path: Path, tables: Collection[str]) -> Iterator[sqlite3.Connection]:
    """A database that gets its name, complete and flushed, when the block ends without an error.

    Args:
        path: of the file; what has its name is replaced.
        tables: statements that create the tables.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_path(path) as partial:
        partial.unlink()  # its lock stays with this process; a killed one may have left any content
        with sqlite_as_os_errors(path), contextlib.closing(create(str(partial), tables)) as database:
            yield database
            database.commit()


def create(name: str, tables: Collection[str]) -> sqlite3.Connection:
    """A new database without safety against a crash: in memory, or in a file that has no name for others yet."""
    # Locks of a network file system may not work; the file is this process's.
    database = sqlite3.connect(name if name == MEMORY else f"file:{urllib.parse.quote(name)}?nolock=1", uri=True)
    try:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "page_size = 8192"):
            database.execute(f"PRAGMA {pragma}")
        for statement in tables:
            database.execute(statement)
    except BaseException:
        database.close()
        raise
    return database


def open_database(path: Path, statements: Collection[str]) -> sqlite3.Connection:
    """Open a database for reading.

    Args:
        path: of the file.
        statements: with which its tables and indices were created; it may have no others.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no file, damaged, or has other tables.
    """
    require_file(path)
    uri = f"file:{urllib.parse.quote(str(path.resolve()))}?mode=ro&immutable=1"
    with damage_named(str(path)):
        # Threads of one process may take turns.
        database = sqlite3.connect(uri, uri=True, check_same_thread=False)
        try:
            # Another table of the same name may be an endless view, or hold huge values.
            database.execute("PRAGMA trusted_schema = OFF")
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
            found = {sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
            if found != {*statements}:
                raise ValueError("it has other tables than wan-data writes")
        except BaseException:
            database.close()
            raise
    return database


def in_queries(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """The values in parts of which each is few enough for one query."""
    return (values[start : start + _IN_A_QUERY] for start in range(0, len(values), _IN_A_QUERY))


@contextlib.contextmanager
def damage_named(where: str) -> Iterator[None]:
    """Raise what a damaged database or row leads to as a ``ValueError`` that names the file."""
    try:
        yield
    except (ValueError, TypeError, OverflowError, sqlite3.Error) as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where} is damaged: {text}") from None


@contextlib.contextmanager
def sqlite_as_os_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's own error of a full disk, and the like, as an ``OSError`` that names the file."""
    try:
        with naming(path):
            yield
    except sqlite3.OperationalError as error:
        raise OSError(errno.EIO, f"it cannot be written: {error}", str(path)) from error


_VALUES = "CREATE TABLE remembered (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"


class ValueFile:
    """JSON values by name that only save time: what a kill interrupts is undone, and a damaged file is begun anew.

    Threads may take turns; another process must not write it.

    Args:
        path: of the file, which is created if it does not exist.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        with sqlite_as_os_errors(path):
            try:
                self._database = self._open()
            except sqlite3.DatabaseError:
                for name in path.parent.glob(f"{glob.escape(path.name)}*"):
                    name.unlink(missing_ok=True)
                self._database = self._open()

    def _open(self) -> sqlite3.Connection:
        uri = f"file:{urllib.parse.quote(str(self._path.absolute()))}?vfs=unix-none"
        database = sqlite3.connect(uri, uri=True, check_same_thread=False, isolation_level=None)
        try:
            database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
            database.execute("PRAGMA trusted_schema = OFF")
            # A value is safe from a kill at once, and from a power failure after the next checkpoint. Without shared
            # memory, which a network file system does not have.
            for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL"):
                database.execute(f"PRAGMA {pragma}")
            found = {sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
            if found and found != {_VALUES}:
                raise sqlite3.DatabaseError("it has other tables than wan-data writes")
            if not found:
                database.execute(_VALUES)
        except BaseException:
            database.close()
            raise
        return database

    def find(self, names: Iterable[str]) -> dict[str, Any]:
        """The values of those names that have one."""
        found: dict[str, Any] = {}
        for some in in_queries(list(names)):
            query = f"SELECT name, value FROM remembered WHERE name IN ({', '.join('?' * len(some))})"
            with self._lock, contextlib.suppress(sqlite3.DatabaseError, ValueError, RecursionError):
                for name, value in self._database.execute(query, some):
                    found[name] = json.loads(value)
        return found

    def put(self, values: Mapping[str, Any]) -> None:
        """Remember these values too, all or none of them."""
        rows = [(name, json.dumps(value)) for name, value in values.items()]
        with self._lock, sqlite_as_os_errors(self._path):
            self._database.execute("BEGIN")
            try:
                self._database.executemany("INSERT OR REPLACE INTO remembered VALUES (?, ?)", rows)
                self._database.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the file."""
        self._database.close()
