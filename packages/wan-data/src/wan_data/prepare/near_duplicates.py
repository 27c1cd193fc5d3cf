"""Near-duplicates among new sources and those that a dataset has, found before anything is encoded.

Shapes: N sources, the preferred ones first, of eight hashes of 32 bytes.
"""

import array
import contextlib
import dataclasses
import heapq
import sqlite3
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from wan_data.curation.duplicates import find_duplicates, give_back
from wan_data.curation.fingerprints import BITS, PARTS, packed_fingerprint, unpacked_fingerprint
from wan_data.index.records import DUPLICATE
from wan_data.index.sources import SourceIndex, batched
from wan_data.prepare.planned_source import PlannedSource, RejectedSource
from wan_data.prepare.probing.results import Entry, ProbeResults, planned_of_json, to_json
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.work_files import remedy_named
from wan_data.shards.database import create, in_queries, sqlite_as_os_errors

NAME = "duplicates.sqlite"
# ``number``: existing sources before new ones, each by name. ``kept`` is NULL if it is no duplicate, but connected with
# others by such, whose split it shares: that of ``content``.
_TABLES = (
    "CREATE TABLE clips (number INTEGER PRIMARY KEY, name TEXT NOT NULL, sha256 TEXT NOT NULL, "
    "existing INTEGER NOT NULL, named INTEGER NOT NULL, area REAL NOT NULL, frames INTEGER NOT NULL, "
    "bytes INTEGER NOT NULL)",
    "CREATE TABLE found (name TEXT PRIMARY KEY, kept TEXT, distance REAL NOT NULL, mirrored INTEGER NOT NULL, "
    "content TEXT NOT NULL) WITHOUT ROWID",
)
# Existing sources and new ones are numbered by name.
_PREFERRED = "existing DESC, named, area DESC, frames DESC, bytes DESC, number"
_CHUNK = 1 << 14
_ROW = PARTS * BITS // 8


@dataclasses.dataclass(frozen=True)
class _Found:
    """What is known of a new source that is near others."""

    kept: str | None
    distance: float
    mirrored: bool
    content: str

    @property
    def reason(self) -> str:
        of = f"{'the mirror image of ' * self.mirrored}{self.kept}"
        return f"it is a near-duplicate of {of} ({self.distance:.4g} of {BITS} bits differ)"


@contextlib.contextmanager
def without_duplicates(
    results: ProbeResults,
    settings: PrepareSettings,
    folder: Path,
    index: SourceIndex | None = None,
    replaced: Collection[str] = (),
) -> Iterator[ProbeResults]:
    """The results with what ``settings.duplicates`` asks for: near-duplicates left out or named, or the same results.

    Of clips that are near-duplicates one stays: one that the dataset has already, else that of the most pixels, then
    frames, then bytes, then the first by name. This does not depend on the number of processes.

    Args:
        results: of probing all new sources.
        settings: of the preparation.
        folder: for temporary files: 600 bytes a source.
        index: of the dataset that the sources are added to; None if there is none.
        replaced: the names of sources whose samples the dataset will not have any more.

    Yields:
        The results, which can be read in the block.

    Raises:
        ValueError: a fingerprint in the index, or a result, is damaged.
    """
    if settings.duplicates == "keep":
        yield results
        return
    path = folder / NAME
    path.unlink(missing_ok=True)  # of a run that was killed
    with contextlib.ExitStack() as stack:
        stack.callback(path.unlink, missing_ok=True)
        with sqlite_as_os_errors(path):
            database = stack.enter_context(contextlib.closing(create(str(path), _TABLES)))
            _search(database, results, index, {*replaced}, folder)
        yield _DecidedResults(results, database, drop=settings.duplicates == "drop")


class _DecidedResults(ProbeResults):
    """Results of which near-duplicates are left out, or named."""

    def __init__(self, results: ProbeResults, database: sqlite3.Connection, *, drop: bool) -> None:
        super().__init__([])
        self._results, self._database, self._drop = results, database, drop

    def without(self, names: Collection[str]) -> ProbeResults:
        return _DecidedResults(self._results.without(names), self._database, drop=self._drop)

    def entries(self, *, accepted: bool) -> Iterator[Entry]:
        decided = self._decided()
        if accepted:
            return (entry for entry in decided if entry.windows is not None)
        left_out = (entry for entry in decided if entry.windows is None)
        return heapq.merge(self._results.entries(accepted=False), left_out, key=lambda entry: entry.name)

    def _decided(self) -> Iterator[Entry]:
        for some in batched(self._results.entries(accepted=True)):
            found = self._find([entry.name for entry in some])
            yield from (self._changed(entry, found[entry.name]) if entry.name in found else entry for entry in some)

    def _find(self, names: list[str]) -> dict[str, _Found]:
        found: dict[str, _Found] = {}
        for chunk in in_queries(names):
            query = f"SELECT * FROM found WHERE name IN ({', '.join('?' * len(chunk))})"
            for name, kept, distance, mirrored, content in self._database.execute(query, chunk):
                found[name] = _Found(kept, distance, bool(mirrored), content)
        return found

    def _changed(self, entry: Entry, found: _Found) -> Entry:
        if not self._drop:
            # The split follows from the content, so that of all in a group is one.
            entry = entry._replace(sha256=found.content)
        if found.kept is None:
            return entry
        with remedy_named():
            source = planned_of_json(entry.value, entry.file)
        if not self._drop:
            return entry._replace(value=to_json(dataclasses.replace(source, duplicate_of=found.kept)))
        rejected = RejectedSource(
            *(source.name, found.reason, source.bytes, source.sha256, DUPLICATE),
            *(source.info, source.mtime_ns, source.measures, found.kept),
        )
        return entry._replace(windows=None, value=to_json(rejected))


@dataclasses.dataclass(frozen=True)
class _Clip:
    name: str
    sha256: str
    fingerprint: str
    existing: bool
    named: bool
    area: float
    frames: int
    bytes: int


def _existing(index: SourceIndex | None, replaced: Collection[str]) -> Iterator[_Clip]:
    for one in () if index is None else index.accepted():
        if one.path not in replaced and one.fingerprint is not None and one.sha256 is not None:
            named = one.duplicate_of is not None
            area = one.height * one.width
            yield _Clip(one.path, one.sha256, one.fingerprint, True, named, area, one.frames, one.bytes)


def _new(results: ProbeResults) -> Iterator[_Clip]:
    for one in results.accepted():
        assert one.measures is not None, "sources are measured where near-duplicates are looked for"
        yield _Clip(one.name, one.sha256, packed_fingerprint(one.measures.hashes), False, False, _area(one),
                    one.info.frames, one.bytes)  # fmt: skip


def _area(source: PlannedSource) -> float:
    return source.info.height * source.info.width


def _search(
    database: sqlite3.Connection,
    results: ProbeResults,
    index: SourceIndex | None,
    replaced: Collection[str],
    folder: Path,
) -> None:
    """Fill the table of what was found."""
    known = array.array("B")
    with tempfile.TemporaryFile(dir=folder) as unordered, tempfile.TemporaryFile(dir=folder) as ordered:

        def rows() -> Iterator[tuple[int, str, str, bool, bool, float, int, int]]:
            for number, clip in enumerate(_each(index, replaced, results)):
                row, mask = _bytes_of(clip)
                unordered.write(row)
                known.append(mask)
                yield (
                    *(number, clip.name, clip.sha256, clip.existing, clip.named),
                    *(clip.area, clip.frames, clip.bytes),
                )

        database.executemany("INSERT INTO clips VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows())
        unordered.flush()
        if not known:
            return
        # SQLite sorts in a file.
        query = f"SELECT number, existing FROM clips ORDER BY {_PREFERRED}"
        order, new = np.empty(len(known), np.int64), np.empty(len(known), bool)
        for place, (number, existing) in enumerate(database.execute(query)):
            order[place], new[place] = number, not existing
        hashes = _ordered(unordered, ordered, order)
        bits = np.unpackbits(np.frombuffer(known, np.uint8)[order, None], axis=1, bitorder="little")
        _record(database, order, new, hashes, bits.astype(bool))


def _each(index: SourceIndex | None, replaced: Collection[str], results: ProbeResults) -> Iterator[_Clip]:
    yield from _existing(index, replaced)
    yield from _new(results)


def _bytes_of(clip: _Clip) -> tuple[bytes, int]:
    try:
        hashes = unpacked_fingerprint(clip.fingerprint)
    except ValueError as error:
        raise ValueError(f"{clip.name}: {error}; prepare the dataset again with --overwrite") from None
    row = b"".join(bytes.fromhex(one) if one else bytes(BITS // 8) for one in hashes)
    return row, int(clip.fingerprint[:2], 16)


def _ordered(source: IO[bytes], target: IO[bytes], order: np.ndarray) -> np.ndarray:
    """The hashes in order, in a file, so that memory does not hold them twice."""
    shape = len(order), _ROW
    unordered = np.memmap(source, np.uint8, "r", shape=shape)
    hashes = np.memmap(target, np.uint8, "w+", shape=shape)
    for start in range(0, len(order), _CHUNK):
        hashes[start : start + _CHUNK] = unordered[order[start : start + _CHUNK]]
        give_back(unordered)
        give_back(hashes)
    return hashes.reshape(-1, PARTS, BITS // 8)


def _record(
    database: sqlite3.Connection, order: np.ndarray, new: np.ndarray, hashes: np.ndarray, known: np.ndarray
) -> None:
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    copies = _exact_copies(database, place)
    known[[*copies]] = False  # what the first is near, they are near too
    near = find_duplicates(hashes, known)
    near.groups[[*copies]] = near.groups[[*copies.values()]]

    def found() -> Iterator[tuple[str, str | None, float, int, str]]:
        for one in np.flatnonzero(new & (near.groups != np.arange(len(order)))).tolist():
            first = copies.get(one, one)
            kept, distance, mirrored = int(near.kept[first]), float(near.distances[first]), int(near.mirrored[first])
            (name, _), (of, _) = _clip(one), _clip(kept)
            _, content = _clip(int(near.groups[one]))
            yield name, None if kept == one else of, distance, mirrored, content

    def _clip(number: int) -> tuple[str, str]:
        query = "SELECT name, sha256 FROM clips WHERE number = ?"
        ((name, content),) = database.execute(query, [int(order[number])])
        return name, content

    database.executemany("INSERT INTO found VALUES (?, ?, ?, ?, ?)", list(found()))


def _exact_copies(database: sqlite3.Connection, place: np.ndarray) -> dict[int, int]:
    """The sources whose content another one has that is preferred, by their places, each with its."""
    copies: dict[int, int] = {}
    query = "SELECT group_concat(number) FROM clips GROUP BY sha256 HAVING count(*) > 1"
    for (numbers,) in database.execute(query):
        first, *others = sorted(int(place[int(number)]) for number in numbers.split(","))
        copies |= dict.fromkeys(others, first)
    return copies
