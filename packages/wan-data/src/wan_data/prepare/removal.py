"""Removing the samples of sources from a dataset.

A finished shard is never written again under its name: what remains of it goes into a new shard, and the old one is
deleted when the manifest no longer lists it.
"""

import collections
import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from wan_data.index.lengths import LengthCounts, with_lengths
from wan_data.index.manifest import Manifest
from wan_data.index.records import SourceRecord
from wan_data.index.sources import SourceIndex
from wan_data.prepare.work_files import WorkRecord, read_work_file
from wan_data.shards.energon_index import OFFSETS_SUFFIX
from wan_data.shards.reader import members_of, text_lengths
from wan_data.shards.serialization import info_from_json
from wan_data.shards.writer import ShardRecord, ShardWriter, is_shard_name, source_key
from wan_model.system.files import sha256_of, write_json

SUPERSEDED_NAME = "superseded.json"


@dataclasses.dataclass(frozen=True)
class RewrittenShard(WorkRecord):
    """What became of a shard that held samples of removed sources.

    Attributes:
        old: its name.
        record: the shard with the other samples; None if there are none.
        removed: frames, height, width and number of the removed samples.
        kept: names of the sources of the other samples.
        lengths: of the texts of the removed samples; None if an earlier version has written this.
    """

    old: str
    record: ShardRecord | None
    removed: tuple[tuple[int, int, int, int], ...]
    kept: tuple[str, ...]
    lengths: LengthCounts | None = None


def shards_of(manifest: Manifest, index: SourceIndex, sources: Collection[str]) -> list[ShardRecord]:
    """The shards that hold samples of these sources, in the manifest's order."""
    names = {name for record in index.find(sources).values() for name in record.shards}
    return [shard for shard in manifest.shards if shard.name in names]


def check_shard(folder: Path, shard: ShardRecord) -> None:
    """Check that a shard is as the manifest describes it.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / shard.name
    if not path.is_file() or sha256_of(path) != shard.sha256:
        raise ValueError(
            f"{path} is missing or damaged, so that its samples cannot be kept: restore the file and run the same "
            "command again, or pass --overwrite to encode everything again"
        )


def rewrite_shard(folder: Path, shard: ShardRecord, number: int, sources: Collection[str]) -> RewrittenShard:
    """Write a shard again under another number, without the samples of some sources; the others keep their bytes.

    Args:
        folder: of the dataset.
        shard: the shard, which stays as it is.
        number: of the new shard.
        sources: the names of the sources.

    Raises:
        ValueError: the shard is damaged.
    """
    check_shard(folder, shard)
    path = folder / shard.name
    keys = {source_key(name) for name in sources}
    removed: collections.Counter[tuple[int, int, int]] = collections.Counter()
    lengths: list[tuple[int, int] | None] = []
    kept: set[str] = set()
    with ShardWriter(folder, number, shard.split) as new:
        for key, members in members_of(path):
            info = info_from_json(members["json"])
            if key.partition("_")[0] not in keys:
                new.write_members(key, members)
                kept.add(str(info.get("video_path")))
                continue
            removed[info["processed_frames"], info["processed_height"], info["processed_width"]] += 1
            lengths.append(text_lengths(info))
    counts = tuple((*shape, count) for shape, count in sorted(removed.items()))
    return RewrittenShard(shard.name, new.record, counts, tuple(sorted(kept)), LengthCounts.of_samples(lengths))


def moved_sources(
    index: SourceIndex, sources: Collection[str], rewritten: Sequence[RewrittenShard]
) -> list[SourceRecord]:
    """The records of sources whose samples have moved to other shards, by path.

    Args:
        index: of the dataset.
        sources: the names of the sources whose samples were removed.
        rewritten: the results of ``rewrite_shard`` for each of ``shards_of``.
    """
    names = {shard.old: shard.record.name for shard in rewritten if shard.record is not None}
    kept = {name for shard in rewritten for name in shard.kept} - {*sources}
    return [
        dataclasses.replace(record, shards=tuple(names.get(name, name) for name in record.shards))
        for _, record in sorted(index.find(sorted(kept)).items())
    ]


def without_shards(manifest: Manifest, rewritten: Sequence[RewrittenShard]) -> Manifest:
    """The manifest with the rewritten shards, and without the samples that were removed from them."""
    by_old = {shard.old: shard for shard in rewritten}
    removed: collections.Counter[tuple[str, int, int, int]] = collections.Counter()
    shards, lengths = [], []
    for shard in manifest.shards:
        if shard.name not in by_old:
            shards.append(shard)
            continue
        new = by_old[shard.name]
        if new.record is not None:
            shards.append(new.record)
        for frames, height, width, count in new.removed:
            removed[shard.split, frames, height, width] += count
        lengths.append((shard.split, new.lengths, -1))
    shapes = [
        dataclasses.replace(
            shape, samples=shape.samples - removed[shape.split, shape.frames, shape.height, shape.width]
        )
        for shape in manifest.shapes
    ]
    return dataclasses.replace(
        manifest,
        shards=tuple(shards),
        shapes=tuple(shape for shape in shapes if shape.samples),
        lengths=with_lengths(manifest.lengths, lengths),
        # A number is never used twice, also if nothing remains of a shard.
        next_shard=manifest.next_shard + len(rewritten),
    )


def note_superseded(work: Path, names: Sequence[str]) -> None:
    """Note shards that are to be deleted when the manifest no longer lists them."""
    write_json(work / SUPERSEDED_NAME, {"shards": [*_superseded(work), *names]})


def _superseded(work: Path) -> list[str]:
    path = work / SUPERSEDED_NAME
    try:
        names = list(read_work_file(path, _Superseded).shards)
    except FileNotFoundError:
        return []
    for name in names:
        if not is_shard_name(name):  # it will be deleted
            raise ValueError(f"{path} has {name[:80]!r}, which is no name of a shard; remove it and run again")
    return names


@dataclasses.dataclass(frozen=True)
class _Superseded:
    """The content of the file."""

    shards: tuple[str, ...]


def delete_superseded(folder: Path, work: Path, manifest: Manifest) -> None:
    """Delete the noted shards that the manifest does not list, also those of a run that was interrupted."""
    for name in {*_superseded(work)} - {shard.name for shard in manifest.shards}:
        for file in (folder / name, folder / (name + OFFSETS_SUFFIX)):
            file.unlink(missing_ok=True)
    (work / SUPERSEDED_NAME).unlink(missing_ok=True)
