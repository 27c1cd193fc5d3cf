"""What is known of a shard when it is written, and the manifest that follows from all of them."""

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_data.prepare.probe import PlannedSource, RejectedSource, Verdict
from wan_data.prepare.shard_batches import Round, ShardPlan
from wan_data.reading.packing import latent_tokens
from wan_data.shards.manifest import Manifest, ShapeCount, SourceRecord
from wan_data.shards.writer import ShardRecord
from wan_model.system.files import write_json


@dataclasses.dataclass(frozen=True)
class FinishedShard:
    """A shard as it was written.

    Attributes:
        record: for the manifest; None where none of its windows could be encoded.
        samples: of each source, by name.
        shapes: frames, height, width, latent shape and count.
        dropped: source, window and reason of each window that could not be encoded.
    """

    record: ShardRecord | None
    samples: dict[str, int]
    shapes: tuple[tuple[int, int, int, tuple[int, ...], int], ...]
    dropped: tuple[tuple[str, int, str], ...]

    def write(self, path: Path) -> None:
        """Write it beside the shards that are done."""
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def read(cls, path: Path) -> "FinishedShard":
        """What ``write`` wrote."""
        value = json.loads(path.read_bytes())
        return cls(
            ShardRecord(**value["record"]) if value["record"] else None,
            value["samples"],
            tuple((*shape[:3], tuple(shape[3]), shape[4]) for shape in value["shapes"]),
            tuple((name, window, reason) for name, window, reason in value["dropped"]),
        )


def with_rejected(manifest: Manifest, verdicts: Sequence[Verdict]) -> Manifest:
    """The manifest with what was rejected this time."""
    records = {record.path: record for record in manifest.sources}
    for verdict in verdicts:
        if isinstance(verdict, RejectedSource):
            records[verdict.name] = _rejected(verdict)
    return dataclasses.replace(manifest, sources=tuple(sorted(records.values(), key=lambda record: record.path)))


def _rejected(source: RejectedSource) -> SourceRecord:
    return SourceRecord(source.name, "rejected", source.reason, sha256=source.sha256, bytes=source.bytes)


def with_round(
    manifest: Manifest, made: Round, plans: Sequence[ShardPlan], finished: Sequence[FinishedShard]
) -> Manifest:
    """The manifest with a round added."""
    places: dict[str, dict[str, int]] = collections.defaultdict(dict)
    dropped: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
    shapes: collections.Counter[tuple[Any, ...]] = collections.Counter()
    for shape in manifest.shapes:
        shapes[shape.split, shape.frames, shape.height, shape.width, shape.latent] += shape.samples
    for plan, shard in zip(plans, finished, strict=True):
        for frames, height, width, latent, count in shard.shapes:
            shapes[plan.split, frames, height, width, latent] += count
        for name, count in shard.samples.items():
            assert shard.record is not None, "a shard with samples was written"
            places[name][shard.record.name] = count
        for name, window, reason in shard.dropped:
            dropped[name].append((window, reason))
    sources = {record.path: record for record in with_rejected(manifest, made.rejected).sources}
    for source, split in made.accepted:
        sources[source.name] = _accepted(source, split, places[source.name], dropped[source.name])
    return dataclasses.replace(
        manifest,
        complete=True,
        sources=tuple(sorted(sources.values(), key=lambda record: record.path)),
        shards=(*manifest.shards, *(shard.record for shard in finished if shard.record is not None)),
        shapes=tuple(
            ShapeCount(split, frames, height, width, latent, latent_tokens(latent), count)
            for (split, frames, height, width, latent), count in sorted(shapes.items())
        ),
        next_shard=made.first_shard + len(plans),
    )


def _accepted(
    source: PlannedSource, split: str, places: Mapping[str, int], dropped: Sequence[tuple[int, str]]
) -> SourceRecord:
    whole = SourceRecord(
        path=source.name,
        verdict="accepted",
        split=split,
        sha256=source.sha256,
        bytes=source.bytes,
        samples=sum(places.values()),
        shards=tuple(sorted(places)),
        dropped=tuple(dropped),
        frames=source.info.frames,
        source_fps=source.info.source_fps,
        height=source.info.height,
        width=source.info.width,
    )
    if whole.samples:
        return whole
    return dataclasses.replace(whole, verdict="rejected", reason=dropped[0][1], split=None)
