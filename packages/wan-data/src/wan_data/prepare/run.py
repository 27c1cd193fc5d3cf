"""``wan-data prepare``: from a folder of clips, or a listing, to a dataset; start, resume and addition of files."""

import collections
import dataclasses
import itertools
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from wan_data import __version__
from wan_data.energon.version import energon_version
from wan_data.prepare.encoding.encoder import EncodedWindow, TextEmbeddings, choose_device, load_codec, make_sample
from wan_data.prepare.encoding.encoder_pool import EncoderPool
from wan_data.prepare.encoding.preload import preload_encoders
from wan_data.prepare.output_folder import WORK_FOLDER, clear, output_folder
from wan_data.prepare.probe import PlannedSource, ProbeResult, RejectedSource
from wan_data.prepare.probe_stage import cache_path, gathered, probe
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.removal import (
    RewrittenShard,
    check_shard,
    delete_superseded,
    note_superseded,
    rewrite_shard,
    shards_of,
    without_sources,
)
from wan_data.prepare.report import Report
from wan_data.prepare.results import (
    FinishedShard,
    PrepareResult,
    known_splits,
    with_current_rejects,
    with_rejected,
    with_shard_batch,
    without_failed,
)
from wan_data.prepare.settings import PrepareSettings, require_same_settings
from wan_data.prepare.shard_batches import BATCH_NAME, EncodeTask, ShardBatch, ShardPlan, encode_tasks, plan_shard_batch
from wan_data.prepare.work_files import check_work_folder, read_work_file
from wan_data.reading.empty_caption import write_empty_caption
from wan_data.shards.energon_metadata import restore_metadata, write_metadata
from wan_data.shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from wan_data.shards.writer import ShardRecord, ShardWriter
from wan_data.sources.changes import SourceChanges, find_changes
from wan_data.sources.modification_times import read_times, write_times
from wan_data.sources.source import SourceFile
from wan_model.codec.latent_codec import LatentCodec
from wan_model.latent_spec import LatentSpec
from wan_model.system.files import write_json
from wan_model.system.torchrun import processors
from wan_model.video_shape import SIDE_MULTIPLE, TEMPORAL_STRIDE


def prepare(
    sources: Sequence[SourceFile],
    output: Path,
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
) -> PrepareResult:
    """Write a dataset, resume an interrupted preparation, or bring a finished dataset up to its sources.

    New sources are added. The samples of those that the dataset has already stay as they are, unless the options below
    say otherwise; what has changed is in the result.

    Args:
        sources: of ``wan_data.sources.folder`` or ``wan_data.sources.listing``.
        output: folder of the dataset.
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

    Returns:
        The manifest, as written beside the shards, whose sources list the rejected files with their reasons; and what
        has changed of the sources.

    Raises:
        ValueError: no usable source, an output folder that is in use or was made with other settings, a model that
            cannot be loaded, a version of Energon that wan-data does not work with, or no sample for training would
            be left.
    """
    energon_version()  # an Energon that cannot read the dataset is refused before anything is encoded
    if processes < 1:
        raise ValueError(f"{processes} processes cannot encode; it must be at least 1")
    if overwrite and (update or remove_missing):
        raise ValueError(
            "--overwrite replaces the whole dataset; pass it without --update and --remove-missing, which keep a part"
        )
    return _Preparation(Path(output), model, settings, report, device, processes, decoders, ranks or Ranks()).run(
        sources, overwrite=overwrite, update=update, remove_missing=remove_missing
    )


def _check_strides(spec: LatentSpec, model: str) -> None:
    """Refuse an autoencoder that cannot encode every window and size that is planned, before anything is probed."""
    pixels = SIDE_MULTIPLE // 2  # a token has 2 x 2 positions
    if TEMPORAL_STRIDE % spec.temporal_stride or pixels % spec.spatial_stride:
        raise ValueError(
            f"the autoencoder of {model} has strides of {spec.temporal_stride} frames and {spec.spatial_stride} pixels "
            f"where clips are cut for {TEMPORAL_STRIDE} and {pixels}; name a model with the autoencoder of Wan 2.1"
        )


class _Preparation:
    def __init__(
        self,
        output: Path,
        model: str,
        settings: PrepareSettings,
        report: Report,
        device: str,
        processes: int,
        decoders: int | None,
        ranks: Ranks,
    ) -> None:
        self.output, self.model, self.settings, self.report = output, model, settings, report
        self.device, self.processes, self.decoders, self.ranks = device, processes, decoders, ranks
        self.work = output / WORK_FOLDER
        # Modification times of the sources, and why the new version of a changed source cannot be used; on rank 0.
        self._times: dict[str, int] = {}
        self._kept: dict[str, str] = {}
        self._codec: LatentCodec | None = None
        self.spec = LatentCodec.from_pretrained(
            model, load_vae=False, load_text=False, text_length=settings.text_length
        ).spec
        _check_strides(self.spec, model)

    def run(
        self, sources: Sequence[SourceFile], *, overwrite: bool, update: bool, remove_missing: bool
    ) -> PrepareResult:
        with output_folder(self.output, self.ranks, overwrite=overwrite):
            manifest = self._begin()
            if (unfinished := ShardBatch.read(self.work)) is not None:
                self.report.log("resuming the shards that an earlier run has planned")
                manifest = self._encode(unfinished, manifest, "unfinished")
            elif self.ranks.rank == 0 and manifest.complete and restore_metadata(self.output, manifest.shards):
                self.report.log("Energon's metadata was damaged and has been written anew")
            changes = self._changes(sources, manifest)
            if remove_missing and changes.missing and (rows := [one for one in sources if one.path is None]):
                raise ValueError(
                    f"--remove-missing cannot tell which files are missing while {len(rows)} rows name none "
                    f"({rows[0].problem}); mend the listing first"
                )
            again = changes.changed if update else {}
            gone = changes.missing if remove_missing else ()
            new, manifest = self._plan_new_batch(sources, manifest, again, gone)
            if new is not None:
                manifest = self._encode(new, manifest, "new")
            if self.ranks.rank == 0:
                current = with_current_rejects(manifest, {source.name for source in sources})
                if current != manifest and current.complete:
                    current.write(self.output)
                manifest = self._with_empty_caption(current)
                delete_superseded(self.output, self.work, manifest)
                self._write_times(manifest)
                shutil.rmtree(self.work, ignore_errors=True)
            self.ranks.barrier("end")
        return PrepareResult(
            manifest,
            changed=() if update else tuple(changes.changed.values()),
            kept=dict(sorted(self._kept.items())),
            missing=() if remove_missing else changes.missing,
            updated=tuple(name for name in again if name not in self._kept),
            removed=gone,
        )

    def _changes(self, sources: Sequence[SourceFile], manifest: Manifest) -> SourceChanges:
        """What has changed of the sources of a finished dataset; the same on every rank."""
        path = self.work / "changes.json"
        if not self.ranks.rank:
            found = find_changes(
                sources,
                manifest,
                self._times,
                readers=self.decoders or processors(),
                begin=lambda total: self.report.stage("comparing", total),
                step=self.report.step,
            )
            self._times |= found.times
            if self.ranks.world_size > 1:
                write_json(path, {"changed": found.changed, "missing": found.missing})  # only this rank needs the times
        self.ranks.barrier("compared")
        if self.ranks.rank:
            found = read_work_file(path, SourceChanges)
        self.ranks.barrier("changes-read")  # the first rank may remove the file at once
        return found

    def _write_times(self, manifest: Manifest) -> None:
        accepted = manifest.accepted
        write_times(self.output, {name: time for name, time in self._times.items() if name in accepted and time})

    def _begin(self) -> Manifest:
        """The existing manifest, or a new one; the same on every rank."""
        if self.ranks.rank == 0:
            self.work.mkdir(exist_ok=True)
            check_work_folder(self.work)
            if not (self.output / MANIFEST_NAME).is_file():
                Manifest(False, __version__, self.spec, self.settings.to_dict()).write(self.output)
            self._times = read_times(self.output)
        self.ranks.barrier("begin")
        manifest = read_manifest(self.output, allow_incomplete=True)
        require_same_settings(manifest.settings, self.settings, self.output)
        manifest.latent_spec.require_same(self.spec, f"the dataset in {self.output}", f"the model {self.model}")
        return manifest

    def _plan_new_batch(
        self, sources: Sequence[SourceFile], manifest: Manifest, changed: Mapping[str, str], missing: Sequence[str]
    ) -> tuple[ShardBatch | None, Manifest]:
        """Plan shards for new and changed sources, and the removal of missing ones.

        Returns:
            The batch, None if nothing is to be done; and the manifest, with newly rejected files if there is no batch.
        """
        known = manifest.accepted.keys() - changed.keys()
        new = [source for source in sources if source.name not in known]
        if not new and not missing:
            return None, manifest
        if self.ranks.rank == 0:
            # A run that ended after it had planned a batch leaves the results of its own probing.
            for path in self.work.glob("verdicts-*.json"):
                path.unlink()
        self.ranks.barrier("probing")
        if self.processes > 1:
            preload_encoders()  # while the sources are probed
        mine = self.ranks.partition(new)
        results = probe(mine, self.settings, self.report, self.decoders, cache_path(self.work, self.ranks))
        if self.ranks.world_size > 1:
            results = gathered(results, self.work, self.ranks)
        if self.ranks.rank == 0:
            self._write_batch(results, manifest, changed, missing)
        self.ranks.barrier("planned")
        if (batch := ShardBatch.read(self.work)) is None:
            manifest = read_manifest(self.output)
        return batch, manifest

    def _write_batch(
        self, results: list[ProbeResult], manifest: Manifest, changed: Mapping[str, str], missing: Sequence[str]
    ) -> None:
        # A changed source that cannot be used now keeps what it has: the reason may be temporary.
        self._kept |= {
            result.name: result.reason
            for result in results
            if isinstance(result, RejectedSource) and result.name in changed
        }
        results = [result for result in results if result.name not in self._kept]
        if not missing and not any(isinstance(result, PlannedSource) for result in results):
            if manifest.complete:
                with_rejected(manifest, results).write(self.output)
                return
            clear(self.output)
            rejected = [result for result in results if isinstance(result, RejectedSource)]
            reasons = "; ".join(f"{source.name}: {source.reason}" for source in rejected[:3])
            raise ValueError(f"none of the {len(results)} files can be used: {reasons}")
        splits = known_splits(manifest, results)
        batch = plan_shard_batch(results, self.settings, first_shard=manifest.next_shard, known=splits)
        replaced = tuple(source.name for source, _ in batch.accepted if source.name in changed)
        batch = dataclasses.replace(batch, replaced=replaced, removed=tuple(missing))
        stay = [record for record in manifest.sources if record.path not in {*replaced, *missing}]
        if not any(split == "train" for split in [*(record.split for record in stay), *dict(batch.accepted).values()]):
            raise ValueError(
                f"no sample for training would be left in {self.output} without the {len(replaced)} changed and the "
                f"{len(missing)} missing files; check the folder of the clips, or pass --overwrite"
            )
        for shard in shards_of(manifest, {*replaced, *missing}):  # before anything is encoded
            check_shard(self.output, shard)
        if manifest.samples.get("val") and "val" not in {
            *(record.split for record in stay),
            *dict(batch.accepted).values(),
        }:
            self.report.log("no sample for validation will be left: its files are among those that are missing")
        no_validation = {split for _, split in batch.accepted} == {"train"} and not manifest.complete
        if no_validation and self.settings.validation_fraction > 0:
            self.report.log("one content is too few for a validation split: all samples are for training")
        batch.write(self.work)

    def _load_codec(self) -> LatentCodec:
        if self._codec is None:
            self.report.log(f"loading {self.model}")
            device = choose_device(self.device, self.ranks.local_rank)
            self._codec = load_codec(self.model, self.settings, device, vae=self.processes == 1, text=True)
        return self._codec

    def _encode(self, batch: ShardBatch, manifest: Manifest, name: str) -> Manifest:
        """Write the missing shards of a batch, and then the manifest that lists them."""
        if batch.first_shard < manifest.next_shard:
            if self.ranks.rank == 0:
                delete_superseded(self.output, self.work, manifest)
            return manifest  # it lists this batch; only the last steps of that run are missing
        plans = batch.shards(self.settings.samples_per_shard)
        missing = [plan for plan in plans if not self._finished(plan.number).is_file()]
        for plan in plans:
            if plan not in missing:  # a damaged record is found before anything is encoded
                FinishedShard.read(self._finished(plan.number))
        self.ranks.barrier(f"{name}-listed")
        if missing:
            self._write_shards(missing, name)
        self.ranks.barrier(f"{name}-written")
        finished = [FinishedShard.read(self._finished(plan.number)) for plan in plans]
        batch, removed, kept = without_failed(batch, finished)
        old = shards_of(manifest, removed)
        numbers = range(batch.first_shard + len(plans), batch.first_shard + len(plans) + len(old))
        self._rewrite_shards(old, numbers, removed, name)
        self.ranks.barrier(f"{name}-rewritten")
        if self.ranks.rank == 0:
            self._kept |= kept
            rewritten = [RewrittenShard.read(self._rewritten(number)) for number in numbers]
            complete = with_shard_batch(without_sources(manifest, removed, rewritten), batch, plans, finished)
            if "train" not in complete.samples:
                reasons = "; ".join(f"{name}: {reason}" for shard in finished for name, _, reason in shard.dropped[:1])
                raise ValueError(f"no window for training could be encoded: {reasons}")
            note_superseded(self.work, [shard.name for shard in old])
            write_metadata(self.output, complete.shards)
            complete.write(self.output)
            self._times |= {source.name: source.mtime_ns for source, _ in batch.accepted}
            (self.work / BATCH_NAME).unlink()
            delete_superseded(self.output, self.work, complete)
        self.ranks.barrier(f"{name}-done")
        return read_manifest(self.output)

    def _with_empty_caption(self, manifest: Manifest) -> Manifest:
        if manifest.empty_caption is not None or not manifest.complete:
            return manifest
        (text,) = self._load_codec().encode_text([""])
        manifest = dataclasses.replace(manifest, empty_caption=write_empty_caption(self.output, text.cpu()))
        manifest.write(self.output)
        return manifest

    def _finished(self, number: int) -> Path:
        return self.work / f"shard-{number:06d}.json"

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
            rewritten = rewrite_shard(self.output, shard, number, removed)
            rewritten.write(self._rewritten(number))
            self.report.step(f"{shard.name}: {sum(count for *_, count in rewritten.removed)} samples removed")

    def _write_shards(self, missing: Sequence[ShardPlan], name: str) -> None:
        pending: collections.deque[tuple[ShardPlan, int]] = collections.deque()

        def tasks() -> Iterator[EncodeTask]:
            for plan in self.ranks.claim(missing, name):
                of_shard = encode_tasks(plan, self.settings.batch_size)
                pending.append((plan, len(of_shard)))
                yield from of_shard

        with EncoderPool(self.model, self.settings, self.device, self.processes, self.ranks.local_rank) as pool:
            codec = self._load_codec()
            captions = (part.source.caption for plan in missing for part in plan.parts for _ in part.windows)
            text = TextEmbeddings(codec, captions)
            self.report.stage("encoding", sum(plan.samples for plan in missing))
            encoded = pool.encode(tasks(), codec)
            for first in encoded:
                plan, count = pending.popleft()
                results = itertools.islice(itertools.chain([first], encoded), count)
                self._write_shard(plan, (one for _, windows in results for one in windows), text)

    def _write_shard(self, plan: ShardPlan, windows: Iterator[EncodedWindow], text: TextEmbeddings) -> None:
        fingerprint = self.spec.fingerprint
        done: dict[tuple[str, int], EncodedWindow] = {}
        samples: collections.Counter[str] = collections.Counter()
        shapes: collections.Counter[tuple[int, int, int, tuple[int, ...]]] = collections.Counter()
        dropped: list[tuple[str, int, str]] = []
        cut: dict[str, int] = {}
        with ShardWriter(self.output, plan.number, plan.split) as shard:
            for source, number in plan.windows():
                while (source.name, number) not in done:
                    one = next(windows)
                    done[one.source, one.window] = one
                one = done.pop((source.name, number))
                window, size = source.windows[number], source.size
                if one.latent is None:
                    dropped.append((source.name, number, str(one.problem)))
                    self.report.step(f"REJECTED {source.name} window {number + 1}: {one.problem}")
                    continue
                embedding, tokens = text.get(source.caption)
                if tokens > self.settings.text_length:
                    cut[source.name] = tokens
                shard.write(make_sample(source, number, one.latent, embedding, self.settings, fingerprint))
                samples[source.name] += 1
                shapes[window.length, size.height, size.width, tuple(one.latent.shape)] += 1
                self.report.step(f"{source.name} window {number + 1} of {len(source.windows)}: {window.length}x{size}")
        assert next(windows, None) is None, "every window of the shard was written or dropped"
        counts = tuple((*shape, count) for shape, count in sorted(shapes.items()))
        FinishedShard(shard.record, dict(samples), counts, tuple(dropped), cut).write(self._finished(plan.number))
