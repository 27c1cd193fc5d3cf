"""``wan-data prepare``: from a folder of clips, or a listing, to a dataset."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from wan_data import __version__
from wan_data.prepare.encoder_pool import EncoderPool
from wan_data.prepare.encoding import Encoded, TextCache, choose_device, load_codec, make_sample
from wan_data.prepare.finished_shards import FinishedShard, with_rejected, with_round
from wan_data.prepare.preload import warm_up
from wan_data.prepare.probe import Journal, PlannedSource, RejectedSource, Verdict, examine
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import ROUND_NAME, Round, ShardPlan, Task, make_round, tasks_of
from wan_data.prepare.sources import SourceFile
from wan_data.reading.empty_caption import EMPTY_CAPTION_NAME, write_empty_caption
from wan_data.shards.energon_metadata import META_FOLDER, write_metadata
from wan_data.shards.lock import LOCK_NAME, sole_writer
from wan_data.shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from wan_data.shards.writer import ShardWriter
from wan_data.video.windows import Window
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.files import PARTIAL_SUFFIX, write_json

# What a run knows before it has ended: taken up by the next run, removed at the end.
WORK_FOLDER = ".wan-data"
JOURNAL_NAME = "examined.jsonl"


class Report(Protocol):
    """Where progress goes."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""

    def step(self, line: str) -> None:
        """One step is done."""

    def say(self, line: str) -> None:
        """Something the user should know."""


@contextlib.contextmanager
def output_folder(folder: Path, ranks: Ranks, *, overwrite: bool) -> Iterator[None]:
    """Hold the folder as its only writer; with ``overwrite`` nothing of earlier runs is in it.

    Raises:
        ValueError: it holds something else, or another process writes it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder to write to")
    ours = (folder / MANIFEST_NAME).is_file()
    # The last is what a run leaves that was killed while it wrote its first manifest.
    before_it = (LOCK_NAME, WORK_FOLDER, MANIFEST_NAME + PARTIAL_SUFFIX)
    strangers = folder.is_dir() and any(path.name not in before_it for path in folder.iterdir())
    if strangers and not ours:
        raise ValueError(f"{folder} holds files that wan-data did not write; choose an empty or a new folder")
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder) if ranks.rank == 0 else contextlib.nullcontext():
        if ranks.rank == 0 and overwrite:
            _clear(folder)
        ranks.wait_for_all("folder")
        yield


def _clear(folder: Path) -> None:
    # Only what prepare writes; the manifest goes last, so that an interrupted clearing is still known as ours.
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
    """Write a dataset, go on with one that was interrupted, or add what is new to one.

    Args:
        sources: of ``wan_data.prepare.sources``.
        output: folder of the dataset.
        model: folder in diffusers' layout, or a hub id.
        settings: all that decides the shards' bytes.
        report: told of progress.
        overwrite: begin anew in a folder that holds a dataset.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        processes: that encode; the shards do not depend on it.
        decoders: processes that examine the sources; one a core if None.
        ranks: the launches that work together; this process alone if None.

    Returns:
        The manifest, as written beside the shards; its sources say what was rejected and why.

    Raises:
        ValueError: no usable source, an output folder in use or of other settings, a model that cannot be loaded.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes cannot encode; it must be at least 1")
    return _Preparation(Path(output), model, settings, report, device, processes, decoders, ranks or Ranks()).run(
        sources, overwrite=overwrite
    )


def examine_only(
    sources: Sequence[SourceFile],
    settings: PrepareSettings,
    *,
    report: Report,
    decoders: int | None = None,
    output: Path | None = None,
) -> list[Verdict]:
    """What ``prepare`` would find, without encoding anything.

    Args:
        sources, settings, report, decoders: as for ``prepare``.
        output: the folder that ``prepare`` will write to, which then need not examine again; None keeps nothing.

    Raises:
        ValueError: the output folder is in use, or holds something else.
    """
    if output is None:
        return _examine(sources, settings, report, decoders, None)
    ranks = Ranks()
    with output_folder(output, ranks, overwrite=False):
        (output / WORK_FOLDER).mkdir(exist_ok=True)
        return _examine(sources, settings, report, decoders, _journal_of(output / WORK_FOLDER, ranks))


def _journal_of(work: Path, ranks: Ranks) -> Path:
    return work / f"{ranks.rank:05d}-{JOURNAL_NAME}"


def _examine(
    sources: Sequence[SourceFile],
    settings: PrepareSettings,
    report: Report,
    decoders: int | None,
    journal: Path | None,
) -> list[Verdict]:
    report.stage("examining", len(sources))
    return examine(
        sources,
        settings,
        lambda verdict: report.step(_verdict(verdict)),
        decoders=decoders or os.cpu_count() or 1,
        journal=Journal(journal, settings),
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
            if (left := Round.read(self.work)) is not None:
                self.report.say("going on with what an earlier run has begun")
                manifest = self._encode(left, manifest, "left")
            if (fresh := self._new_round(sources, manifest)) is not None:
                manifest = self._encode(fresh, manifest, "new")
            if self.ranks.rank == 0:
                manifest = self._with_empty_caption(manifest)
                shutil.rmtree(self.work, ignore_errors=True)
            self.ranks.wait_for_all("end")
        return manifest

    def _begin(self) -> Manifest:
        """The manifest that is there, or a new one; the same on every rank."""
        if self.ranks.rank == 0:
            self.work.mkdir(exist_ok=True)
            if not (self.output / MANIFEST_NAME).is_file():
                Manifest(False, __version__, self.spec, self.settings.to_dict()).write(self.output)
        self.ranks.wait_for_all("begin")
        manifest = read_manifest(self.output, allow_incomplete=True)
        wanted = self.settings.to_dict()
        if differing := [
            f"{name} {wanted.get(name)!r} instead of {manifest.settings.get(name)!r}"
            for name in sorted({*wanted, *manifest.settings})
            if wanted.get(name) != manifest.settings.get(name)
        ]:
            raise ValueError(
                f"{self.output} holds a dataset of other settings ({', '.join(differing)}); repeat it with its own, "
                "choose another folder, or pass --overwrite to replace it"
            )
        manifest.latent_spec.require_same(self.spec, f"the dataset in {self.output}", f"the model {self.model}")
        return manifest

    def _new_round(self, sources: Sequence[SourceFile], manifest: Manifest) -> Round | None:
        known = {record.path: record for record in manifest.sources if record.verdict == "accepted"}
        new = []
        for source in sources:
            if source.name not in known:
                new.append(source)
            elif source.path is not None and source.path.is_file():
                size, then = source.path.stat().st_size, known[source.name].bytes
                if size != then:
                    raise ValueError(
                        f"{source.name} is in {self.output} already and has changed since: {size} bytes instead of "
                        f"{then}; give it another name, or pass --overwrite"
                    )
        if not new:
            return None
        if self.ranks.rank == 0:
            # So that a round that is fixed but not begun leaves no verdicts of another examination behind.
            for path in self.work.glob("verdicts-*.json"):
                path.unlink()
        self.ranks.wait_for_all("examination")
        if self.processes > 1:
            warm_up()  # while the sources are examined
        mine = self.ranks.share(new)
        verdicts = _examine(mine, self.settings, self.report, self.decoders, _journal_of(self.work, self.ranks))
        if self.ranks.world_size > 1:
            verdicts = self._gathered(verdicts)
        if self.ranks.rank == 0:
            self._fix_round(verdicts, manifest)
        self.ranks.wait_for_all("round")
        return Round.read(self.work)

    def _gathered(self, verdicts: list[Verdict]) -> list[Verdict]:
        """All ranks' verdicts on rank 0, by name; nothing on the others."""
        plain = [
            verdict.to_dict() if isinstance(verdict, PlannedSource) else dataclasses.asdict(verdict)
            for verdict in verdicts
        ]
        write_json(self.work / f"verdicts-{self.ranks.rank:05d}.json", plain)
        self.ranks.wait_for_all("verdicts")
        if self.ranks.rank:
            return []
        gathered: list[Verdict] = []
        for rank in range(self.ranks.world_size):
            for value in json.loads((self.work / f"verdicts-{rank:05d}.json").read_bytes()):
                gathered.append(RejectedSource(**value) if "reason" in value else PlannedSource.from_dict(value))
        return sorted(gathered, key=lambda verdict: verdict.name)

    def _fix_round(self, verdicts: list[Verdict], manifest: Manifest) -> None:
        if not any(isinstance(verdict, PlannedSource) for verdict in verdicts):
            if manifest.complete:
                with_rejected(manifest, verdicts).write(self.output)
                return
            _clear(self.output)
            rejected = [verdict for verdict in verdicts if isinstance(verdict, RejectedSource)]
            reasons = "; ".join(f"{source.name}: {source.reason}" for source in rejected[:3])
            raise ValueError(f"none of the {len(verdicts)} files can be used: {reasons}")
        splits = {
            record.sha256: record.split for record in manifest.sources if record.sha256 and record.split is not None
        }
        made = make_round(verdicts, self.settings, first_shard=manifest.next_shard, known=splits)
        alone = {split for _, split in made.accepted} == {"train"} and not manifest.complete
        if alone and self.settings.validation_fraction > 0:
            self.report.say("one source is too few for a validation split: all of its samples are for training")
        made.write(self.work)

    def _load_codec(self) -> LatentCodec:
        if self._codec is None:
            self.report.say(f"loading {self.model}")
            device = choose_device(self.device, self.ranks.local_rank)
            self._codec = load_codec(self.model, self.settings, device, vae=self.processes == 1, text=True)
        return self._codec

    def _encode(self, made: Round, manifest: Manifest, name: str) -> Manifest:
        """Write what is missing of a round's shards, and then the manifest with it."""
        if made.first_shard < manifest.next_shard:
            return manifest  # its manifest was written; only the end of that run is missing
        plans = made.shards(self.settings.samples_per_shard)
        missing = [plan for plan in plans if not self._finished(plan.number).is_file()]
        self.ranks.wait_for_all(f"{name}-listed")
        if missing:
            self._write_shards(missing, name)
        self.ranks.wait_for_all(f"{name}-written")
        if self.ranks.rank == 0:
            finished = [FinishedShard.read(self._finished(plan.number)) for plan in plans]
            whole = with_round(manifest, made, plans, finished)
            if "train" not in whole.samples:
                reasons = "; ".join(f"{name}: {reason}" for shard in finished for name, _, reason in shard.dropped[:1])
                raise ValueError(f"no window for training could be encoded: {reasons}")
            write_metadata(self.output, whole.shards)
            whole.write(self.output)
            (self.work / ROUND_NAME).unlink()
        self.ranks.wait_for_all(f"{name}-done")
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
        begun: collections.deque[tuple[ShardPlan, int]] = collections.deque()

        def tasks() -> Iterator[Task]:
            for plan in self.ranks.claim(missing, name):
                pieces = tasks_of(plan, self.settings.batch_size)
                begun.append((plan, len(pieces)))
                yield from pieces

        with EncoderPool(self.model, self.settings, self.device, self.processes, self.ranks.local_rank) as pool:
            codec = self._load_codec()
            captions = (part.source.caption for plan in missing for part in plan.parts for _ in part.windows)
            text = TextCache(codec, captions)
            self.report.stage("encoding", sum(plan.samples for plan in missing))
            encoded = pool.encode(tasks(), codec)
            for first in encoded:
                plan, pieces = begun.popleft()
                results = itertools.islice(itertools.chain([first], encoded), pieces)
                self._write_shard(plan, (one for _, windows in results for one in windows), text)

    def _write_shard(self, plan: ShardPlan, windows: Iterator[Encoded], text: TextCache) -> None:
        fingerprint = self.spec.fingerprint
        done: dict[tuple[str, int], Encoded] = {}
        samples: collections.Counter[str] = collections.Counter()
        shapes: collections.Counter[tuple[int, int, int, tuple[int, ...]]] = collections.Counter()
        dropped: list[tuple[str, int, str]] = []
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
                embedding = text.take(source.caption)
                shard.write(make_sample(source, number, one.latent, embedding, self.settings, fingerprint))
                samples[source.name] += 1
                shapes[window.length, size.height, size.width, tuple(one.latent.shape)] += 1
                self.report.step(f"{source.name} window {number + 1} of {len(source.windows)}: {window.length}x{size}")
        assert next(windows, None) is None, "every window has its place"
        counts = tuple((*shape, count) for shape, count in sorted(shapes.items()))
        FinishedShard(shard.record, dict(samples), counts, tuple(dropped)).write(self._finished(plan.number))


def describe_windows(windows: Sequence[Window]) -> str:
    """Such as ``3 of 81, 1 of 17 frames``."""
    lengths = collections.Counter(window.length for window in windows)
    return ", ".join(f"{count} of {length}" for length, count in sorted(lengths.items(), reverse=True)) + " frames"


def _verdict(verdict: Verdict) -> str:
    if isinstance(verdict, RejectedSource):
        return f"REJECTED {verdict.name}: {verdict.reason}"
    return (
        f"{verdict.name}: {verdict.info.frames} frames at the target rate, {describe_windows(verdict.windows)} "
        f"in {verdict.size}"
    )
