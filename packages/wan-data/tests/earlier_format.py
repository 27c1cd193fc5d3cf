"""A dataset as the first versions of wan-data wrote it."""

import dataclasses
import json
import shutil
from pathlib import Path

from dataset_sources import records_of

from wan_data.index.manifest import MANIFEST_NAME, read_manifest
from wan_data.index.records import PART_GLOB
from wan_data.sources.modification_times import TIMES_NAME, source_times


def as_format_1(dataset: Path, folder: Path) -> Path:
    """A copy of a dataset whose manifest lists the sources, and whose times are JSON."""
    shutil.copytree(dataset, folder)
    manifest, records = read_manifest(folder), records_of(folder)
    value = json.loads((folder / MANIFEST_NAME).read_text())
    for key in ("index", "lengths"):
        del value[key]
    value["shards"] = [dataclasses.asdict(shard) for shard in manifest.shards]
    sources = [dataclasses.asdict(record) for record in records]
    value |= {"format_version": 1, "sources": sources, "next_shard": manifest.next_shard}
    (folder / MANIFEST_NAME).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    with source_times(folder) as times:
        known = times.find(record.path for record in records)
    (folder / "source-times.json").write_text(json.dumps(known))
    for path in (*folder.glob(PART_GLOB), folder / TIMES_NAME):
        path.unlink()
    return folder
