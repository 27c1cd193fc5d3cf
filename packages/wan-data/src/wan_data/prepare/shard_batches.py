"""Planning a batch of shards: which windows of which sources go into which shard, before anything is encoded.

The plan is written to a file first. The shards therefore depend neither on the number of processes, nor on their speed,
nor on an interruption. Files that are added later make another batch, with further shard numbers.
"""

import dataclasses
import hashlib
import itertools
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from wan_data.index.sources import batched
from wan_data.prepare.planned_source import PlannedSource, RejectedSource
from wan_data.prepare.probing.results import Again, ProbeResults, planned_of_json, rejected_of_json
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.work_files import remedy_named
from wan_data.shards.database import damage_named, new_database, open_database

BATCH_NAME = "round.sqlite"
SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class SourceWindows:
    """A range of the windows of one source.

    Attributes:
        source: the source.
        windows: their numbers.
        file: the local copy of an object of a store, while it is encoded.
        problem: the reason why there is none.
    """

    source: PlannedSource
    windows: range
    file: Path | None = None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """The content of one shard.

    Attributes:
        number: of the shard, counted over all batches.
        split: the split it belongs to.
        parts: windows of its sources, in order.
    """

    number: int
    split: str
    parts: tuple[SourceWindows, ...]

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(len(part.windows) for part in self.parts)

    def windows(self) -> Iterator[tuple[PlannedSource, int]]:
        """Source and window number of each sample, in order."""
        return ((part.source, number) for part in self.parts for number in part.windows)


# -- splits ------------------------------------------------------------------------------------------------------------


class HasContent(Protocol):
    """A source, of which the digest of its content is known."""

    @property
    def sha256(self) -> str:
        """The digest."""


S = TypeVar("S", bound=HasContent)


def with_splits(
    accepted: Iterable[S], settings: PrepareSettings, known: "KnownSplits | None"
) -> Iterator[tuple[S, str]]:
    """Each accepted source with its split.

    The split follows from the source's content and the seed alone. Files that are added later therefore change nothing
    for the existing ones, and files of equal content are in the same split. In the first batch both splits get at least
    one source, if there are two.

    Args:
        accepted: the sources; read several times.
        settings: of the preparation.
        known: splits of the contents that earlier batches have encoded; None in the first batch.
    """
    fixed: Mapping[str, str] = {}
    if known is None:
        fixed = _extremes((one.sha256 for one in accepted), settings)
    for chunk in batched(accepted):
        splits = fixed if known is None else known({source.sha256 for source in chunk})
        for source in chunk:
            content = source.sha256
            drawn = "val" if _draw(content, settings.seed) < settings.validation_fraction else "train"
            yield source, splits.get(content) or drawn


KnownSplits = Callable[[Collection[str]], Mapping[str, str]]


def _extremes(contents: Iterable[str], settings: PrepareSettings) -> dict[str, str]:
    """The splits of those contents of a first batch that must be in one."""
    lowest = highest = None
    for content in contents:
        drawn = _draw(content, settings.seed), content
        lowest = drawn if lowest is None else min(lowest, drawn)
        highest = drawn if highest is None else max(highest, drawn)
    if lowest is None or highest is None:
        return {}
    if lowest == highest:
        return {lowest[1]: "train"}
    return {lowest[1]: "val", highest[1]: "train"} if settings.validation_fraction > 0 else {}


def _draw(content: str, seed: int) -> float:
    """A number that is uniform over [0, 1) for random contents."""
    digest = hashlib.sha256(f"{seed}\n{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# -- the batch ---------------------------------------------------------------------------------------------------------

# In the order of a shard's sources. ``about`` has one row.
_TABLES = (
    "CREATE TABLE about (first_shard INTEGER NOT NULL)",
    "CREATE TABLE accepted (split TEXT, name TEXT, windows INTEGER NOT NULL, source TEXT NOT NULL, "
    "PRIMARY KEY (split, name)) WITHOUT ROWID",
    "CREATE TABLE rejected (name TEXT PRIMARY KEY, source TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE removed (name TEXT PRIMARY KEY, replaced INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE shards (number INTEGER PRIMARY KEY, split TEXT NOT NULL, first TEXT NOT NULL, "
    "first_window INTEGER NOT NULL, samples INTEGER NOT NULL)",
)


class ShardBatch:
    """A planned batch of shards: the sources that are encoded together, in a file of an unfinished preparation.

    Attributes:
        numbers: of its shards.
        replaced: names of accepted sources that have samples in the dataset, which the new ones replace.
        removed: names of sources whose samples are removed.
    """

    def __init__(self, database: sqlite3.Connection, path: Path) -> None:
        self._database, self._path = database, path
        (first,) = self._one("SELECT first_shard FROM about", int)
        (count,) = self._one("SELECT count(*) FROM shards", int)
        self.numbers = range(first, first + count)
        gone = list(self._rows("SELECT name, replaced FROM removed ORDER BY name"))
        self.replaced = tuple(name for name, replaced in gone if replaced)
        self.removed = tuple(name for name, replaced in gone if not replaced)

    @classmethod
    def open(cls, folder: Path) -> "ShardBatch | None":
        """The batch that is planned in the folder of an unfinished preparation, or None if there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / BATCH_NAME
        # Without the plan, what has been encoded by it is of no use either.
        with remedy_named(_remedy(path)):
            try:
                database = open_database(path, _TABLES)
            except FileNotFoundError:
                return None
        try:
            return cls(database, path)
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def accepted(self) -> Iterator[tuple[PlannedSource, str]]:
        """The sources to encode, each with its split, in the order of the shards."""
        for split in SPLITS:
            query = "SELECT name, source FROM accepted WHERE split = ? ORDER BY name"
            yield from ((self._planned(text), split) for _, text in self._rows(query, split))

    def rejected(self) -> Iterator[RejectedSource]:
        """The sources that cannot be used, by name."""
        for (text,) in self._rows("SELECT source FROM rejected ORDER BY name"):
            with remedy_named(_remedy(self._path)):
                source = rejected_of_json(text, str(self._path))
            yield source

    def numbers_of(self, split: str) -> list[int]:
        """The numbers of the shards of a split, ascending."""
        return [number for (number,) in self._rows("SELECT number FROM shards WHERE split = ? ORDER BY number", split)]

    def samples(self, numbers: Iterable[int]) -> int:
        """Number of samples of these shards."""
        wanted = {*numbers}
        return sum(samples for number, samples in self._rows("SELECT number, samples FROM shards") if number in wanted)

    def shard(self, number: int) -> ShardPlan:
        """The content of a shard, by its number."""
        split, first, skip, samples = self._one(
            "SELECT split, first, first_window, samples FROM shards WHERE number = ?", (str, str, int, int), number
        )
        parts, left = [], samples
        query = "SELECT source FROM accepted WHERE split = ? AND name >= ? ORDER BY name"
        for (text,) in self._rows(query, split, first):
            source = self._planned(text)
            windows = range(skip, min(len(source.windows), skip + left))
            parts.append(SourceWindows(source, windows))
            left, skip = left - len(windows), 0
            if left <= 0:
                break
        return ShardPlan(number, split, tuple(parts))

    def _planned(self, text: str) -> PlannedSource:
        with remedy_named(_remedy(self._path)):
            return planned_of_json(text, str(self._path))

    def _rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        with remedy_named(_remedy(self._path)), damage_named(str(self._path)):
            # Not yield from, which would close the cursor, perhaps after the database.
            for row in self._database.execute(query, values):  # noqa: UP028
                yield row

    def _one(self, query: str, kinds: type | tuple[type, ...], *values: Any) -> tuple[Any, ...]:
        rows = list(itertools.islice(self._rows(query, *values), 2))
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if len(rows) != 1 or [*map(type, rows[0])] != [*kinds]:
            raise ValueError(
                f"{self._path} is damaged: a number or a text is missing; {_remedy(self._path)} and run the same "
                "command again"
            )
        return rows[0]


def _remedy(path: Path) -> str:
    return f"remove the folder {path.parent}"


def plan_shard_batch(
    folder: Path,
    results: ProbeResults,
    settings: PrepareSettings,
    *,
    first_shard: int,
    known: KnownSplits | None = None,
    replaced: Collection[str] = (),
    removed: Iterable[str] = (),
    check: Callable[[Mapping[str, int]], None] = lambda new: None,
) -> None:
    """Plan a batch of shards, split by split, and write it; the last shard of a split may hold fewer samples.

    Args:
        folder: of the unfinished preparation.
        results: of probing the sources.
        settings: of the preparation.
        first_shard: number of the batch's first shard.
        known: see ``with_splits``.
        replaced: names of those accepted sources whose samples the new ones replace.
        removed: names of sources whose samples are removed.
        check: called with the number of new sources of each split before the plan is there; may refuse it.
    """
    with new_database(folder / BATCH_NAME, _TABLES) as database:
        database.execute("INSERT INTO about VALUES (?)", [first_shard])
        database.executemany(
            "INSERT INTO accepted VALUES (?, ?, ?, ?)",
            (
                (split, entry.name, entry.windows, entry.value)
                for entry, split in with_splits(Again(lambda: results.entries(accepted=True)), settings, known)
            ),
        )
        database.executemany(
            "INSERT INTO rejected VALUES (?, ?)",
            ((entry.name, entry.value) for entry in results.entries(accepted=False)),
        )
        gone = itertools.chain(((name, 1) for name in replaced), ((name, 0) for name in removed))
        database.executemany("INSERT INTO removed VALUES (?, ?)", gone)
        number = first_shard
        for split in SPLITS:
            sizes = database.execute("SELECT name, windows FROM accepted WHERE split = ? ORDER BY name", [split])
            for first, window, samples in _shards(sizes, settings.samples_per_shard):
                database.execute("INSERT INTO shards VALUES (?, ?, ?, ?, ?)", (number, split, first, window, samples))
                number += 1
        check(dict(database.execute("SELECT split, count(*) FROM accepted GROUP BY split")))


def _shards(sources: Iterable[tuple[str, int]], most: int) -> Iterator[tuple[str, int, int]]:
    """The first source, its first window and the number of samples of each shard, from the windows of the sources."""
    begin, filled = ("", 0), 0
    for name, windows in sources:
        window = 0
        while window < windows:
            if not filled:
                begin = name, window
            taken = min(windows - window, most - filled)
            window, filled = window + taken, filled + taken
            if filled == most:
                yield *begin, filled
                filled = 0
    if filled:
        yield *begin, filled


# -- encoding tasks ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EncodeTask:
    """Windows of one shard and one frame size that one process encodes, batched by length.

    Attributes:
        shard: number of the shard.
        parts: in the order of the shard.
    """

    shard: int
    parts: tuple[SourceWindows, ...]


def encode_tasks(plan: ShardPlan, batch_size: int) -> list[EncodeTask]:
    """Divide a shard into tasks that fill an encoder batch wherever there are enough windows of one size."""
    if batch_size == 1:
        return [EncodeTask(plan.number, (part,)) for part in plan.parts]
    open_tasks: dict[Any, list[SourceWindows]] = {}
    tasks: list[EncodeTask] = []
    for part in plan.parts:
        open_parts = open_tasks.setdefault(part.source.size, [])
        open_parts.append(part)
        if sum(len(one.windows) for one in open_parts) >= batch_size:
            tasks.append(EncodeTask(plan.number, tuple(open_tasks.pop(part.source.size))))
    return tasks + [EncodeTask(plan.number, tuple(parts)) for parts in open_tasks.values()]
