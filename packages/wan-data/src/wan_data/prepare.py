"""``wan-data prepare``: from a folder of clips to a dataset."""

import collections
import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from wan_data import __version__
from wan_data.encoding import SourceEncoder, TextCache, choose_device, load_codec, make_sample
from wan_data.energon_metadata import META_FOLDER, write_metadata
from wan_data.files import LOCK_NAME, PARTIAL_SUFFIX, sole_writer
from wan_data.manifest import MANIFEST_NAME, Manifest, ShapeCount, SourceRecord, read_manifest
from wan_data.settings import PrepareSettings
from wan_data.shards import ShardWriter
from wan_data.sources import PlannedSource, RejectedSource, examine, find_sources, split_sources


class Report(Protocol):
    """Where progress goes."""

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""

    def step(self, line: str) -> None:
        """One step is done."""

    def say(self, line: str) -> None:
        """Something the user should know."""


@contextlib.contextmanager
def output_folder(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold the folder as its only writer, with nothing of an earlier run in it.

    Raises:
        ValueError: it holds something else, or a dataset and ``overwrite`` is False, or another process writes it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder to write to")
    ours = (folder / MANIFEST_NAME).is_file()
    strangers = folder.is_dir() and any(path.name != LOCK_NAME for path in folder.iterdir())
    if strangers and not ours:
        raise ValueError(f"{folder} holds files that wan-data did not write; choose an empty or a new folder")
    # What an interrupted run left is replaced without asking: nothing can be trained on it.
    if ours and not overwrite and read_manifest(folder, allow_incomplete=True).complete:
        raise ValueError(f"{folder} holds a dataset already; pass --overwrite to replace it, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with sole_writer(folder):
        if ours:
            _clear(folder)
        yield


def _clear(folder: Path) -> None:
    # Only what prepare writes; the manifest goes last, so that an interrupted clearing is still known as ours.
    read_manifest(folder, allow_incomplete=True)
    shutil.rmtree(folder / META_FOLDER, ignore_errors=True)
    for pattern in ("shard-rank*.tar", "shard-rank*.tar.idx", f"*{PARTIAL_SUFFIX}"):
        for path in folder.glob(pattern):
            path.unlink()
    (folder / MANIFEST_NAME).unlink()


def prepare(
    video_folder: Path,
    output: Path,
    model: str,
    settings: PrepareSettings,
    *,
    report: Report,
    overwrite: bool = False,
    device: str = "auto",
    processes: int = 1,
) -> Manifest:
    """Write a dataset.

    Args:
        video_folder: searched with its subfolders.
        output: folder of the dataset.
        model: folder in diffusers' layout, or a hub id.
        settings: all that decides the shards' bytes.
        report: told of progress.
        overwrite: replace a dataset in ``output``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        processes: that encode; the shards do not depend on it.

    Returns:
        The manifest, as written beside the shards; its sources say what was rejected and why.

    Raises:
        ValueError: no usable source, an output folder in use, a model that cannot be loaded.
    """
    if processes < 1:
        raise ValueError(f"{processes} processes cannot encode; it must be at least 1")
    output = Path(output)
    paths = find_sources(Path(video_folder), settings)
    with output_folder(output, overwrite=overwrite):
        codec = load_codec(model, settings, choose_device(device), vae=processes == 1, text=True)
        manifest = Manifest(False, __version__, codec.spec, settings.to_dict())
        manifest.write(output)

        report.stage("examining", len(paths))
        accepted, rejected = examine(
            Path(video_folder), paths, settings, lambda verdict: report.step(_verdict(verdict))
        )
        if not accepted:
            (output / MANIFEST_NAME).unlink()
            reasons = "; ".join(f"{source.name}: {source.reason}" for source in rejected[:3])
            raise ValueError(f"none of the {len(paths)} files can be used: {reasons}")
        splits = split_sources(accepted, settings.validation_fraction, settings.seed)
        if settings.validation_fraction > 0 and "val" not in splits:
            report.say("one source is too few for a validation split: all of its samples are for training")

        writer = ShardWriter(output, settings.samples_per_shard)
        text = TextCache(codec, [source.caption for source in accepted for _ in source.windows])
        shapes: collections.Counter[tuple[str, int, int, int, tuple[int, ...]]] = collections.Counter()
        report.stage("encoding", sum(len(source.windows) for source in accepted))
        with SourceEncoder(model, settings, device, processes, codec) as encoder:
            for split, sources in splits.items():
                with writer.split(split) as shard:
                    for source, number, latent in encoder.latents(sources):
                        embedding = text.take(source.caption)
                        shard.write(make_sample(source, number, latent, embedding, settings, codec.spec.fingerprint))
                        length, size = source.windows[number].length, source.size
                        shapes[split, length, size.height, size.width, tuple(latent.shape)] += 1
                        report.step(f"{source.name} window {number + 1} of {len(source.windows)}: {length}x{size}")
        write_metadata(output, writer.records)
        manifest = dataclasses.replace(
            manifest,
            complete=True,
            sources=_source_records(splits, rejected),
            shards=tuple(writer.records),
            shapes=tuple(
                ShapeCount(split, frames, height, width, latent, _tokens(latent), count)  # type: ignore[arg-type]
                for (split, frames, height, width, latent), count in sorted(shapes.items())
            ),
        )
        manifest.write(output)
    return manifest


def _tokens(latent: tuple[int, ...]) -> int:
    _, frames, height, width = latent
    return frames * (height // 2) * (width // 2)


def _verdict(verdict: PlannedSource | RejectedSource) -> str:
    if isinstance(verdict, RejectedSource):
        return f"REJECTED {verdict.name}: {verdict.reason}"
    lengths = collections.Counter(window.length for window in verdict.windows)
    windows = ", ".join(f"{count} of {length}x{verdict.size}" for length, count in sorted(lengths.items()))
    return f"{verdict.name}: {verdict.info.frames} frames at the target rate, {windows}"


def _source_records(splits: dict[str, list[PlannedSource]], rejected: list[RejectedSource]) -> tuple[SourceRecord, ...]:
    records = [
        SourceRecord(
            path=source.name,
            verdict="accepted",
            split=split,
            sha256=source.sha256,
            samples=len(source.windows),
            frames=source.info.frames,
            source_fps=source.info.source_fps,
            height=source.info.height,
            width=source.info.width,
        )
        for split, sources in splits.items()
        for source in sources
    ]
    records += [SourceRecord(source.name, "rejected", source.reason, sha256=source.sha256) for source in rejected]
    return tuple(sorted(records, key=lambda record: record.path))
