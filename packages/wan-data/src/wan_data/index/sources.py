"""The sources of a dataset, over all files of its index: a later file's record of a path hides an earlier one's."""

import collections
import contextlib
import dataclasses
import heapq
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from wan_data.index.part import FIELDS, Part, Row, row_of, write_part
from wan_data.index.records import (
    ACCEPTED,
    DUPLICATE,
    LEFT_OUT,
    PART_GLOB,
    REJECTED,
    REMOVED,
    UNSELECTED,
    PartRecord,
    SourceCounts,
    SourceRecord,
    is_notable,
)
from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import download, look

T = TypeVar("T")
# Paths that are looked up together.
_TOGETHER = 5_000
# A file is merged into the new one if it has at most so many times its records.
_MERGED_UP_TO = 2


class SourceIndex:
    """The records of sources; a context manager that closes its files.

    Args:
        parts: the files, open, the oldest first.
        copies: a folder of copies, which is deleted with this object; None if there is none.
    """

    def __init__(self, parts: Sequence[Part], copies: "tempfile.TemporaryDirectory[str] | None" = None) -> None:
        self._parts, self._copies = parts, copies

    @classmethod
    def open(cls, folder: Location, records: Sequence[PartRecord]) -> "SourceIndex":
        """Open the files of an index; those of a store are copied to the disk meanwhile.

        Raises:
            ValueError: one is missing or damaged.
        """
        with contextlib.ExitStack() as stack:
            copies = None
            if isinstance(folder, StorePath):
                copies = tempfile.TemporaryDirectory(prefix="wan-data-")
                here = Path(stack.enter_context(copies))
                for record in records:
                    with contextlib.suppress(FileNotFoundError):  # said below
                        download(look(folder / record.name), here / record.name)
            else:
                here = folder
            parts = [stack.enter_context(contextlib.closing(Part.open(here, record))) for record in records]
            stack.pop_all()
        return cls(parts, copies)

    def __enter__(self) -> "SourceIndex":
        """Nothing to do; the files are open."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        for part in self._parts:
            part.close()
        if self._copies is not None:
            self._copies.cleanup()

    def find(self, paths: Iterable[str]) -> dict[str, SourceRecord]:
        """The records of those paths that the dataset knows."""
        found: dict[str, SourceRecord] = {}
        for chunk in batched(paths):
            left = dict.fromkeys(chunk)
            for part in reversed(self._parts):
                for record in part.find(list(left)):
                    found[record.path] = record
                    del left[record.path]
        return {path: record for path, record in found.items() if record.verdict != REMOVED}

    def splits_of(self, contents: Iterable[str]) -> dict[str, str]:
        """The split of each content (by sha256) that a source with samples has."""
        splits: dict[str, str] = {}
        for chunk in batched(contents):
            records = [record for part in self._parts for record in part.find_contents(chunk)]
            now = self.find({record.path for record in records})
            for record in now.values():
                if record.sha256 is not None and record.split is not None:
                    splits[record.sha256] = record.split
        return splits

    def notable(self) -> Iterator[SourceRecord]:
        """The records of which something is to be said (see ``is_notable``), by path."""
        found = heapq.merge(*(part.notable() for part in self._parts), key=lambda record: record.path)
        for chunk in batched(path for path, _ in itertools.groupby(found, key=lambda record: record.path)):
            now = self.find(chunk)
            yield from (record for _, record in sorted(now.items()) if is_notable(record))

    def rejects(self) -> Iterator[SourceRecord]:
        """The records of sources without samples, rejected or left out, by path."""
        return (record for record in self.notable() if record.verdict in (REJECTED, *LEFT_OUT))

    def selected(self, condition: str, parameters: Sequence[float], fps: float) -> Iterator[SourceRecord]:
        """The records that fulfil a condition, by path; see ``Part.selected``."""
        found = heapq.merge(
            *(part.selected(condition, parameters, fps) for part in self._parts), key=lambda record: record.path
        )
        # Of a path the last one is that of the newest file, which another may hide.
        newest = (list(records)[-1] for _, records in itertools.groupby(found, key=lambda record: record.path))
        for chunk in batched(newest):
            now = self.find(record.path for record in chunk)
            yield from (record for record in chunk if now.get(record.path) == record)

    def accepted(self) -> Iterator[SourceRecord]:
        """The records of sources with samples, by path."""
        return (record for record in self.records() if record.verdict == ACCEPTED)

    def records(self) -> Iterator[SourceRecord]:
        """All records, by path."""
        for part, row in _merged(self._parts):
            if row[1] != REMOVED:
                yield part.record_of(row)

    def values(self, names: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """These fields of each record, by path, as the files hold them; no record is made."""
        places = [FIELDS.index(name) for name in names]
        return (tuple(row[place] for place in places) for _, row in _merged(self._parts) if row[1] != REMOVED)

    def rows(self) -> Iterator[Row]:
        """The rows as one file would have them, those of removed sources among them."""
        return (row for _, row in _merged(self._parts))


def _merged(parts: Sequence[Part]) -> Iterator[tuple[Part, Row]]:
    """The newest row of each path, by path."""

    def of(number: int) -> Iterator[tuple[str, int, Row]]:
        return ((row[0], -number, row) for row in parts[number].rows())

    last = None
    for path, number, row in heapq.merge(*map(of, range(len(parts))), key=lambda found: found[:2]):
        if path != last:
            yield parts[-number], row
        last = path


def batched(values: Iterable[T]) -> Iterator[list[T]]:
    """The values in lists, of paths that are looked up together."""
    rest = iter(values)
    while chunk := list(itertools.islice(rest, _TOGETHER)):
        yield chunk


def not_among(records: Iterable[SourceRecord], names: Iterable[str]) -> Iterator[SourceRecord]:
    """The records of other paths than these; both come by ascending names, and none is kept."""
    rest = iter(names)
    name = next(rest, None)
    for record in records:
        while name is not None and name < record.path:
            name = next(rest, None)
        if name != record.path:
            yield record


@dataclasses.dataclass(frozen=True)
class IndexState:
    """What a manifest says of its index.

    Attributes:
        parts: the files, the oldest first.
        next_part: number of the next one.
        counts: of the sources.
    """

    parts: tuple[PartRecord, ...] = ()
    next_part: int = 0
    counts: SourceCounts = dataclasses.field(default_factory=SourceCounts)


def added(folder: Path, state: IndexState, records: Iterable[SourceRecord]) -> IndexState:
    """Write the records of changed sources into a new file of the index, whose other files stay as they are.

    Small files are merged into one, so that there are few; each record is written again a number of times that grows
    with the logarithm of the number of sources only.

    Args:
        folder: of the dataset.
        state: of the index.
        records: by ascending paths; one of the verdict ``removed`` hides what is there. Those that say nothing new are
            left out.

    Returns:
        The state with them, which is that of the dataset when a manifest says so; the same if nothing is new.
    """
    counts = _Counts(state.counts)
    with SourceIndex.open(folder, state.parts) as index:
        written = write_part(folder, state.next_part, _differing(index, records, counts))
    if not written.records:
        (folder / written.name).unlink()
        return state
    parts, number, size = [*state.parts, written], state.next_part + 1, 0
    merged = 0
    while merged < len(parts) and parts[-1 - merged].records <= max(size * _MERGED_UP_TO, written.records):
        size += parts[-1 - merged].records
        merged += 1
    if merged > 1:
        whole = merged == len(parts)  # nothing is left that a removed source would be visible in
        with SourceIndex.open(folder, parts[-merged:]) as index:
            one = write_part(folder, number, (row for row in index.rows() if not (whole and row[1] == REMOVED)))
        (folder / written.name).unlink()
        parts, number = [*parts[:-merged], one], number + 1
    return IndexState(tuple(parts), number, counts.now())


def _differing(index: SourceIndex, records: Iterable[SourceRecord], counts: "_Counts") -> Iterator[Row]:
    for chunk in batched(records):
        known = index.find([record.path for record in chunk])
        for record in chunk:
            before = known.get(record.path)
            if before == record or (before is None and record.verdict == REMOVED):
                continue
            counts.add(before, -1)
            counts.add(record, 1)
            yield row_of(record)


class _Counts:
    """Counts the sources of a dataset while they change."""

    def __init__(self, counts: SourceCounts) -> None:
        self._accepted, self._others = (
            collections.Counter(counts.accepted),
            collections.Counter(
                dropped=counts.dropped,
                **{REJECTED: counts.rejected, UNSELECTED: counts.unselected, DUPLICATE: counts.duplicates},
            ),
        )

    def add(self, record: SourceRecord | None, by: int) -> None:
        if record is not None and record.verdict == ACCEPTED and record.split is not None:
            self._accepted[record.split] += by
            self._others["dropped"] += by * bool(record.dropped)
        elif record is not None and record.verdict in (REJECTED, *LEFT_OUT):
            self._others[record.verdict] += by

    def now(self) -> SourceCounts:
        accepted = {split: number for split, number in sorted(self._accepted.items()) if number}
        others = self._others
        return SourceCounts(accepted, others[REJECTED], others["dropped"], others[UNSELECTED], others[DUPLICATE])


def counted(records: Iterable[SourceRecord]) -> SourceCounts:
    """The counts of these records."""
    counts = _Counts(SourceCounts())
    for record in records:
        counts.add(record, 1)
    return counts.now()


def delete_unlisted(folder: Path, parts: Sequence[PartRecord]) -> None:
    """Delete the files of an index that it does not list: earlier ones, and those of a run that was interrupted."""
    for path in folder.glob(PART_GLOB):
        if path.name not in {part.name for part in parts}:
            path.unlink(missing_ok=True)
