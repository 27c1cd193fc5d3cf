"""Energon's index of the shards: a file of offsets beside each shard, and one database of all samples.

Energon's own ``prepare_dataset`` is not used: it forks workers, which outlive a preparation that is killed, and forking
a process with threads may hang. It also renames files that are not yet flushed to the disk, and skips a shard that it
cannot read. Nor is its writer of the database, so that the index is the same whatever version is installed.
"""

import array
import contextlib
import errno
import itertools
import sqlite3
import struct
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wan_data.shards.reader import grouped
from wan_data.shards.tar_headers import Member, tar_members
from wan_data.shards.writer import ShardRecord
from wan_data.storage.files import Listing, as_local, open_for_reading, sizes_of
from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import look, read
from wan_model.system.files import atomic_path, write_bytes
from wan_model.system.safe_reading import read_bytes, require_file

INDEX_NAME = "index.sqlite"
_SECONDS_A_GIGABYTE = 60.0
OFFSETS_SUFFIX = ".idx"
REMEDY = "run wan-data prepare again with the same arguments, or energon prepare --tar-index-only, to write it anew"
# The tables of Energon 7.4; 6.0 reads the first of them.
TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL,
    sample_key TEXT NOT NULL UNIQUE,
    sample_index INTEGER NOT NULL,
    byte_offset INTEGER,
    byte_size INTEGER
);
CREATE TABLE sample_parts (
    tar_file_id INTEGER,
    sample_index INTEGER,
    part_name TEXT,
    content_byte_offset INTEGER,
    content_byte_size INTEGER
);
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def write_index(folder: Path, meta: Path, shards: Sequence[ShardRecord], elsewhere: Sequence[ShardRecord] = ()) -> None:
    """Write the ``.idx`` file of each shard and the database of all samples.

    Args:
        folder: folder of the dataset.
        meta: its metadata folder.
        shards: all shards, in order.
        elsewhere: the shards of the database that is there, which need not be in the folder: their rows are copied.

    Raises:
        OSError: a file cannot be written, or a shard holds another number of samples than its record says.
    """
    with atomic_path(meta / INDEX_NAME) as partial:
        # A killed process may have left these files.
        for leftover in (partial, *meta.glob(f"{INDEX_NAME}*-journal")):
            leftover.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(partial)) as database:
            database.executescript(TABLES)
            known = {shard: number for number, shard in enumerate(elsewhere)}
            for number, shard in enumerate(shards):
                if shard in known and not (folder / shard.name).exists():
                    _copy_shard(database, meta / INDEX_NAME, known[shard], number, shard)
                else:
                    _add_shard(database, folder, number, shard)
            database.commit()


def extend_index(folder: Path, meta: Path, before: Sequence[ShardRecord], shards: Sequence[ShardRecord]) -> bool:
    """Add to an index in place the shards that follow those that it is of; see ``write_index``.

    An interruption is undone by the next process that opens the database to write.

    Returns:
        Whether that was possible; if not, the index has to be written anew.

    Raises:
        OSError: see ``write_index``.
    """
    path = meta / INDEX_NAME
    if tuple(shards[: len(before)]) != tuple(before) or not path.is_file():
        return False
    uri = f"file:{urllib.parse.quote(str(path.resolve()))}?mode=rw"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as database:
            database.execute("PRAGMA trusted_schema = OFF")
            if not _has_our_tables(database):
                return False
            database.execute("BEGIN IMMEDIATE")
            # A run that ended before its manifest may have added them.
            for table in ("samples", "sample_parts"):
                database.execute(f"DELETE FROM {table} WHERE tar_file_id >= ?", [len(before)])
            last = database.execute("SELECT max(tar_file_id) FROM samples").fetchone()[0]
            of_last = database.execute("SELECT count(*) FROM samples WHERE tar_file_id = ?", [last]).fetchone()[0]
            if (last, of_last) != (len(before) - 1, before[-1].samples):
                return False
            for number in range(len(before), len(shards)):
                _add_shard(database, folder, number, shards[number])
            database.execute("COMMIT")
    except (sqlite3.DatabaseError, OverflowError) as error:
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            raise
        return False  # damaged, or a file system without locks
    return True


def _has_our_tables(database: sqlite3.Connection) -> bool:
    found = {sql for (sql,) in database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    return found == {statement.strip() for statement in TABLES.split(";") if statement.strip()}


def _copy_shard(database: sqlite3.Connection, path: Path, old: int, number: int, shard: ShardRecord) -> None:
    """Copy the rows of a shard from another database, in which it has the number ``old``."""
    with _open_index(path) as other:
        if not _has_our_tables(other):
            raise OSError(errno.EIO, "it has other tables than wan-data writes", str(path))
        samples = _rows(other, old, shard.samples)
        parts = other.execute(
            "SELECT sample_index, part_name, content_byte_offset, content_byte_size FROM sample_parts "
            "WHERE tar_file_id = ? ORDER BY rowid",
            [old],
        ).fetchall()
    if len(samples) != shard.samples:
        raise OSError(errno.EIO, f"it has {len(samples)} of the {shard.samples} samples of {shard.name}", str(path))
    database.executemany("INSERT INTO samples VALUES (?, ?, ?, ?, ?)", [(number, *row) for row in samples])
    database.executemany("INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)", [(number, *row) for row in parts])


def write_offsets(folder: Path, shard: ShardRecord) -> None:
    """Write the ``.idx`` file of a shard; see ``write_index``."""
    _write_offsets(folder, shard)


def _write_offsets(folder: Path, shard: ShardRecord) -> tuple[list[tuple[str, list[Member]]], list[int]]:
    samples, end = _samples_of(folder / shard.name)
    if len(samples) != shard.samples:
        reason = f"it holds {len(samples)} samples instead of {shard.samples}"
        raise OSError(errno.EIO, reason, str(folder / shard.name))
    offsets = [members[0].offset for _, members in samples] + [end]
    write_bytes(folder / (shard.name + OFFSETS_SUFFIX), struct.pack(f"<{len(offsets)}Q", *offsets))
    return samples, offsets


def _add_shard(database: sqlite3.Connection, folder: Path, number: int, shard: ShardRecord) -> None:
    samples, offsets = _write_offsets(folder, shard)
    database.executemany(
        "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
        [
            (number, key, index, offsets[index], offsets[index + 1] - offsets[index])
            for index, (key, _) in enumerate(samples)
        ],
    )
    database.executemany(
        "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
        [
            (number, index, member.kind, member.content, member.size)
            for index, (_, members) in enumerate(samples)
            for member in members
        ],
    )


def _samples_of(shard: Location) -> tuple[list[tuple[str, list[Member]]], int]:
    """The members of each sample, by key, and the offset of the end of the last member."""
    try:
        with open_for_reading(shard) as file:
            samples = list(grouped(tar_members(file)))
    except ValueError as error:
        raise OSError(errno.EIO, str(error), str(shard)) from error
    return samples, samples[-1][1][-1].end if samples else 0


def check_offsets(shard: Location, samples: int) -> None:
    """Check that the ``.idx`` file of a shard is there and has the size for its samples.

    Raises:
        ValueError: it is missing, no file, or of another size.
    """
    path = shard.with_name(shard.name + OFFSETS_SUFFIX)
    try:
        size = require_file(path) if isinstance(path, Path) else look(path).bytes
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None
    _check_size(path, size, samples)


def _check_size(path: Location, size: int, samples: int) -> None:
    if size != 8 * (samples + 1):
        raise ValueError(f"{path} has {size} bytes; expected {8 * (samples + 1)} for {samples} samples; {REMEDY}")


def check_all_offsets(folder: Location, shards: Sequence[tuple[str, int]], listing: Listing | None = None) -> None:
    """``check_offsets`` for many shards, of which each takes some microseconds.

    Args:
        folder: of the dataset.
        shards: names and numbers of samples.
        listing: of the folder, if it is in a store.
    """
    names = [name + OFFSETS_SUFFIX for name, _ in shards]
    if listing is not None:
        sizes = {name: listing.found[name][0] for name in names if name in listing.found}
    else:
        assert isinstance(folder, Path), "a folder of a store is listed"
        sizes = sizes_of(folder, names)
    for name, (shard, samples) in zip(names, shards, strict=True):
        if sizes.get(name) != 8 * (samples + 1):
            check_offsets(folder / shard, samples)


def read_offsets(shard: Location, samples: int, size: int | None = None) -> Sequence[int]:
    """The offset of each sample in a shard, and that of the end of the last one, from its ``.idx`` file.

    Args:
        shard: path of the shard.
        samples: number of its samples.
        size: bytes of the shard, if they are known.

    Raises:
        ValueError: see ``check_offsets``; or they do not ascend, or are beyond the end of the shard.
    """
    path = shard.with_name(shard.name + OFFSETS_SUFFIX)
    if isinstance(path, Path):
        check_offsets(shard, samples)
        content = read_bytes(path, 8 * (samples + 1))
    else:
        content = _read_object(path, samples)
    offsets = array.array("Q", content)
    if sys.byteorder == "big":
        offsets.byteswap()
    if len(offsets) != samples + 1 or any(first >= second for first, second in itertools.pairwise(offsets)):
        raise ValueError(f"{path} is damaged: its offsets do not ascend; {REMEDY}")
    if size is None:
        size = shard.stat().st_size if isinstance(shard, Path) else look(shard).bytes
    if offsets[-1] > size:
        raise ValueError(f"{path} is damaged: it names byte {offsets[-1]} of a shard of {size} bytes; {REMEDY}")
    return offsets


def _read_object(path: StorePath, samples: int) -> bytes:
    try:
        # One byte more, which a longer one has.
        content = read(path, 0, 8 * (samples + 1) + 1)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; {REMEDY}") from None
    _check_size(path, len(content), samples)
    return content


def check_index(folder: Path, meta: Path, shards: Sequence[tuple[str, int]]) -> None:
    """Check that the index is there and has the right sizes, without reading a shard; for the arguments see below.

    Raises:
        ValueError: a file is missing, damaged, or of another number of samples.
    """
    check_all_offsets(folder, shards)
    path = meta / INDEX_NAME
    try:
        with _open_index(path, sum(samples for _, samples in shards)):
            pass
    except (FileNotFoundError, sqlite3.Error) as error:
        raise ValueError(f"{path} is missing or damaged: {error}; {REMEDY}") from error


def index_problems(folder: Location, meta: Location, shards: Sequence[tuple[str, int]]) -> Iterator[str]:
    """What is wrong with the index: Energon's own tools use the database, and its and our loader the ``.idx`` files.

    Args:
        folder: folder of the dataset.
        meta: its metadata folder.
        shards: names and numbers of samples, in the order of the metadata.
    """
    with contextlib.ExitStack() as stack:
        database = None
        path = meta / INDEX_NAME
        try:
            copy = stack.enter_context(as_local(path))
            database = stack.enter_context(_open_index(copy, sum(samples for _, samples in shards)))
        except FileNotFoundError:
            yield f"{path} is missing; {REMEDY}"
        except (ValueError, sqlite3.Error) as error:
            yield f"{path} is damaged: {error}; {REMEDY}"
        for number, (name, count) in enumerate(shards):
            try:
                samples, end = _samples_of(folder / name)
            except OSError:
                continue  # the shard itself is damaged
            offsets = [members[0].offset for _, members in samples] + [end]
            try:
                # Energon begins with 0 although a folder may precede the first sample.
                if list(read_offsets(folder / name, count))[1:] != offsets[1:]:
                    yield f"{name}{OFFSETS_SUFFIX} is of another shard; {REMEDY}"
            except ValueError as error:
                yield str(error)
            wanted = [
                (key, index, offsets[index], offsets[index + 1] - offsets[index])
                for index, (key, _) in enumerate(samples)
            ]
            try:
                if database is not None and _rows(database, number, len(wanted)) != wanted:
                    yield f"{path} lists other samples than {name} has; {REMEDY}"
                    database = None
            except (sqlite3.Error, OverflowError) as error:
                yield f"{path} is damaged: {error}; {REMEDY}"
                database = None


@contextlib.contextmanager
def _open_index(path: Path, samples: int | None = None) -> Iterator[sqlite3.Connection]:
    """Open the database of samples, of which it must have a number unless that is None.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is no file, or has no table of that many samples.
        sqlite3.Error: it is no database, or damaged, or takes too long.
    """
    size = require_file(path)
    uri = f"file:{urllib.parse.quote(str(path.resolve()))}?mode=ro&immutable=1"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
        # What others wrote may hold endless views and huge values.
        database.execute("PRAGMA trusted_schema = OFF")
        database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1 << 20)
        deadline = time.monotonic() + _SECONDS_A_GIGABYTE * (1 + size / 1e9)
        database.set_progress_handler(lambda: time.monotonic() > deadline, 1 << 16)
        if database.execute("SELECT type FROM sqlite_master WHERE name = 'samples'").fetchall() != [("table",)]:
            raise ValueError("it has no table of samples")
        found = None if samples is None else database.execute("SELECT count(*) FROM samples").fetchone()[0]
        if found != samples:
            raise ValueError(f"it lists {found} samples of {samples}")
        database.set_progress_handler(None, 0)
        yield database


def _rows(database: sqlite3.Connection, shard: int, count: int) -> list[Any]:
    """Key, number, offset and size of the samples of a shard, at most one more than ``count``."""
    return database.execute(
        "SELECT sample_key, sample_index, byte_offset, byte_size FROM samples WHERE tar_file_id = ? "
        "ORDER BY sample_index LIMIT ?",
        (shard, count + 1),
    ).fetchall()
