"""How the measures of many clips are distributed, in bounded memory: in a temporary file of SQLite."""

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from wan_data.curation.measures import MEASURE_NAMES

BINS = 40
# Clips of each end that are named.
ENDS = 4
_PLACES = {"least": 0.0, "low": 0.05, "median": 0.5, "high": 0.95, "most": 1.0}


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Of one measure.

    Attributes:
        clips: number of those that have it.
        least, low, median, high, most: the value that 0, 5, 50, 95 and 100 % of the clips do not exceed.
        histogram: numbers of clips between ``least`` and ``most``, in 40 parts of equal width; in one if all are equal.
        lowest, highest: values and names of the clips of both ends, the outermost first.
    """

    clips: int
    least: float
    low: float
    median: float
    high: float
    most: float
    histogram: tuple[int, ...]
    lowest: tuple[tuple[float, str], ...]
    highest: tuple[tuple[float, str], ...]


def distributions(clips: Iterable[tuple[str, Sequence[float | None]]]) -> dict[str, Distribution]:
    """The distribution of each measure that any clip has.

    Args:
        clips: name of each, and its values in the order of ``MEASURE_NAMES``; None for what was not measured.
    """
    # Without a name, SQLite keeps it in its cache, and what is more in a file that it deletes.
    with contextlib.closing(sqlite3.connect("", isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("BEGIN")
        database.execute(f"CREATE TABLE clips (name TEXT, {', '.join(f'{name} REAL' for name in MEASURE_NAMES)})")
        marks = ", ".join("?" * (1 + len(MEASURE_NAMES)))
        database.executemany(f"INSERT INTO clips VALUES ({marks})", ((name, *values) for name, values in clips))
        found = {name: _of(database, name) for name in MEASURE_NAMES}
        return {name: one for name, one in found.items() if one is not None}


def _of(database: sqlite3.Connection, name: str) -> Distribution | None:
    database.execute(f"CREATE INDEX by_{name} ON clips ({name}) WHERE {name} IS NOT NULL")
    of = f"FROM clips WHERE {name} IS NOT NULL"
    ((count,),) = database.execute(f"SELECT count(*) {of}")
    if not count:
        return None
    places = {}
    for place, share in _PLACES.items():
        query = f"SELECT {name} {of} ORDER BY {name} LIMIT 1 OFFSET ?"
        ((places[place],),) = database.execute(query, [max(0, -int(-share * count // 1) - 1)])
    least, width = places["least"], places["most"] - places["least"]
    bins = [0] * (BINS if width else 1)
    part = f"min({len(bins) - 1}, CAST(({name} - ?) * ? AS INTEGER))"
    for number, clips in database.execute(
        f"SELECT {part} AS part, count(*) {of} GROUP BY part", [least, len(bins) / width if width else 0.0]
    ):
        bins[number] = clips
    ends = [
        tuple(database.execute(f"SELECT {name}, name {of} ORDER BY {name} {way}, rowid {way} LIMIT {ENDS}"))
        for way in ("ASC", "DESC")
    ]
    return Distribution(count, **places, histogram=tuple(bins), lowest=ends[0], highest=ends[1])


def measures_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each measure, of the fields of its ``Distribution``."""
    table = Table(title="measures of the clips", title_justify="left")
    for column in ("measure", "clips", "least", "5 %", "median", "95 %", "most"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, one in found.items():
        table.add_row(name, str(one["clips"]), *(f"{one[place]:.3g}" for place in _PLACES))
    return table
