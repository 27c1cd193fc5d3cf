"""Results of a preparation: finished shards, the manifest that lists them, and its summary as text."""

import collections
import dataclasses
import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_data.curation.fingerprints import packed_fingerprint
from wan_data.curation.measures import MEASURE_NAMES
from wan_data.index.lengths import LengthCounts, with_lengths
from wan_data.index.manifest import Manifest, ShapeCount, caption_digest, open_sources
from wan_data.index.records import ACCEPTED, LEFT_OUT, REJECTED, REMOVED, UNSELECTED, SourceRecord
from wan_data.index.sources import SourceIndex, not_among
from wan_data.prepare.planned_source import PlannedSource, RejectedSource
from wan_data.prepare.probing.results import ProbeResults
from wan_data.prepare.shard_batches import SPLITS, KnownSplits, ShardBatch
from wan_data.prepare.work_files import WorkRecord
from wan_data.reading.packing import latent_tokens
from wan_data.shards.writer import ShardRecord
from wan_data.sources.source import SourceFile
from wan_data.video.decode import ClipInfo


@dataclasses.dataclass(frozen=True)
class FinishedShard(WorkRecord):
    """A finished shard.

    Attributes:
        record: its entry in the manifest; None if none of its windows could be encoded.
        samples: number of samples of each source, by name.
        shapes: frames, height, width, latent shape and number of samples.
        dropped: source, window number and reason of each window that could not be encoded.
        cut: tokens of each caption that is longer than the text encoder takes, by the name of its source.
        lengths: of the texts of its samples; None if an earlier version has written this.
    """

    record: ShardRecord | None
    samples: dict[str, int]
    shapes: tuple[tuple[int, int, int, tuple[int, ...], int], ...]
    dropped: tuple[tuple[str, int, str], ...]
    cut: dict[str, int] = dataclasses.field(default_factory=dict)
    lengths: LengthCounts | None = None


@dataclasses.dataclass(frozen=True)
class PrepareResult:
    """What a preparation has done.

    Attributes:
        manifest: as written beside the shards.
        changed: a sentence for each source that has changed and is not encoded again, without ``update``.
        kept: why a changed source cannot be used as it is now, by name; its samples stay.
        missing_count: number of the sources that are no longer there and whose samples stay.
        missing: names of these, or of the first thousand.
        updated: names of changed sources that were encoded again.
        removed: names of sources that are no longer there and whose samples were removed.
    """

    manifest: Manifest
    changed: tuple[str, ...] = ()
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    missing_count: int = 0
    missing: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


# -- sources -----------------------------------------------------------------------------------------------------------


def rejected_record(source: RejectedSource) -> SourceRecord:
    """The record of a source that cannot be used, or is left out."""
    record = SourceRecord(source.name, source.verdict, source.reason, sha256=source.sha256, bytes=source.bytes)
    return record if source.info is None else with_found(record, source, source.info)


def with_found(record: SourceRecord, source: PlannedSource | RejectedSource, info: ClipInfo) -> SourceRecord:
    """The record with what decoding and measuring has found of the source."""
    measures = source.measures
    record = dataclasses.replace(
        record,
        frames=info.frames,
        source_fps=info.source_fps,
        height=info.height,
        width=info.width,
        source_frames=info.source_frames,
        orientation=info.orientation,
        mtime_ns=source.mtime_ns if measures is not None or isinstance(source, RejectedSource) else 0,
        duplicate_of=source.duplicate_of,
    )
    if measures is None:
        return record
    return dataclasses.replace(
        record,
        **{name: getattr(measures, name) for name in MEASURE_NAMES},
        cuts=measures.cuts,
        fingerprint=packed_fingerprint(measures.hashes),
    )


def outdated_rejects(index: SourceIndex, sources: Iterable[SourceFile]) -> Iterator[SourceRecord]:
    """Records that hide the files that an earlier run rejected and that are not among these any more, by path.

    Args:
        index: of the dataset.
        sources: by name.
    """
    gone = not_among(index.rejects(), (source.name for source in sources))
    return (SourceRecord(record.path, REMOVED) for record in gone)


def known_splits(index: SourceIndex, results: ProbeResults, changed: Collection[str]) -> KnownSplits:
    """The splits of contents (by sha256) that a dataset has, or that replace what it has.

    What replaces a file stays in its split, because it may show the same.

    Args:
        index: of the dataset.
        results: of probing the sources.
        changed: names of those whose samples the dataset has.
    """
    of_changed: dict[str, str] = {}
    if changed:
        records = index.find(changed)
        for entry in results.entries(accepted=True):
            record = records.get(entry.name)
            if record is not None and record.split is not None:
                of_changed.setdefault(entry.sha256, record.split)
    return lambda contents: {**of_changed, **index.splits_of(contents)}


Finished = Callable[[int], FinishedShard]


def failed_replacements(batch: ShardBatch, finished: Finished) -> dict[str, str]:
    """The changed sources of which no window could be encoded, each with the reason: they keep their samples.

    Args:
        batch: that is encoded.
        finished: reads the record of a finished shard, by its number.
    """
    replaced = {*batch.replaced}
    encoded: set[str] = set()
    dropped: dict[str, str] = {}
    for shard in map(finished, batch.numbers if replaced else ()):
        encoded |= {name for name, count in shard.samples.items() if count} & replaced
        dropped |= {name: reason for name, _, reason in shard.dropped if name in replaced}
    return {name: dropped[name] for name in batch.replaced if name not in encoded}


def batch_records(
    batch: ShardBatch, finished: Finished, kept: Collection[str], moved: Iterable[SourceRecord]
) -> Iterator[SourceRecord]:
    """The records of all sources that a finished batch has changed, by path.

    Args:
        batch, finished: see ``failed_replacements``.
        kept: names of its sources that keep the samples that they have.
        moved: records of sources whose samples are in other shards now.
    """
    accepted = [
        (record for record in _accepted_records(batch, finished, split) if record.path not in kept) for split in SPLITS
    ]
    rejected = map(rejected_record, batch.rejected())
    removed = (SourceRecord(name, REMOVED) for name in batch.removed)
    return heapq.merge(*accepted, rejected, removed, moved, key=lambda record: record.path)


def _accepted_records(batch: ShardBatch, finished: Finished, split: str) -> Iterator[SourceRecord]:
    """The records of the sources of a split, which shards may share."""
    open_source: _OpenRecord | None = None
    for number in batch.numbers_of(split):
        shard = finished(number)
        for part in batch.shard(number).parts:
            if open_source is None or open_source.source.name != part.source.name:
                if open_source is not None:
                    yield open_source.record(split)
                open_source = _OpenRecord(part.source)
            open_source.add(shard)
    if open_source is not None:
        yield open_source.record(split)


class _OpenRecord:
    """A source whose shards are being read."""

    def __init__(self, source: PlannedSource) -> None:
        self.source = source
        self._samples: dict[str, int] = {}
        self._dropped: list[tuple[int, str]] = []
        self._cut: int | None = None

    def add(self, shard: FinishedShard) -> None:
        name = self.source.name
        if count := shard.samples.get(name):
            assert shard.record is not None, "a shard with samples was written"
            self._samples[shard.record.name] = count
        self._dropped += [(window, reason) for of, window, reason in shard.dropped if of == name]
        self._cut = shard.cut.get(name, self._cut)

    def record(self, split: str) -> SourceRecord:
        source = self.source
        record = SourceRecord(
            path=source.name,
            verdict=ACCEPTED,
            split=split,
            sha256=source.sha256,
            bytes=source.bytes,
            samples=sum(self._samples.values()),
            shards=tuple(sorted(self._samples)),
            dropped=tuple(self._dropped),
            caption_sha256=caption_digest(source.caption),
            caption_tokens=self._cut,
        )
        record = with_found(record, source, source.info)
        if record.samples:
            return record
        reason = self._dropped[0][1]
        return dataclasses.replace(
            record, verdict=REJECTED, reason=reason, split=None, caption_sha256=None, duplicate_of=None
        )


# -- the manifest ------------------------------------------------------------------------------------------------------


def with_shard_batch(manifest: Manifest, batch: ShardBatch, finished: Finished) -> Manifest:
    """The manifest with the shards of a finished batch added; its index stays."""
    shapes: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for shape in manifest.shapes:
        shapes[shape.split, shape.frames, shape.height, shape.width, shape.latent] += shape.samples
    shards, lengths = [*manifest.shards], list[tuple[str, LengthCounts | None, int]]()
    for number in batch.numbers:
        shard = finished(number)
        if shard.record is None:
            continue
        split = shard.record.split
        for frames, height, width, latent, count in shard.shapes:
            shapes[split, frames, height, width, latent] += count
        shards.append(shard.record)
        lengths.append((split, shard.lengths, 1))
    return dataclasses.replace(
        manifest,
        complete=True,
        shards=tuple(sorted(shards, key=lambda shard: shard.name)),
        shapes=tuple(
            ShapeCount(split, frames, height, width, latent, latent_tokens(latent), count)
            for (split, frames, height, width, latent), count in sorted(shapes.items())
        ),
        lengths=with_lengths(manifest.lengths, lengths),
        next_shard=manifest.next_shard + len(batch.numbers),
    )


# -- the summary -------------------------------------------------------------------------------------------------------

# Lines of each kind, and of what was left out as asked for.
_MOST_LINES, _FEWER_LINES = 1_000, 20


def summary_lines(result: PrepareResult, folder: Path, name: str | None = None) -> list[str]:
    """The summary that ``wan-data prepare`` prints: samples, shapes, what was left out and why, what changed.

    Args:
        result: of the preparation.
        folder: that the dataset was made in.
        name: of the dataset; the folder's if None.
    """
    manifest, counts = result.manifest, result.manifest.index.counts
    splits = ", ".join(f"{count} {split}" for split, count in manifest.samples.items())
    sizes = {shape.latent for shape in manifest.shapes}
    lines = [
        f"{sum(manifest.samples.values())} samples ({splits}) of {len(sizes)} shapes in {len(manifest.shards)} shards "
        f"from {sum(counts.accepted.values())} of {counts.total} files: {name or folder}"
    ]
    for shape in manifest.shapes:
        lines.append(
            f"  {shape.split:5} {shape.frames}x{shape.height}x{shape.width}: "
            f"{shape.samples} samples of {shape.tokens} tokens"
        )
    rejected, dropped, cut = _Lines(), _Lines(), _Lines()
    unselected, duplicates, named = (_Lines(most=_FEWER_LINES) for _ in range(3))
    with open_sources(folder, manifest) as index:
        for source in index.notable():
            if source.verdict == REJECTED:
                rejected.add(f"{source.path}: {source.reason}")
                continue
            if source.verdict in LEFT_OUT:
                lines_of = unselected if source.verdict == UNSELECTED else duplicates
                lines_of.add(f"{source.path}: {source.reason}")
                continue
            if source.duplicate_of is not None:
                named.add(f"{source.path}: of {source.duplicate_of}")
            for number, reason in source.dropped:
                dropped.add(f"{source.path} window {number + 1}: {reason}")
            if source.caption_tokens is not None:
                cut.add(f"{source.path}: {source.caption_tokens} tokens")
    lines += rejected.under("Rejected files ({}):")
    lines += dropped.under("Windows of accepted files that could not be encoded ({}):")
    lines += unselected.under("Files left out by --where ({}):")
    lines += duplicates.under("Files left out by --duplicates drop ({}):")
    lines += named.under("Near-duplicates, encoded in the split of the file that they are like ({}):")
    lines += cut.under(f"Captions cut to {manifest.settings['text_length']} tokens ({{}}):")
    for title, found, count in (
        (
            "Changed files, encoded again in place of the samples that they had ({}):",
            result.updated,
            len(result.updated),
        ),
        (
            "Files that are no longer there, whose samples are removed ({}):",
            result.removed,
            len(result.removed),
        ),
        (
            "Files that have changed since they were encoded, whose samples stay as they are ({}; --update encodes "
            "them again):",
            result.changed,
            len(result.changed),
        ),
        (
            "Changed files that cannot be used as they are now, and keep their samples ({}):",
            [f"{name}: {reason}" for name, reason in result.kept.items()],
            len(result.kept),
        ),
        (
            "Files of the dataset that are not among these any more, whose samples stay ({}; --remove-missing removes "
            "them):",
            result.missing,
            result.missing_count,
        ),
    ):
        lines += _Lines(found, count).under(title)
    return lines


class _Lines:
    """Lines of one kind, of which the first are printed."""

    def __init__(self, lines: Sequence[str] = (), count: int = 0, most: int = _MOST_LINES) -> None:
        self._lines, self._count, self._most = [*lines[:most]], count, most

    def add(self, line: str) -> None:
        self._count += 1
        if len(self._lines) < self._most:
            self._lines.append(line)

    def under(self, title: str) -> list[str]:
        """The lines with a title, in which ``{}`` stands for their number; nothing if there are none."""
        if not self._count:
            return []
        more = self._count - len(self._lines)
        return [
            title.format(self._count),
            *(f"  {line}" for line in self._lines),
            *([f"  and {more} more"] * (more > 0)),
        ]
