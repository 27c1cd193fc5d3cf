"""wan-data on the CPU: preparation against the bare calls of its encoders, and the loader against a plain read."""

import itertools
import json
import os
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from bench.measure import median, ratio, run_process, time_rounds
from bench.report import Table, seconds
from wan_data.index.manifest import MANIFEST_NAME
from wan_data.prepare.encoding.encoder import encode_batch
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.shards.energon_metadata import write_metadata
from wan_data.shards.writer import Sample, ShardWriter
from wan_data.video.buckets import Size
from wan_data.video.decode import read_windows
from wan_data.video.windows import Window
from wan_model.codec.latent_codec import LatentCodec
from wan_model.tiny import write_tiny_wan

FRAMES, SOURCE_RATE, RATE = 17, 24, 16


def write_clips(folder: Path, count: int, windows: int) -> None:
    """Write clips of moving patterns, H.264, 640 x 360 at 24 fps, each with ``windows`` windows at 16 fps."""
    rows, columns = np.mgrid[0:360, 0:640]
    for number in range(count):
        with av.open(str(folder / f"{number:03d}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(SOURCE_RATE), options={"preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
            for index in range(windows * FRAMES * SOURCE_RATE // RATE + 1):
                shifts = (rows + 3 * index, columns + (number + 2) * index, rows + columns + index)
                picture = np.stack([shift % 256 for shift in shifts], axis=-1).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        (folder / f"{number:03d}.txt").write_text(f"Pattern number {number} moves to the left.", encoding="utf-8")


def write_model(folder: Path, *, true_size: bool) -> Path:
    """Write a model folder: random weights, a small text encoder, and an autoencoder of Wan's size or a small one."""
    write_tiny_wan(folder)
    if true_size:
        with torch.random.fork_rng(devices=[]):
            AutoencoderKLWan().save_pretrained(folder / "vae")
    return folder


class Prepared:
    """Clips and a model, encoded by bare calls of the encoders and by ``wan-data prepare``."""

    def __init__(self, work: Path, *, quick: bool) -> None:
        self.work, self.size, self.clips, self.windows = work, Size(32, 48) if quick else Size(48, 80), 2, 2
        self.few = 1
        if not quick:
            self.clips, self.windows, self.few = 12, 3, 4
        self.folder, self.folder_of_few = work / "clips", work / "few-clips"
        for folder, count in ((self.folder, self.clips), (self.folder_of_few, self.few)):
            folder.mkdir()
            write_clips(folder, count, self.windows)
        self.model = write_model(work / "model", true_size=not quick)
        self.runs = itertools.count()

    def bare(self, codec: LatentCodec) -> float:
        """Seconds of the encoders' calls only; frames are decoded before, one clip at a time."""
        took = 0.0
        cut = [Window(i * FRAMES, (i + 1) * FRAMES) for i in range(self.windows)]
        for path in sorted(self.folder.glob("*.mp4")):
            frames = list(
                read_windows(path, cut, self.size, fps=Fraction(RATE), resize_mode="bicubic", center_crop=True)
            )
            start = time.perf_counter()
            for window in frames:
                encode_batch(codec, [window])
            codec.encode_text([path.with_suffix(".txt").read_text(encoding="utf-8")])
            took += time.perf_counter() - start
        return took

    def program(self, *, threads: int, processes: int, few: bool = False, on: str = "local") -> float:
        """Seconds of ``wan-data prepare`` from its start to its end; with ``few`` of the first clips only."""
        clips, folder = (self.few, self.folder_of_few) if few else (self.clips, self.folder)
        out = self.work / f"out{next(self.runs)}"
        command = [
            *(Path(sysconfig.get_path("scripts"), "wan-data"), "prepare", "--video-folder", folder),
            *("--output-folder", out, "--model", self.model, "--device", "cpu"),
            *("--height", self.size.height, "--width", self.size.width, "--frames", FRAMES),
            *("--num-processes", processes, "--on", on),
            # Processes take whole shards: of all clips and of few each of two gets the same number.
            *("--samples-per-shard", self.windows),
        ]
        took, _ = run_process(command, threads)
        samples = sum(json.loads((out / MANIFEST_NAME).read_bytes())["samples"].values())
        assert samples == clips * self.windows, f"{samples} samples instead of {clips * self.windows}"
        return took


def preparation(quick: bool) -> Iterator[Table]:
    """The two tables of ``wan-data prepare``."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        work = Prepared(Path(folder), quick=quick)
        codec = LatentCodec.from_pretrained(work.model)
        what = f"{work.clips} clips of {work.windows} windows, {FRAMES} x {work.size}"
        bare, whole = work.bare(codec), work.program(threads=threads, processes=1)
        more = work.clips - work.few
        # Not in the quick run, where starting is nearly all that a run takes.
        start = 0.0 if quick else work.program(threads=threads, processes=1, few=True)
        further, further_bare = (whole - start) / more, bare / work.clips
        kind = "a small" if quick else "Wan's"
        yield Table(
            f"wan-data prepare against the bare calls of its encoders: {what}",
            ["threads", "bare calls", "prepare, start to end", "prepare / bare", "each further clip", "further / bare"],
            [
                [
                    *(str(threads), seconds(bare), seconds(whole), f"{whole / bare:.3f}"),
                    *(seconds(further), f"{further / further_bare:.3f}"),
                ]
            ],
            note=f"Autoencoder of {kind} architecture, fp32, random weights; a small text encoder. Prepare starts "
            "Python, probes each clip by a full decode, and writes shards and metadata. Each further clip is what "
            f"{more} more clips take longer, without the start. Targets: <= 1.15, and <= 1.05 for each further clip.",
        )
        one = whole if threads == 1 else work.program(threads=1, processes=1)
        two = work.program(threads=2, processes=2)
        yield Table(
            f"Processes of one thread each: {what}",
            ["one process", "two processes", "one / two"],
            [[seconds(one), seconds(two), f"{one / two:.2f}"]],
            note=f"From start to end, on {os.cpu_count()} cores, which the decoders share. Target: >= 1.7.",
        )
        if not quick:  # starting a cluster is nearly all that it would measure
            yield on_ray(work, two, what)


def on_ray(work: Prepared, local: float, what: str) -> Table:
    """Two encoding actors of a Ray cluster of this machine against two processes, which took ``local`` seconds."""
    more, took = work.clips - work.few, [local, work.program(threads=1, processes=2, on="ray")]
    starts = [work.program(threads=2, processes=2, few=True), work.program(threads=1, processes=2, few=True, on="ray")]
    here, there = ((whole - start) / more for whole, start in zip(took, starts, strict=True))
    return Table(
        f"Two encoding actors on Ray against two processes, of one thread each: {what}",
        [
            "processes, start to end",
            "Ray, start to end",
            "processes, each further clip",
            "Ray, each further clip",
            "ratio",
        ],
        [[*map(seconds, (*took, here, there)), f"{there / here:.3f}"]],
        note="A cluster of this machine, which the command starts and ends. Target for each further clip: <= 1.10.",
    )


def write_shards(folder: Path, samples: int) -> int:
    """Shards of latents of 17 frames at 480 x 832 with texts of 100 tokens; returns their bytes."""
    generator, records = torch.Generator().manual_seed(0), []
    for number in range(samples // 10):
        with ShardWriter(folder, number, "train") as shard:
            for i in range(10):
                latent = torch.randn(16, 5, 60, 104, generator=generator)
                text = torch.randn(100, 4096, generator=generator)
                shard.write(Sample(f"{number * 10 + i:06d}", latent, text, {"caption": "x"}))
        assert shard.record is not None, "it holds samples"
        records.append(shard.record)
    write_metadata(folder, records)
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def loading(quick: bool) -> Table:
    """The loader compared with a plain read of the same shards."""
    samples = 20 if quick else 80
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_shards(folder, samples)

        def plain() -> None:
            for path in sorted(folder.glob("*.tar")):
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        file = tar.extractfile(member)
                        assert file is not None
                        file.read()

        def loader(workers: int) -> Iterator[int]:
            config = LoaderConfig(str(folder), capacity=4 * 7800, num_workers=workers, packing_buffer=16)
            for pack in PackLoader(config, rank=0, world_size=1):
                yield len(pack.keys)

        def an_epoch(packs: Iterator[int]) -> None:
            drawn = 0
            while drawn < samples:
                drawn += next(packs)

        endless = {workers: loader(workers) for workers in (0, 1)}
        calls = {"plain": plain, **{str(n): lambda n=n: an_epoch(endless[n]) for n in endless}}  # type: ignore[misc]
        times = time_rounds(calls, 1 if quick else 5)
        table = Table(
            f"Reading {samples} samples of {size / samples / 1e6:.1f} MB, latents of 17 x 480 x 832",
            ["reader", "samples/s", "MB/s", "relative to tarfile"],
            note="All files are in the page cache. The loader checks all values, packs four samples and pads their "
            "texts to 512 tokens.",
        )
        for who, label in (("plain", "tarfile, bytes only"), ("0", "loader, no worker"), ("1", "loader, one worker")):
            took = median(times[who])
            table.rows.append(
                [label, f"{samples / took:.0f}", f"{size / took / 1e6:.0f}", f"{ratio(times['plain'], times[who]):.2f}"]
            )
    return table


def tables(*, quick: bool) -> Iterator[Table]:
    """Yield each table when it is measured."""
    yield from preparation(quick)
    yield loading(quick)
