"""The measures of the sources of datasets: their distributions as tables, and sources that fulfil an expression."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from rich.table import Table
from rich.text import Text

from wan_data.curation.distributions import distributions
from wan_data.curation.expressions import compile_where
from wan_data.curation.measures import MEASURE_NAMES
from wan_data.index.manifest import Manifest, open_sources, read_manifest
from wan_data.index.records import ACCEPTED, SourceRecord
from wan_data.storage.location import Location


def measured(datasets: Mapping[Location, Manifest]) -> dict[str, dict[str, Any]]:
    """The distribution of each measure over the sources of datasets, those that were left out among them.

    Args:
        datasets: manifests by the datasets' folders; those whose sources were not measured are left out.

    Returns:
        The fields of ``Distribution`` by the names of the measures; nothing if nothing was measured.

    Raises:
        ValueError: an index is damaged.
    """
    found = distributions(
        clip
        for folder, manifest in datasets.items()
        if manifest.settings.get("measures_version") is not None
        for clip in _values(folder, manifest)
    )
    return {name: dataclasses.asdict(one) for name, one in found.items()}


def _values(folder: Location, manifest: Manifest) -> Iterator[tuple[str, list[float | None]]]:
    """The path and the measures of each source."""
    with open_sources(folder, manifest) as index:
        for path, *values in index.values(("path", *MEASURE_NAMES)):
            if not all(value is None or type(value) is float for value in values):
                raise ValueError(
                    f"{folder} is damaged: of {path} the index has {values} as measures; run wan-data verify"
                )
            yield path, values


def selected_sources(folder: Location, where: str | None, *, rejected: bool) -> Iterator[tuple[SourceRecord, float]]:
    """The sources of a dataset that fulfil an expression, by path, each with its length in seconds.

    Args:
        folder: of the dataset.
        where: see ``wan_data.curation.expressions``; None for all sources.
        rejected: only those without samples: rejected ones, and what was left out.

    Raises:
        ValueError: the expression cannot be read, or the dataset.
    """
    condition = None if where is None else compile_where(where)
    manifest = read_manifest(folder)
    fps = float(Fraction(str(manifest.settings["fps"])))
    with open_sources(folder, manifest) as index:
        records: Iterable[SourceRecord]
        if condition is not None:
            records = index.selected(condition.sql, condition.parameters, fps)
        else:
            records = index.rejects() if rejected else index.records()
        for record in records:
            if not rejected or record.verdict != ACCEPTED:
                yield record, record.frames / fps


def unmeasured_columns(folder: Location, where: str | None) -> list[str]:
    """The measures in an expression, if the sources of a dataset were not measured: no comparison with them is true.

    Raises:
        ValueError: the expression cannot be read, or the dataset.
    """
    if where is None or read_manifest(folder).settings.get("measures_version") is not None:
        return []
    asked = compile_where(where).columns
    return [name for name in MEASURE_NAMES if name in asked]


def json_line(record: SourceRecord, seconds: float) -> str:
    """A record as one line of JSON, without its fingerprint."""
    value = dataclasses.asdict(record) | {"seconds": seconds}
    del value["fingerprint"]
    return json.dumps(value, ensure_ascii=False)


def sources_table(records: Iterable[tuple[SourceRecord, float]]) -> Table:
    """A row for each record."""
    table = Table()
    for column in ("path", "verdict", "split", "samples", "seconds", *MEASURE_NAMES, "why"):
        right = column in ("samples", "seconds", *MEASURE_NAMES)
        table.add_column(column.replace("_", " "), justify="right" if right else "left", overflow="fold")
    for record, seconds in records:
        values = [getattr(record, name) for name in MEASURE_NAMES]
        why = record.reason or (f"near-duplicate of {record.duplicate_of}" if record.duplicate_of else "")
        table.add_row(
            # Of a string, rich takes what is in brackets for its markup.
            *(Text(record.path), record.verdict, record.split or "", str(record.samples), f"{seconds:.2f}"),
            *("" if value is None else f"{value:.3g}" for value in values),
            Text(why),
        )
    return table
