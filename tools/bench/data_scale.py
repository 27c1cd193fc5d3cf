"""What a dataset of ten thousand to ten million sources costs to open, to look at, to plan and to add to.

The sources are made up; the shards are a few real ones under many names (hard links). Each figure is of a process of
its own, less what a process costs that only imports the same modules.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import random
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.report import Table, seconds
from wan_data.index.lengths import LengthCounts, SplitLengths
from wan_data.index.manifest import Manifest, ShapeCount, open_sources, read_manifest
from wan_data.index.records import ACCEPTED, SourceRecord
from wan_data.index.sources import IndexState, added
from wan_data.prepare.planned_source import PlannedSource
from wan_data.prepare.probing.results import ProbeResults, write_results
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import plan_shard_batch
from wan_data.shards.energon_index import INDEX_NAME, OFFSETS_SUFFIX, TABLES
from wan_data.shards.energon_metadata import META_FOLDER, restore_metadata, write_metadata
from wan_data.shards.reader import grouped
from wan_data.shards.tar_headers import Member, tar_members
from wan_data.shards.writer import Sample, ShardRecord, ShardWriter
from wan_data.sources.listing import files_of_listing
from wan_data.video.buckets import Size
from wan_data.video.decode import ClipInfo
from wan_data.video.windows import Window
from wan_model.latent_spec import LatentSpec
from wan_model.system.files import sha256_of
from wan_model.system.memory import peak_resident
from wan_model.system.safe_reading import open_file

SCALES = (10_000, 100_000, 1_000_000, 10_000_000)
QUICK = (300,)
A_SHARD = 100
ADDED = 1_000
SETTINGS = PrepareSettings(samples_per_shard=A_SHARD)
SPEC = LatentSpec(16, 4, 8, (0.0,) * 16, (1.0,) * 16, 8, 512, "made up")
# A file system takes some ten thousand names for one file.
_LINKS = 10_000
_RESULTS, _LISTING = "results-00000.sqlite", "clips.jsonl"
_CAPTION = "A rabbit wakes in a meadow, looks up at a butterfly and follows it through the high grass. " * 3


def tables(*, quick: bool) -> Iterator[Table]:
    """The table of all scales."""
    table = Table(
        "A dataset of many sources: seconds and MB of a process, beyond what its imports cost",
        [
            *("sources", "shards", "a training rank opens it", "inspect", "reading their listing", "planning them"),
            f"{ADDED:,} clips are added",
        ],
        note="Opening includes the first pack. Planning reads the results of probing and writes which window goes into "
        f"which shard. Adding is what the index, Energon's metadata and the manifest take for {ADDED:,} clips in "
        f"{ADDED // A_SHARD} new shards. Targets: opening <= 3 s and 100 MB, inspect <= 20 s and 500 MB, planning <= 2 "
        "GB, nothing grows faster than the number of sources, adding does not grow with it.",
    )
    run = _here if quick else _in_child  # the time to start ten processes says nothing
    imports = {name: run(name, Path(), 0) for name in ("open", "inspect", "list", "plan", "add")}
    for sources in QUICK if quick else SCALES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run("write", folder, sources)
            run("probe", folder, sources)
            row = [f"{sources:,}", f"{sources // A_SHARD:,}"]
            for action, base in imports.items():
                took, peak = run(action, folder, sources)
                row.append(f"{seconds(took - base[0])}, {max(0.0, peak - base[1]):.0f} MB")
            table.rows.append(row)
    yield table


def _in_child(action: str, folder: Path, sources: int) -> tuple[float, float]:
    """Seconds and the most memory in MB of a process; without ``sources`` it only imports what it needs."""
    command = [sys.executable, "-m", "bench.data_scale", action, str(folder), str(sources)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return float(found["seconds"]), float(found["megabytes"])


def _here(action: str, folder: Path, sources: int) -> tuple[float, float]:
    start = time.perf_counter()
    if sources:
        with contextlib.redirect_stdout(io.StringIO()):
            ACTIONS[action](folder, sources)
    return time.perf_counter() - start, peak_resident() / 1e6


# -- the made-up dataset -----------------------------------------------------------------------------------------------


def _path(number: int) -> str:
    return f"clips/{number // 10_000:05d}/clip {number:09d}.mp4"


def _digest(number: int) -> str:
    return random.Random(number).randbytes(32).hex()


def _shard(number: int) -> str:
    return f"shard-rank00-{number:06d}.tar"


def _record(number: int) -> SourceRecord:
    return SourceRecord(
        _path(number),
        ACCEPTED,
        split="train",
        sha256=_digest(number),
        bytes=1 << 20,
        samples=1,
        shards=(_shard(number // A_SHARD),),
        frames=81,
        source_fps=24.0,
        height=480.0,
        width=832.0,
        caption_sha256=_digest(-number),
    )


def _planned(number: int) -> PlannedSource:
    info = ClipInfo(81, 81, 24.0, 480.0, 832.0, 1)
    return PlannedSource(
        _path(number),
        Path("/data") / _path(number),
        1 << 20,
        _digest(number),
        _CAPTION,
        info,
        Size(480, 832),
        (Window(0, 81),),
        1,
    )


def _write_shard(folder: Path, number: int, prefix: str) -> ShardRecord:
    import torch

    with ShardWriter(folder, number, "train") as shard:
        for one in range(A_SHARD):
            info = {"caption": "a", "latent_fingerprint": SPEC.fingerprint, "text_tokens": 1}
            latent = torch.full((16, 1, 2, 2), one / A_SHARD)
            shard.write(Sample(f"{prefix}x{one:06d}", latent, torch.zeros(1, 8), info))
    assert shard.record is not None, "it has samples"
    return shard.record


def write(folder: Path, sources: int) -> None:
    """A dataset with so many sources, of one sample each, and the shards that are added to it later."""
    count = sources // A_SHARD
    (folder / META_FOLDER).mkdir()
    for number in range(count, count + ADDED // A_SHARD):
        _write_shard(folder, number, f"new{number:09d}")
    records: list[ShardRecord] = []
    with contextlib.closing(sqlite3.connect(folder / META_FOLDER / INDEX_NAME)) as database:
        for pragma in ("journal_mode = OFF", "synchronous = OFF"):
            database.execute(f"PRAGMA {pragma}")
        tables, _, indices = TABLES.partition("CREATE INDEX")
        database.executescript(tables)
        for number in range(count):
            if not number % _LINKS:
                kind = _write_shard(folder, 900_000 + number // _LINKS, "old")
                offsets, samples = _offsets(folder, kind)
            records.append(dataclasses.replace(kind, name=_shard(number)))
            for suffix in ("", OFFSETS_SUFFIX):
                os.link(folder / (kind.name + suffix), folder / (_shard(number) + suffix))
            database.executemany(
                "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
                (
                    (number, f"{number:09d}x{one:06d}", one, offsets[one], offsets[one + 1] - offsets[one])
                    for one in range(A_SHARD)
                ),
            )
            database.executemany(
                "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
                (
                    (number, one, member.kind, member.content, member.size)
                    for one, (_, members) in enumerate(samples)
                    for member in members
                ),
            )
        database.executescript("CREATE INDEX" + indices)
        database.commit()
    write_metadata(folder, records, records)
    state = added(folder, IndexState(), map(_record, range(sources)))
    shape = ShapeCount("train", 1, 16, 16, (16, 1, 2, 2), 1, sources)
    lengths = (SplitLengths("train", LengthCounts(((1, sources),), ((1, sources),))),)
    Manifest(True, "0", SPEC, SETTINGS.to_dict(), state, tuple(records), (shape,), lengths, count).write(folder)


def _offsets(folder: Path, shard: ShardRecord) -> tuple[list[int], list[tuple[str, list[Member]]]]:
    """Where the samples of a shard are; its file of offsets is written."""
    with open_file(folder / shard.name) as file:
        samples = list(grouped(tar_members(file)))
    offsets = [members[0].offset for _, members in samples] + [samples[-1][1][-1].end]
    (folder / (shard.name + OFFSETS_SUFFIX)).write_bytes(struct.pack(f"<{len(offsets)}Q", *offsets))
    return offsets, samples


# -- what is measured --------------------------------------------------------------------------------------------------


def open_it(folder: Path, sources: int) -> None:
    """As a training rank does, with its first pack."""
    from wan_data.reading.loader import LoaderConfig, PackLoader

    next(iter(PackLoader(LoaderConfig(str(folder), capacity=64), rank=3, world_size=8)))


def inspect_it(folder: Path, sources: int) -> None:
    """``wan-data inspect``."""
    from wan_data.cli import main

    main(["inspect", str(folder)], standalone_mode=False)


def probe_it(folder: Path, sources: int) -> None:
    """The results of probing, which planning reads."""
    write_results(folder / _RESULTS, map(_planned, range(sources)))

    with (folder / _LISTING).open("w", encoding="utf-8") as file:
        for number in range(sources):
            file.write(json.dumps({"video": _path(number), "caption": _CAPTION}) + "\n")


def list_it(folder: Path, sources: int) -> None:
    """Read the listing that names the clips, and go over them once."""
    for _ in files_of_listing(folder / _LISTING):
        pass


def plan_it(folder: Path, sources: int) -> None:
    """Plan the shards of a first batch."""
    results = ProbeResults([folder / _RESULTS])
    plan_shard_batch(folder, results, SETTINGS, first_shard=0)


def add_it(folder: Path, sources: int) -> None:
    """What a run writes and reads that adds clips, less the probing and encoding."""
    manifest = read_manifest(folder)
    restore_metadata(folder, manifest.shards)
    new = range(sources, sources + ADDED)
    count = len(manifest.shards)
    shards = [
        ShardRecord(name, "train", A_SHARD, (folder / name).stat().st_size, sha256_of(folder / name))
        for name in map(_shard, range(count, count + ADDED // A_SHARD))
    ]
    with open_sources(folder, manifest) as index:
        assert not index.find(map(_path, new))
        assert not index.splits_of(map(_digest, new))
    state = added(folder, manifest.index, map(_record, new))
    together = (*manifest.shards, *shards)
    write_metadata(folder, together, manifest.shards)
    dataclasses.replace(manifest, index=state, shards=together, next_shard=len(together)).write(folder)


ACTIONS: dict[str, Callable[[Path, int], None]] = {
    "write": write,
    "probe": probe_it,
    "open": open_it,
    "inspect": inspect_it,
    "list": list_it,
    "plan": plan_it,
    "add": add_it,
}


def main() -> None:
    """One action in this process; prints its seconds and the most memory that the process took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("sources", type=int)
    given = parser.parse_args()
    # What each of them imports.
    import wan_data.cli
    import wan_data.inspect.statistics
    import wan_data.reading.loader  # noqa: F401

    took, peak = _here(given.action, given.folder, given.sources)
    print(json.dumps({"seconds": took, "megabytes": peak}))


if __name__ == "__main__":
    main()
