"""One file of the index: an SQLite database of source records, written once and then only read."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from wan_data.index.records import LEFT_OUT, PART_PATTERN, REJECTED, PartRecord, SourceRecord
from wan_data.shards.database import MEMORY, create, damage_named, in_queries, new_database, open_database
from wan_data.shards.json_records import from_json

# The order of the columns is that of the fields of a SourceRecord.
_TABLE = """CREATE TABLE sources (
    path TEXT PRIMARY KEY,
    verdict TEXT NOT NULL,
    reason TEXT,
    split TEXT,
    sha256 BLOB,
    bytes INTEGER NOT NULL,
    samples INTEGER NOT NULL,
    shards TEXT NOT NULL,
    dropped TEXT NOT NULL,
    frames INTEGER NOT NULL,
    source_fps REAL NOT NULL,
    height REAL NOT NULL,
    width REAL NOT NULL,
    caption_sha256 BLOB,
    caption_tokens INTEGER,
    source_frames INTEGER NOT NULL,
    orientation INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    motion REAL,
    stillness REAL,
    sharpness REAL,
    black_borders REAL,
    cuts TEXT,
    fingerprint BLOB,
    duplicate_of TEXT
) WITHOUT ROWID"""
# As wan_data.index.records.is_notable has it.
_NOTABLE = (
    f"(verdict IN {(REJECTED, *LEFT_OUT)} OR dropped <> '[]' OR caption_tokens IS NOT NULL OR duplicate_of IS NOT NULL)"
)
# Made after the rows are there: sorting them is faster than a million insertions at random places.
_INDICES = (
    "CREATE INDEX contents ON sources (substr(sha256, 1, 8)) WHERE split IS NOT NULL",
    f"CREATE INDEX notable ON sources (path) WHERE {_NOTABLE}",
)
_SCHEMA = {_TABLE, *_INDICES}
FIELDS = tuple(SourceRecord.__dataclass_fields__)
_COLUMNS = len(FIELDS)
_TIME = FIELDS.index("mtime_ns")
_LISTS = [FIELDS.index(name) for name in ("shards", "dropped", "cuts")]
# Columns of an expression that decoding finds; the question mark is the target rate.
_DECODED = {"seconds": "frames / ?", "frames": "frames", "fps": "source_fps", "height": "height", "width": "width"}

Row = tuple[Any, ...]


def write_part(folder: Path, number: int, rows: Iterable[Row]) -> PartRecord:
    """Write a file of the index.

    Args:
        folder: of the dataset.
        number: of the file.
        rows: of ``row_of``, by ascending paths.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / PART_PATTERN.format(number=number)
    with new_database(path, [_TABLE]) as database:
        records, digest = _fill(database, rows)
    return PartRecord(path.name, records, digest)


def _fill(database: sqlite3.Connection, rows: Iterable[Row]) -> tuple[int, str]:
    """Insert rows and make the indices; the number of rows and their digest."""
    digest, count = hashlib.sha256(), 0

    def counted() -> Iterator[Row]:
        nonlocal count
        last = ""
        for row in rows:
            assert count == 0 or last < row[0], "by ascending paths, each once"
            last, count = row[0], count + 1
            digest.update(_line(row))
            yield row

    database.executemany(f"INSERT INTO sources VALUES ({', '.join('?' * _COLUMNS)})", counted())
    for statement in _INDICES:
        database.execute(statement)
    return count, digest.hexdigest()


def _line(row: Row) -> bytes:
    # Without the modification time, which differs between copies of the same clips.
    values = [one.hex() if isinstance(one, bytes) else one for place, one in enumerate(row) if place != _TIME]
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def row_of(record: SourceRecord) -> Row:
    """The row of a record."""
    return (
        record.path,
        record.verdict,
        record.reason,
        record.split,
        _packed(record.sha256),
        record.bytes,
        record.samples,
        json.dumps(record.shards),
        json.dumps(record.dropped, ensure_ascii=False),
        record.frames,
        float(record.source_fps),
        float(record.height),
        float(record.width),
        _packed(record.caption_sha256),
        record.caption_tokens,
        record.source_frames,
        record.orientation,
        record.mtime_ns,
        *(_real(one) for one in (record.motion, record.stillness, record.sharpness, record.black_borders)),
        None if record.cuts is None else json.dumps(record.cuts),
        None if record.fingerprint is None else bytes.fromhex(record.fingerprint),
        record.duplicate_of,
    )


def _real(value: float | None) -> float | None:
    return None if value is None else float(value)


def _packed(digest: str | None) -> bytes | str | None:
    """A digest in half of its bytes; any other text, such as another tool has left, stays as it is."""
    if digest is None or len(digest) != 64 or digest.strip("0123456789abcdef"):
        return digest
    return bytes.fromhex(digest)


class Part:
    """A file of the index, open for reading.

    Args:
        database: with the table.
        where: the file, for messages.
    """

    def __init__(self, database: sqlite3.Connection, where: str) -> None:
        self._database, self._where = database, where

    @classmethod
    def open(cls, folder: Path, record: PartRecord) -> "Part":
        """Open a file of the index.

        Raises:
            ValueError: it is missing or damaged, or holds anything but this table.
        """
        path = folder / record.name
        with remedy_named():
            try:
                return cls(open_database(path, _SCHEMA), str(path))
            except FileNotFoundError:
                raise ValueError(f"{path} is missing") from None

    @classmethod
    def of_records(cls, records: Iterable[SourceRecord], where: str) -> "Part":
        """The same table in memory, of records in any order."""
        database = create(MEMORY, [_TABLE])
        _fill(database, map(row_of, sorted(records, key=lambda record: record.path)))
        return cls(database, where)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def find(self, paths: Sequence[str]) -> Iterator[SourceRecord]:
        """The records of these paths, as many as there are."""
        for chunk in in_queries(paths):
            yield from self._records(f"SELECT * FROM sources WHERE path IN ({', '.join('?' * len(chunk))})", chunk)

    def find_contents(self, contents: Sequence[str]) -> Iterator[SourceRecord]:
        """The records of sources with samples that have one of these digests."""
        for chunk in in_queries([_packed(content) for content in contents]):
            marks = ", ".join("?" * len(chunk))
            starts = [one[:8] for one in chunk if one is not None]
            yield from self._records(
                f"SELECT * FROM sources WHERE split IS NOT NULL AND substr(sha256, 1, 8) IN ({marks}) "
                f"AND sha256 IN ({marks})",
                [*starts, *chunk],
            )

    def notable(self) -> Iterator[SourceRecord]:
        """The records of which ``is_notable`` is true, by path."""
        return self._records(f"SELECT * FROM sources WHERE {_NOTABLE} ORDER BY path", [])

    def selected(self, condition: str, parameters: Sequence[float], fps: float) -> Iterator[SourceRecord]:
        """The records that fulfil a condition of ``wan_data.curation.expressions.Where``, by path.

        Args:
            condition, parameters: its ``sql``, and ``parameters``.
            fps: the target rate.
        """
        # Of a file that could not be decoded, nothing of it is known.
        known = [f"CASE WHEN frames THEN {value} END AS {name}" for name, value in _DECODED.items()]
        stored = [f"stored_{name}" if name in _DECODED else name for name in FIELDS]
        columns = [f"{name} AS {alias}" for name, alias in zip(FIELDS, stored, strict=True)]
        query = f"SELECT {', '.join([*known, *columns])} FROM sources"
        return self._records(
            f"SELECT {', '.join(stored)} FROM ({query}) WHERE {condition} ORDER BY path", [fps, *parameters]
        )

    def rows(self) -> Iterator[Row]:
        """All rows, by path."""
        with remedy_named(), damage_named(self._where):
            # Not yield from, which would close the cursor, perhaps after the database.
            for row in self._database.execute("SELECT * FROM sources ORDER BY path"):  # noqa: UP028
                yield row

    def record_of(self, row: Row) -> SourceRecord:
        """The record of a row.

        Raises:
            ValueError: the row is damaged.
        """
        with remedy_named(), damage_named(self._where):
            values = [one.hex() if isinstance(one, bytes) else one for one in row]
            for column in _LISTS:
                if values[column] is not None:
                    values[column] = json.loads(values[column])
            return from_json(SourceRecord, values, "a record")

    def digest(self) -> tuple[int, str]:
        """Number and digest of the records, as ``write_part`` has counted them."""
        digest, count = hashlib.sha256(), 0
        for row in self.rows():
            digest.update(_line(row))
            count += 1
        return count, digest.hexdigest()

    def _records(self, query: str, values: Sequence[Any]) -> Iterator[SourceRecord]:
        with remedy_named(), damage_named(self._where):
            for row in self._database.execute(query, values):
                yield self.record_of(row)


@contextlib.contextmanager
def remedy_named() -> Iterator[None]:
    """Add to a ``ValueError`` about a damaged file of a dataset what to do."""
    try:
        yield
    except ValueError as error:
        text, remedy = str(error), "; restore the file, or prepare the dataset again with --overwrite"
        raise ValueError(text if text.endswith(remedy) else text + remedy) from None
