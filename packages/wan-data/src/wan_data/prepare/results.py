"""Results of a preparation: finished shards, the manifest that lists them, and its summary as text."""

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_data.prepare.probe import PlannedSource, ProbeResult, RejectedSource
from wan_data.prepare.shard_batches import ShardBatch, ShardPlan
from wan_data.prepare.work_files import WorkRecord
from wan_data.reading.packing import latent_tokens
from wan_data.shards.manifest import Manifest, ShapeCount, SourceRecord, caption_digest
from wan_data.shards.writer import ShardRecord


@dataclasses.dataclass(frozen=True)
class FinishedShard(WorkRecord):
    """A finished shard.

    Attributes:
        record: its entry in the manifest; None if none of its windows could be encoded.
        samples: number of samples of each source, by name.
        shapes: frames, height, width, latent shape and number of samples.
        dropped: source, window number and reason of each window that could not be encoded.
        cut: tokens of each caption that is longer than the text encoder takes, by the name of its source.
    """

    record: ShardRecord | None
    samples: dict[str, int]
    shapes: tuple[tuple[int, int, int, tuple[int, ...], int], ...]
    dropped: tuple[tuple[str, int, str], ...]
    cut: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PrepareResult:
    """What a preparation has done.

    Attributes:
        manifest: as written beside the shards.
        changed: a sentence for each source that has changed and is not encoded again, without ``update``.
        kept: why a changed source cannot be used as it is now, by name; its samples stay.
        missing: names of sources that are no longer there and whose samples stay.
        updated: names of changed sources that were encoded again.
        removed: names of sources that are no longer there and whose samples were removed.
    """

    manifest: Manifest
    changed: tuple[str, ...] = ()
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def with_rejected(manifest: Manifest, results: Sequence[ProbeResult]) -> Manifest:
    """The manifest with the rejected sources of this run added."""
    records = {record.path: record for record in manifest.sources}
    for result in results:
        if isinstance(result, RejectedSource):
            records[result.name] = _rejected(result)
    return dataclasses.replace(manifest, sources=tuple(sorted(records.values(), key=lambda record: record.path)))


def with_current_rejects(manifest: Manifest, names: Collection[str]) -> Manifest:
    """The manifest without the files that an earlier run rejected and that are not among these any more."""
    left = tuple(one for one in manifest.sources if one.verdict == "accepted" or one.path in names)
    return dataclasses.replace(manifest, sources=left)


def known_splits(manifest: Manifest, results: Sequence[ProbeResult]) -> dict[str, str]:
    """The split of each content (by sha256) that a dataset has, or that replaces what it has.

    What replaces a file stays in its split, because it may show the same.
    """
    by_name = {record.path: record.split for record in manifest.sources if record.split is not None}
    splits = {record.sha256: record.split for record in manifest.sources if record.sha256 and record.split is not None}
    for result in results:
        if isinstance(result, PlannedSource) and result.name in by_name:
            splits.setdefault(result.sha256, by_name[result.name])
    return splits


def _rejected(source: RejectedSource) -> SourceRecord:
    return SourceRecord(source.name, "rejected", source.reason, sha256=source.sha256, bytes=source.bytes)


def without_failed(
    batch: ShardBatch, finished: Sequence[FinishedShard]
) -> tuple[ShardBatch, tuple[str, ...], dict[str, str]]:
    """A batch without the changed sources of which no window could be encoded: they keep the samples that they have.

    Returns:
        The batch; the sources whose samples are to be removed; the reason for each source that keeps its samples.
    """
    encoded = {name for shard in finished for name, count in shard.samples.items() if count}
    dropped = {name: reason for shard in finished for name, _, reason in shard.dropped}
    kept = {name: dropped[name] for name in batch.replaced if name not in encoded}
    accepted = tuple((source, split) for source, split in batch.accepted if source.name not in kept)
    removed = (*(name for name in batch.replaced if name not in kept), *batch.removed)
    return dataclasses.replace(batch, accepted=accepted), removed, kept


def with_shard_batch(
    manifest: Manifest, batch: ShardBatch, plans: Sequence[ShardPlan], finished: Sequence[FinishedShard]
) -> Manifest:
    """The manifest with a finished batch of shards added."""
    shards_of: dict[str, dict[str, int]] = collections.defaultdict(dict)
    dropped: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
    cut: dict[str, int] = {}
    shapes: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for shape in manifest.shapes:
        shapes[shape.split, shape.frames, shape.height, shape.width, shape.latent] += shape.samples
    for plan, shard in zip(plans, finished, strict=True):
        for frames, height, width, latent, count in shard.shapes:
            shapes[plan.split, frames, height, width, latent] += count
        for name, count in shard.samples.items():
            assert shard.record is not None, "a shard with samples was written"
            shards_of[name][shard.record.name] = count
        for name, window, reason in shard.dropped:
            dropped[name].append((window, reason))
        cut |= shard.cut
    sources = {record.path: record for record in with_rejected(manifest, batch.rejected).sources}
    for source, split in batch.accepted:
        sources[source.name] = _accepted(
            source, split, shards_of[source.name], dropped[source.name], cut.get(source.name)
        )
    return dataclasses.replace(
        manifest,
        complete=True,
        sources=tuple(sorted(sources.values(), key=lambda record: record.path)),
        shards=tuple(
            sorted(
                [*manifest.shards, *(shard.record for shard in finished if shard.record is not None)],
                key=lambda shard: shard.name,
            )
        ),
        shapes=tuple(
            ShapeCount(split, frames, height, width, latent, latent_tokens(latent), count)
            for (split, frames, height, width, latent), count in sorted(shapes.items())
        ),
        next_shard=manifest.next_shard + len(plans),
    )


def _accepted(
    source: PlannedSource,
    split: str,
    samples: Mapping[str, int],
    dropped: Sequence[tuple[int, str]],
    cut: int | None,
) -> SourceRecord:
    record = SourceRecord(
        path=source.name,
        verdict="accepted",
        split=split,
        sha256=source.sha256,
        bytes=source.bytes,
        samples=sum(samples.values()),
        shards=tuple(sorted(samples)),
        dropped=tuple(dropped),
        frames=source.info.frames,
        source_fps=source.info.source_fps,
        height=source.info.height,
        width=source.info.width,
        caption_sha256=caption_digest(source.caption),
        caption_tokens=cut,
    )
    if record.samples:
        return record
    return dataclasses.replace(record, verdict="rejected", reason=dropped[0][1], split=None, caption_sha256=None)


def summary_lines(result: PrepareResult, folder: Path) -> list[str]:
    """The summary that ``wan-data prepare`` prints: samples, shapes, what was left out and why, what changed."""
    manifest = result.manifest
    rejected = [source for source in manifest.sources if source.verdict == "rejected"]
    splits = ", ".join(f"{count} {split}" for split, count in manifest.samples.items())
    sizes = {shape.latent for shape in manifest.shapes}
    lines = [
        f"{sum(manifest.samples.values())} samples ({splits}) of {len(sizes)} shapes in {len(manifest.shards)} shards "
        f"from {len(manifest.sources) - len(rejected)} of {len(manifest.sources)} files: {folder}"
    ]
    for shape in manifest.shapes:
        lines.append(
            f"  {shape.split:5} {shape.frames}x{shape.height}x{shape.width}: "
            f"{shape.samples} samples of {shape.tokens} tokens"
        )
    if rejected:
        lines.append(f"Rejected files ({len(rejected)}):")
        lines += [f"  {source.path}: {source.reason}" for source in rejected]
    dropped = [
        f"  {source.path} window {number + 1}: {reason}"
        for source in manifest.sources
        if source.verdict == "accepted"
        for number, reason in source.dropped
    ]
    if dropped:
        lines += [f"Windows of accepted files that could not be encoded ({len(dropped)}):", *dropped]
    cut = [f"  {one.path}: {one.caption_tokens} tokens" for one in manifest.sources if one.caption_tokens is not None]
    if cut:
        lines += [f"Captions cut to {manifest.settings['text_length']} tokens ({len(cut)}):", *cut]
    if result.updated:
        lines.append(f"Changed files, encoded again in place of the samples that they had ({len(result.updated)}):")
        lines += [f"  {name}" for name in result.updated]
    if result.removed:
        lines.append(f"Files that are no longer there, whose samples are removed ({len(result.removed)}):")
        lines += [f"  {name}" for name in result.removed]
    if result.changed:
        lines.append(
            f"Files that have changed since they were encoded, whose samples stay as they are ({len(result.changed)}; "
            "--update encodes them again):"
        )
        lines += [f"  {change}" for change in result.changed]
    if result.kept:
        lines.append(f"Changed files that cannot be used as they are now, and keep their samples ({len(result.kept)}):")
        lines += [f"  {name}: {reason}" for name, reason in result.kept.items()]
    if result.missing:
        lines.append(
            f"Files of the dataset that are not among these any more, whose samples stay ({len(result.missing)}; "
            "--remove-missing removes them):"
        )
        lines += [f"  {name}" for name in result.missing]
    return lines
