"""What the index of a dataset holds of its sources."""

from pathlib import Path

from wan_data.index.manifest import open_sources, read_manifest
from wan_data.index.records import SourceRecord


def records_of(folder: Path) -> list[SourceRecord]:
    """All records, by path."""
    with open_sources(folder, read_manifest(folder)) as index:
        return list(index.records())
