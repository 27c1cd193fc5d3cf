"""Planning a batch of shards for what is new, has changed or is missing, from probing to the written plan."""

import collections
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from wan_data.index.manifest import Manifest, open_sources, read_manifest
from wan_data.index.records import ACCEPTED, LEFT_OUT
from wan_data.index.sources import SourceIndex, added, batched
from wan_data.prepare.near_duplicates import without_duplicates
from wan_data.prepare.output_folder import clear
from wan_data.prepare.preparation import Preparation
from wan_data.prepare.probing.results import ProbeResults
from wan_data.prepare.probing.stage import cache_path, delete_results, gathered, known_indices, probe, results_path
from wan_data.prepare.removal import shards_of
from wan_data.prepare.results import known_splits, rejected_record
from wan_data.prepare.shard_batches import ShardBatch, plan_shard_batch
from wan_data.sources.source import SourceFile, Sources


def plan_new_batch(
    of: Preparation,
    sources: Sources,
    manifest: Manifest,
    count: int,
    changed: Mapping[str, str],
    missing: Sequence[str],
) -> tuple[ShardBatch | None, Manifest, dict[str, str]]:
    """Plan shards for new and changed sources, and the removal of missing ones.

    Args:
        of: the preparation.
        sources: all.
        manifest: of the dataset.
        count: number of the new sources.
        changed, missing: names of the others.

    Returns:
        The batch, None if nothing is to be done; the manifest, with newly rejected files if there is no batch; and why
        changed sources cannot be used as they are now, by name, on the first rank.
    """
    kept: dict[str, str] = {}
    total = count + len(changed)
    if not total and not missing:
        return None, manifest, kept
    if of.ranks.rank == 0:
        delete_results(of.work)
    of.ranks.barrier("probing")
    of.workers.warm_up()
    with open_sources(of.output, manifest) as index, known_indices(of.work, of.settings, index) as indices:
        probe(
            of.ranks.partition(_new_sources(sources, index, changed)),
            len(range(of.ranks.rank, total, of.ranks.world_size)),
            of.settings,
            of.report,
            of.workers.probe,
            cache_path(of.work, of.ranks),
            results_path(of.work, of.ranks),
            indices,
        )
        of.ranks.barrier("results")
        if of.ranks.rank == 0:
            kept = _write_batch(of, gathered(of.work, of.ranks), total, manifest, index, changed, missing)
    of.ranks.barrier("planned")
    if (batch := ShardBatch.open(of.work)) is None:
        manifest = read_manifest(of.output)
    return batch, manifest, kept


def _write_batch(
    of: Preparation,
    results: ProbeResults,
    total: int,
    manifest: Manifest,
    index: SourceIndex,
    changed: Mapping[str, str],
    missing: Sequence[str],
) -> dict[str, str]:
    # A changed source that cannot be used now keeps what it has: the reason may be temporary.
    kept = {one.name: one.reason for one in (results.rejected() if changed else ()) if one.name in changed}
    replaced = {*changed, *missing} - {*kept}
    with without_duplicates(results.without(kept), of.settings, of.work, index, replaced) as left:
        again = {one.name: one.reason for one in (left.rejected() if changed else ()) if one.name in changed}
        _write_batch_of(of, left.without(again), total, manifest, index, changed, missing)
    return kept | again


def _write_batch_of(
    of: Preparation,
    left: ProbeResults,
    total: int,
    manifest: Manifest,
    index: SourceIndex,
    changed: Mapping[str, str],
    missing: Sequence[str],
) -> None:
    if not missing and next(left.entries(accepted=True), None) is None:
        if manifest.complete:
            of.commit(manifest, added(of.output, manifest.index, map(rejected_record, left.rejected())))
            return
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in itertools.islice(left.rejected(), 3))
        clear(of.output, keep_known=any(one.verdict in LEFT_OUT for one in left.rejected()))
        raise ValueError(f"none of the {total} files can be used: {reasons}")
    replaced = tuple(entry.name for entry in (left.entries(accepted=True) if changed else ()) if entry.name in changed)
    first = not manifest.index.counts.accepted
    plan_shard_batch(
        of.work,
        left,
        of.settings,
        first_shard=manifest.next_shard,
        known=None if first else known_splits(index, left, changed),
        replaced=replaced,
        removed=missing,
        check=lambda new: _check_batch(of, manifest, index, new, replaced, missing),
    )


def _check_batch(
    of: Preparation,
    manifest: Manifest,
    index: SourceIndex,
    new: Mapping[str, int],
    replaced: Sequence[str],
    missing: Sequence[str],
) -> None:
    """Refuse a batch that would leave nothing to train on, or cannot be finished; ``new`` counts its sources."""
    removed = [*replaced, *missing]
    left = collections.Counter(manifest.index.counts.accepted)
    left.subtract(record.split for record in index.find(removed).values() if record.split is not None)
    left.update(new)
    if not left["train"]:
        raise ValueError(
            f"no sample for training would be left in {of.target.name} without the {len(replaced)} changed and the "
            f"{len(missing)} missing files; check the folder of the clips, or pass --overwrite"
        )
    for shard in shards_of(manifest, index, removed):  # before anything is encoded
        of.target.check_shard(shard)
    if manifest.samples.get("val") and not left["val"]:
        of.report.log("no sample for validation will be left: its files are among those that are missing")
    no_validation = {*new} == {"train"} and not manifest.complete
    if no_validation and of.settings.validation_fraction > 0:
        of.report.log("one content is too few for a validation split: all samples are for training")


def _new_sources(sources: Iterable[SourceFile], index: SourceIndex, changed: Collection[str]) -> Iterator[SourceFile]:
    """The sources that have no samples in the dataset, and those that have changed."""
    for some in batched(sources):
        known = index.find(source.name for source in some)
        for source in some:
            record = known.get(source.name)
            if record is None or record.verdict != ACCEPTED or source.name in changed:
                yield source
