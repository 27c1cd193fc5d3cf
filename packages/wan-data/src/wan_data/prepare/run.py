"""``wan-data prepare``: from a folder of clips, or a listing, to a dataset; start, resume and addition of files."""

import contextlib
import dataclasses
import shutil
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path

from wan_data import __version__
from wan_data.energon.version import energon_version
from wan_data.index.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, open_sources, read_manifest
from wan_data.index.sources import SourceIndex, added, batched, delete_unlisted
from wan_data.prepare.local_workers import LocalWorkers
from wan_data.prepare.output_folder import output_folder
from wan_data.prepare.planning import plan_new_batch
from wan_data.prepare.preparation import Preparation
from wan_data.prepare.probing.stage import check_measuring
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.removal import (
    RewrittenShard,
    delete_superseded,
    moved_sources,
    note_superseded,
    rewrite_shard,
    shards_of,
    without_shards,
)
from wan_data.prepare.report import Report
from wan_data.prepare.results import (
    PrepareResult,
    batch_records,
    failed_replacements,
    outdated_rejects,
    with_shard_batch,
)
from wan_data.prepare.settings import PrepareSettings, require_same_settings
from wan_data.prepare.shard_batches import BATCH_NAME, ShardBatch
from wan_data.prepare.shard_writing import ShardFolder
from wan_data.prepare.store_output import output_at
from wan_data.prepare.upgrade import upgrade
from wan_data.prepare.work_files import check_work_folder, read_work_file
from wan_data.prepare.workers import StartWorkers, Work
from wan_data.reading.empty_caption import write_empty_caption
from wan_data.shards.writer import ShardRecord
from wan_data.sources.changes import SourceChanges, find_changes
from wan_data.sources.modification_times import source_times
from wan_data.sources.source import SourceFile, Sources
from wan_data.storage.local_copies import LocalCopies
from wan_data.storage.location import Location, StorePath, location
from wan_model.codec.latent_codec import LatentCodec
from wan_model.latent_spec import LatentSpec
from wan_model.system.files import write_json
from wan_model.system.torchrun import processors
from wan_model.video_shape import SIDE_MULTIPLE, TEMPORAL_STRIDE


def prepare(
    sources: Sources,
    output: Location,
    model: str,
    settings: PrepareSettings,
    *,
    report: Report,
    overwrite: bool = False,
    update: bool = False,
    remove_missing: bool = False,
    device: str = "auto",
    processes: int = 1,
    decoders: int | None = None,
    ranks: Ranks | None = None,
    start_workers: StartWorkers | None = None,
    local_copies: int | None = None,
    work_folder: Path | None = None,
) -> PrepareResult:
    """Write a dataset, resume an interrupted preparation, or bring a finished dataset up to its sources.

    New sources are added. The samples of those that the dataset has already stay as they are, unless the options below
    say otherwise; what has changed is in the result.

    Args:
        sources: of ``wan_data.sources.folder`` or ``wan_data.sources.listing``.
        output: folder of the dataset, or its URL in a store.
        model: folder in diffusers' layout, or a hub id.
        settings: determine the bytes of the shards.
        report: receives the progress.
        overwrite: replace a dataset in the output folder.
        update: encode sources again whose content or caption has changed, and remove the samples that they had. A
            source that cannot be used any more keeps its samples.
        remove_missing: remove the samples of sources that are not among these any more.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        processes: number of encoding processes; the shards do not depend on it.
        decoders: number of decoder processes that probe the sources; one per core if None.
        ranks: the processes that torchrun has started; this process alone if None.
        start_workers: starts those that probe, encode and write, elsewhere; the three above are for this machine.
        local_copies: bytes of the local copies of clips that are in a store; see ``LocalCopies``.
        work_folder: for these copies, and for the state of a dataset in a store; the system's temporary folder and the
            user's cache folder if None.

    Returns:
        The manifest, as written beside the shards, whose sources list the rejected files with their reasons; and what
        has changed of the sources.

    Raises:
        ValueError: no usable source, an output folder that is in use or was made with other settings, a model that
            cannot be loaded, a version of Energon that wan-data does not work with, or no sample for training would
            be left.
    """
    check_measuring(settings)
    energon_version()  # an Energon that cannot read the dataset is refused before anything is encoded
    if overwrite and (update or remove_missing):
        raise ValueError(
            "--overwrite replaces the whole dataset; pass it without --update and --remove-missing, which keep a part"
        )
    if isinstance(location(model), StorePath):
        raise ValueError(f"the model {model} is in a store; copy its folder to a disk, or name one of the hub")
    spec = LatentCodec.from_pretrained(model, load_vae=False, load_text=False, text_length=settings.text_length).spec
    _check_strides(spec, model)
    target, ranks = output_at(location(output), work_folder), ranks or Ranks()
    work = Work(model, ShardFolder(target.folder, settings, spec.fingerprint), report, local_copies)
    with (
        target.opened(ranks),
        LocalCopies(local_copies, folder=work_folder) as copies,
        start_workers(work)
        if start_workers
        else LocalWorkers(work, device, processes, decoders, ranks.local_rank, copies=copies) as workers,
    ):
        of = Preparation(target, model, spec, settings, report, decoders or processors(), ranks, workers, copies)
        return _Run(of).run(sources, overwrite=overwrite, update=update, remove_missing=remove_missing)


def _check_strides(spec: LatentSpec, model: str) -> None:
    """Refuse an autoencoder that cannot encode every window and size that is planned, before anything is probed."""
    pixels = SIDE_MULTIPLE // 2  # a token has 2 x 2 positions
    if TEMPORAL_STRIDE % spec.temporal_stride or pixels % spec.spatial_stride:
        raise ValueError(
            f"the autoencoder of {model} has strides of {spec.temporal_stride} frames and {spec.spatial_stride} pixels "
            f"where clips are cut for {TEMPORAL_STRIDE} and {pixels}; name a model with the autoencoder of Wan 2.1"
        )


class _Run:
    def __init__(self, preparation: Preparation) -> None:
        self.of, self.output, self.ranks = preparation, preparation.output, preparation.ranks
        self.target = preparation.target
        self.work, self.report = preparation.work, preparation.report
        # Why the new version of a changed source cannot be used; on rank 0.
        self._kept: dict[str, str] = {}

    def run(self, sources: Sources, *, overwrite: bool, update: bool, remove_missing: bool) -> PrepareResult:
        with output_folder(self.output, self.ranks, overwrite=overwrite):
            if overwrite and self.ranks.rank == 0:
                self.target.cleared()
            manifest = self._begin()
            if (unfinished := ShardBatch.open(self.work)) is not None:
                self.report.log("resuming the shards that an earlier run has planned")
                manifest = self._encode(unfinished, manifest, "unfinished")
                if self.ranks.rank == 0:
                    self.target.commit(manifest)
            elif self.ranks.rank == 0 and manifest.complete and self.target.restore_metadata(manifest):
                self.report.log("Energon's metadata was damaged and has been written anew")
            changes = self._changes(sources, manifest, all_missing=remove_missing)
            if remove_missing and changes.missing and (rows := [one for one in sources if one.path is None]):
                raise ValueError(
                    f"--remove-missing cannot tell which files are missing while {len(rows)} rows name none "
                    f"({rows[0].name}: {rows[0].problem}); mend the listing first"
                )
            again = changes.changed if update else {}
            gone = changes.missing if remove_missing else ()
            new, manifest, kept = plan_new_batch(self.of, sources, manifest, changes.new, again, gone)
            self._kept |= kept
            if new is not None:
                manifest = self._encode(new, manifest, "new")
            if self.ranks.rank == 0:
                manifest = self._with_empty_caption(self._without_outdated_rejects(sources, manifest))
                if manifest.complete:
                    self.target.commit(manifest)
                delete_superseded(self.output, self.work, manifest)
                delete_unlisted(self.output, manifest.index.parts)
                shutil.rmtree(self.work, ignore_errors=True)
            self.ranks.barrier("end")
        return PrepareResult(
            manifest,
            changed=() if update else tuple(changes.changed.values()),
            kept=dict(sorted(self._kept.items())),
            missing_count=0 if remove_missing else changes.missing_count,
            missing=() if remove_missing else changes.missing,
            updated=tuple(name for name in again if name not in self._kept),
            removed=gone,
        )

    def _changes(self, sources: Sources, manifest: Manifest, *, all_missing: bool) -> SourceChanges:
        """What has changed of the sources of a finished dataset; the same on every rank."""
        path = self.work / "changes.json"
        if not self.ranks.rank:
            with open_sources(self.output, manifest) as index, source_times(self.output) as times:
                found = find_changes(
                    sources,
                    index,
                    manifest.index.counts,
                    times,
                    copies=self.of.copies,
                    caption_key=self.of.settings.caption_key,
                    readers=self.of.readers,
                    all_missing=all_missing,
                    begin=lambda total: self.report.stage("comparing", total),
                    step=self.report.step,
                )
            if self.ranks.world_size > 1:
                write_json(path, dataclasses.asdict(found))
        self.ranks.barrier("compared")
        if self.ranks.rank:
            found = read_work_file(path, SourceChanges)
        self.ranks.barrier("changes-read")  # the first rank may remove the file at once
        return found

    def _begin(self) -> Manifest:
        """The existing manifest, or a new one; the same on every rank."""
        if self.ranks.rank == 0:
            self.work.mkdir(exist_ok=True)
            check_work_folder(self.work)
            if not (self.output / MANIFEST_NAME).is_file():
                Manifest(False, __version__, self.of.spec, self.of.settings.to_dict()).write(self.output)
            manifest = read_manifest(self.output, allow_incomplete=True)
            if manifest.format_version != FORMAT_VERSION:
                self.report.log(f"turning the dataset into format {FORMAT_VERSION}, as wan-data upgrade does")
                self.report.stage("reading", len(manifest.shards))
                manifest = upgrade(self.output, manifest, self.report.step)
        self.ranks.barrier("begin")
        if self.ranks.rank:
            manifest = read_manifest(self.output, allow_incomplete=True)
        require_same_settings(manifest.settings, self.of.settings, self.target.name)
        manifest.latent_spec.require_same(
            self.of.spec, f"the dataset in {self.target.name}", f"the model {self.of.model}"
        )
        return manifest

    def _without_outdated_rejects(self, sources: Iterable[SourceFile], manifest: Manifest) -> Manifest:
        if not manifest.complete:
            return manifest
        with open_sources(self.output, manifest) as index:
            outdated = list(outdated_rejects(index, sources))
        return self.of.commit(manifest, added(self.output, manifest.index, outdated)) if outdated else manifest

    def _encode(self, batch: ShardBatch, manifest: Manifest, name: str) -> Manifest:
        """Write the missing shards of a batch, and then the manifest that lists them."""
        with contextlib.closing(batch):
            if batch.numbers.start < manifest.next_shard:
                if self.ranks.rank == 0:
                    delete_superseded(self.output, self.work, manifest)
                return manifest  # it lists this batch; only the last steps of that run are missing
            missing = [number for number in batch.numbers if not self.of.finished(number).is_file()]
            for number in {*batch.numbers} - {*missing}:  # a damaged record is found before anything is encoded
                self.of.read_finished(number)
            self.ranks.barrier(f"{name}-listed")
            if missing:
                plans = map(batch.shard, self.ranks.claim(missing, name))
                shards = self.of.workers.write_shards(plans, batch.samples(missing))
                with contextlib.closing(self.target.shards_written(shards)) as written:
                    for plan, shard in written:
                        shard.write(self.of.finished(plan.number))
            self.ranks.barrier(f"{name}-written")
            kept = failed_replacements(batch, self.of.read_finished)
            removed = (*(name for name in batch.replaced if name not in kept), *batch.removed)
            with open_sources(self.output, manifest) as index:
                old = shards_of(manifest, index, removed)
                numbers = range(batch.numbers.stop, batch.numbers.stop + len(old))
                self._rewrite_shards(old, numbers, removed, name)
                self.ranks.barrier(f"{name}-rewritten")
                if self.ranks.rank == 0:
                    self._kept |= kept
                    rewritten = [RewrittenShard.read(self._rewritten(number)) for number in numbers]
                    self._finish(batch, manifest, index, old, rewritten, removed)
            self.ranks.barrier(f"{name}-done")
        return read_manifest(self.output)

    def _finish(
        self,
        batch: ShardBatch,
        manifest: Manifest,
        index: SourceIndex,
        old: Sequence[ShardRecord],
        rewritten: Sequence[RewrittenShard],
        removed: Collection[str],
    ) -> None:
        """Write metadata, index and manifest of a batch whose shards are there."""
        complete = with_shard_batch(without_shards(manifest, rewritten), batch, self.of.read_finished)
        if "train" not in complete.samples:
            dropped = (one for number in batch.numbers for one in self.of.read_finished(number).dropped[:1])
            reasons = "; ".join(f"{name}: {reason}" for name, _, reason in islice(dropped, 10))
            raise ValueError(f"no window for training could be encoded: {reasons}")
        moved = moved_sources(index, removed, rewritten)
        records = batch_records(batch, self.of.read_finished, self._kept, moved)
        complete = dataclasses.replace(complete, index=added(self.output, manifest.index, records))
        note_superseded(self.work, [shard.name for shard in old])
        self.target.write_metadata(complete.shards, manifest.shards)
        complete.write(self.output)
        self._remember_times(batch)
        (self.work / BATCH_NAME).unlink()
        delete_superseded(self.output, self.work, complete)

    def _remember_times(self, batch: ShardBatch) -> None:
        with source_times(self.output) as times:
            for some in batched(batch.accepted()):
                times.put({source.name: source.mtime_ns for source, _ in some if source.mtime_ns})

    def _with_empty_caption(self, manifest: Manifest) -> Manifest:
        if manifest.empty_caption is not None or not manifest.complete:
            return manifest
        text = self.of.workers.empty_caption()
        manifest = dataclasses.replace(manifest, empty_caption=write_empty_caption(self.output, text))
        manifest.write(self.output)
        return manifest

    def _rewritten(self, number: int) -> Path:
        return self.work / f"rewritten-{number:06d}.json"

    def _rewrite_shards(
        self, old: Sequence[ShardRecord], numbers: Sequence[int], removed: Collection[str], name: str
    ) -> None:
        missing = [pair for pair in zip(old, numbers, strict=True) if not self._rewritten(pair[1]).is_file()]
        self.ranks.barrier(f"{name}-to-rewrite")
        if missing:
            self.report.stage("rewriting", len(missing))
        for shard, number in self.ranks.claim(missing, f"{name}-rewriting"):
            with self.target.shard_here(shard):
                rewritten = rewrite_shard(self.output, shard, number, removed)
            if rewritten.record is not None:
                self.target.shard_written(rewritten.record)
            rewritten.write(self._rewritten(number))
            self.report.step(f"{shard.name}: {sum(count for *_, count in rewritten.removed)} samples removed")
