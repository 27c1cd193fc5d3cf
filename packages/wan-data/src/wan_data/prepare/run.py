"""``wan-data prepare``: from a folder of clips, or a listing, to a dataset; start, resume and addition of files."""

import collections
import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from wan_data import __version__
from wan_data.energon.version import energon_version
from wan_data.prepare.encoder_pool import EncoderPool
from wan_data.prepare.encoding import EncodedWindow, TextEmbeddings, choose_device, load_codec, make_sample
from wan_data.prepare.preload import preload_encoders
from wan_data.prepare.probe import PlannedSource, ProbeCache, ProbeResult, RejectedSource, probe_sources
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.results import FinishedShard, with_rejected, with_shard_batch
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import BATCH_NAME, EncodeTask, ShardBatch, ShardPlan, encode_tasks, plan_shard_batch
from wan_data.prepare.sources import SourceFile
from wan_data.reading.empty_caption import EMPTY_CAPTION_NAME, write_empty_caption
from wan_data.shards.energon_metadata import META_FOLDER, write_metadata
from wan_data.shards.lock import LOCK_NAME, writer_lock
from wan_data.shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from wan_data.shards.writer import ShardWriter
from wan_data.video.windows import Window
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.files import PARTIAL_SUFFIX, sync_folder, write_json
from wan_model.system.torchrun import processors

# The state of an unfinished preparation: the next run resumes from it, the end of a run removes it.
WORK_FOLDER = ".wan-data"
CACHE_NAME = "examined.jsonl"


class Report(Protocol):
    """Receives the progress of a preparation."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` steps."""

    def step(self, line: str) -> None:
        """Complete one step."""

    def log(self, line: str) -> None:
        """Show a message to the user."""


@contextlib.contextmanager
def output_folder(folder: Path, ranks: Ranks, *, overwrite: bool) -> Iterator[None]:
    """Lock the output folder for this preparation; with ``overwrite`` the files of earlier runs are removed.

    Raises:
        ValueError: the folder holds files of another program, or another process is writing it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder to write to")
    ours = (folder / MANIFEST_NAME).is_file()
    # The partial manifest is left by a run that was killed while it wrote its first one.
    allowed = (LOCK_NAME, WORK_FOLDER, MANIFEST_NAME + PARTIAL_SUFFIX)
    foreign = folder.is_dir() and any(path.name not in allowed for path in folder.iterdir())
    if foreign and not ours:
        raise ValueError(f"{folder} holds files that wan-data did not write; choose an empty or a new folder")
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    with writer_lock(folder) if ranks.rank == 0 else contextlib.nullcontext():
        if ranks.rank == 0 and overwrite:
            _clear(folder)
        ranks.barrier("folder")
        yield


def _clear(folder: Path) -> None:
    # Only files that prepare writes. The manifest goes last: it marks the folder as ours if this is interrupted.
    for name in (META_FOLDER, WORK_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("shard-rank*.tar", "shard-rank*.tar.idx", f"*{PARTIAL_SUFFIX}", EMPTY_CAPTION_NAME):
        for path in folder.glob(pattern):
            path.unlink()
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


def prepare(
    sources: Sequence[SourceFile],
    output: Path,
    model: str,
    settings: PrepareSettings,
    *,
    report: Report,
    overwrite: bool = False,
    device: str = "auto",
    processes: int = 1,
    decoders: int | None = None,
    ranks: Ranks | None = None,
) -> Manifest:
    """Write a dataset, resume an interrupted preparation, or add new sources to a finished dataset.

    Args:
        sources: of ``wan_data.prepare.folder`` or ``wan_data.prepare.sources``. The samples of those that the dataset
            has already stay as they are: ``wan_data.prepare.changes`` names what has changed.
        output: folder of the dataset.
        model: folder in diffusers' layout, or a hub id.
        settings: determine the bytes of the shards.
        report: receives the progress.
        overwrite: replace a dataset in the output folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        processes: number of encoding processes; the shards do not depend on it.
        decoders: number of decoder processes that probe the sources; one per core if None.
        ranks: the processes that torchrun has started; this process alone if None.

    Returns:
        The manifest, as written beside the shards. Its sources list the rejected files with their reasons.

    Raises:
        ValueError: no usable source, an output folder that is in use or was made with other settings, a model that
            cannot be loaded, or a version of Energon that wan-data does not work with.
    """
    energon_version()  # an Energon that cannot read the dataset is refused before anything is encoded
    if processes < 1:
        raise ValueError(f"{processes} processes cannot encode; it must be at least 1")
    return _Preparation(Path(output), model, settings, report, device, processes, decoders, ranks or Ranks()).run(
        sources, overwrite=overwrite
    )


def probe_only(
    sources: Sequence[SourceFile],
    settings: PrepareSettings,
    *,
    report: Report,
    decoders: int | None = None,
    output: Path | None = None,
) -> list[ProbeResult]:
    """Probe the sources as ``prepare`` does, without encoding anything.

    Args:
        sources, settings, report, decoders: as for ``prepare``.
        output: the folder that ``prepare`` will write to; the results are cached there, so that ``prepare`` does not
            probe again. None caches nothing.

    Raises:
        ValueError: the output folder is in use, or holds files of another program.
    """
    if output is None:
        return _probe(sources, settings, report, decoders, None)
    ranks = Ranks()
    with output_folder(output, ranks, overwrite=False):
        (output / WORK_FOLDER).mkdir(exist_ok=True)
        return _probe(sources, settings, report, decoders, _cache_path(output / WORK_FOLDER, ranks))


def _cache_path(work: Path, ranks: Ranks) -> Path:
    return work / f"{ranks.rank:05d}-{CACHE_NAME}"


def _probe(
    sources: Sequence[SourceFile],
    settings: PrepareSettings,
    report: Report,
    decoders: int | None,
    cache: Path | None,
) -> list[ProbeResult]:
    report.stage("probing", len(sources))
    return probe_sources(
        sources,
        settings,
        lambda result: report.step(_describe(result)),
        decoders=decoders or processors(),
        cache=ProbeCache(cache, settings),
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
        self.device, self.processes, self.ranks = device, processes, ranks
        self.decoders = decoders
        self.work = output / WORK_FOLDER
        self._codec: LatentCodec | None = None
        self.spec = LatentCodec.from_pretrained(
            model, load_vae=False, load_text=False, text_length=settings.text_length
        ).spec

    def run(self, sources: Sequence[SourceFile], *, overwrite: bool) -> Manifest:
        with output_folder(self.output, self.ranks, overwrite=overwrite):
            manifest = self._begin()
            if (unfinished := ShardBatch.read(self.work)) is not None:
                self.report.log("resuming the shards that an earlier run has planned")
                manifest = self._encode(unfinished, manifest, "unfinished")
            if (new := self._plan_new_batch(sources, manifest)) is not None:
                manifest = self._encode(new, manifest, "new")
            if self.ranks.rank == 0:
                manifest = self._with_empty_caption(manifest)
                shutil.rmtree(self.work, ignore_errors=True)
            self.ranks.barrier("end")
        return manifest

    def _begin(self) -> Manifest:
        """The existing manifest, or a new one; the same on every rank."""
        if self.ranks.rank == 0:
            self.work.mkdir(exist_ok=True)
            if not (self.output / MANIFEST_NAME).is_file():
                Manifest(False, __version__, self.spec, self.settings.to_dict()).write(self.output)
        self.ranks.barrier("begin")
        manifest = read_manifest(self.output, allow_incomplete=True)
        wanted = self.settings.to_dict()
        if manifest.settings.get("reading_version") != wanted["reading_version"]:
            raise ValueError(
                f"{self.output} holds a dataset whose videos were read by another version of wan-data, from which the "
                "same file gets other pixels; choose another folder, or pass --overwrite to replace it"
            )
        if differing := [
            f"{name} {wanted.get(name)!r} instead of {manifest.settings.get(name)!r}"
            for name in sorted({*wanted, *manifest.settings})
            if wanted.get(name) != manifest.settings.get(name)
        ]:
            raise ValueError(
                f"{self.output} holds a dataset of other settings ({', '.join(differing)}); use the same settings, "
                "choose another folder, or pass --overwrite to replace it"
            )
        manifest.latent_spec.require_same(self.spec, f"the dataset in {self.output}", f"the model {self.model}")
        return manifest

    def _plan_new_batch(self, sources: Sequence[SourceFile], manifest: Manifest) -> ShardBatch | None:
        # What has changed of the others is named by ``changed_sources``; their samples stay.
        known = {record.path for record in manifest.sources if record.verdict == "accepted"}
        new = [source for source in sources if source.name not in known]
        if not new:
            return None
        if self.ranks.rank == 0:
            # A run that ended after it had planned a batch leaves the results of its own probing.
            for path in self.work.glob("verdicts-*.json"):
                path.unlink()
        self.ranks.barrier("probing")
        if self.processes > 1:
            preload_encoders()  # while the sources are probed
        mine = self.ranks.partition(new)
        results = _probe(mine, self.settings, self.report, self.decoders, _cache_path(self.work, self.ranks))
        if self.ranks.world_size > 1:
            results = self._gathered(results)
        if self.ranks.rank == 0:
            self._write_batch(results, manifest)
        self.ranks.barrier("planned")
        return ShardBatch.read(self.work)

    def _gathered(self, results: list[ProbeResult]) -> list[ProbeResult]:
        """All ranks' results on rank 0, by name; nothing on the others."""
        plain = [
            result.to_dict() if isinstance(result, PlannedSource) else dataclasses.asdict(result) for result in results
        ]
        write_json(self.work / f"verdicts-{self.ranks.rank:05d}.json", plain)
        self.ranks.barrier("results")
        if self.ranks.rank:
            return []
        gathered: list[ProbeResult] = []
        for rank in range(self.ranks.world_size):
            for value in json.loads((self.work / f"verdicts-{rank:05d}.json").read_bytes()):
                gathered.append(RejectedSource(**value) if "reason" in value else PlannedSource.from_dict(value))
        return sorted(gathered, key=lambda result: result.name)

    def _write_batch(self, results: list[ProbeResult], manifest: Manifest) -> None:
        if not any(isinstance(result, PlannedSource) for result in results):
            if manifest.complete:
                with_rejected(manifest, results).write(self.output)
                return
            _clear(self.output)
            rejected = [result for result in results if isinstance(result, RejectedSource)]
            reasons = "; ".join(f"{source.name}: {source.reason}" for source in rejected[:3])
            raise ValueError(f"none of the {len(results)} files can be used: {reasons}")
        splits = {
            record.sha256: record.split for record in manifest.sources if record.sha256 and record.split is not None
        }
        batch = plan_shard_batch(results, self.settings, first_shard=manifest.next_shard, known=splits)
        no_validation = {split for _, split in batch.accepted} == {"train"} and not manifest.complete
        if no_validation and self.settings.validation_fraction > 0:
            self.report.log("one source is too few for a validation split: all of its samples are for training")
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
            return manifest  # it lists this batch; only the last steps of that run are missing
        plans = batch.shards(self.settings.samples_per_shard)
        missing = [plan for plan in plans if not self._finished(plan.number).is_file()]
        self.ranks.barrier(f"{name}-listed")
        if missing:
            self._write_shards(missing, name)
        self.ranks.barrier(f"{name}-written")
        if self.ranks.rank == 0:
            finished = [FinishedShard.read(self._finished(plan.number)) for plan in plans]
            complete = with_shard_batch(manifest, batch, plans, finished)
            if "train" not in complete.samples:
                reasons = "; ".join(f"{name}: {reason}" for shard in finished for name, _, reason in shard.dropped[:1])
                raise ValueError(f"no window for training could be encoded: {reasons}")
            write_metadata(self.output, complete.shards)
            complete.write(self.output)
            (self.work / BATCH_NAME).unlink()
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


def describe_windows(windows: Sequence[Window]) -> str:
    """The lengths of windows in words, such as ``3 of 81, 1 of 17 frames``."""
    lengths = collections.Counter(window.length for window in windows)
    return ", ".join(f"{count} of {length}" for length, count in sorted(lengths.items(), reverse=True)) + " frames"


def _describe(result: ProbeResult) -> str:
    if isinstance(result, RejectedSource):
        return f"REJECTED {result.name}: {result.reason}"
    return (
        f"{result.name}: {result.info.frames} frames at the target rate, {describe_windows(result.windows)} "
        f"in {result.size}"
    )
