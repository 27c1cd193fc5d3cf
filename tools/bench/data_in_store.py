"""Reading a dataset from an object store on loopback against reading it from the disk that the store has it on."""

import contextlib
import os
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from bench.data import write_shards
from bench.measure import median, ratio, time_rounds
from bench.report import Table
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_model.testing.object_store import environment, object_server

_STEP = 0.05


class _Reader(NamedTuple):
    """A way to read.

    Attributes:
        label: of the row.
        base: the reader that it is compared with.
        stored: whether the dataset is in the store.
        workers: processes.
        cache: its bytes.
        step: seconds that the process sleeps after each pack, as one does whose GPU trains on it.
    """

    label: str
    base: str
    stored: bool = False
    workers: int = 0
    cache: int = 0
    step: float = 0.0


_READERS = {
    "disk": _Reader("disk", "disk"),
    "store": _Reader("store", "disk", stored=True),
    "disk, worker": _Reader("disk, one worker", "disk, worker", workers=1),
    "store, worker": _Reader("store, one worker", "disk, worker", stored=True, workers=1),
    "cache": _Reader("store, kept in a cache on the disk", "disk", stored=True, cache=10**12),
    "disk, steps": _Reader("disk, one worker, beside steps of 50 ms", "disk, steps", workers=1, step=_STEP),
    "store, steps": _Reader(
        "store, one worker, beside steps of 50 ms", "disk, steps", stored=True, workers=1, step=_STEP
    ),
}


def _server(folder: Path) -> contextlib.AbstractContextManager[int]:
    # By default it reads a whole object for the tag of each answer, as no store does.
    return object_server(folder, "--etag-hash", "")


def _packs(url: str, reader: _Reader) -> Generator[int, None, None]:
    config = LoaderConfig(
        url, capacity=4 * 7800, num_workers=reader.workers, packing_buffer=16, cache_bytes=reader.cache
    )
    for pack in PackLoader(config, rank=0, world_size=1):
        time.sleep(reader.step)
        yield len(pack.keys)


def tables(*, quick: bool) -> Iterator[Table]:
    """Yield the table when it is measured."""
    samples = 20 if quick else 80
    with tempfile.TemporaryDirectory() as name, _server(Path(name) / "served") as port:
        folder = Path(name) / "served" / "bucket" / "data"
        folder.mkdir(parents=True)
        size = write_shards(folder, samples)
        variables = environment(f"http://127.0.0.1:{port}", WAN_DATA_CACHE=f"{name}/cache")
        with mock.patch.dict(os.environ, variables):
            endless = {
                key: _packs("s3://bucket/data" if reader.stored else str(folder), reader)
                for key, reader in _READERS.items()
            }

            def an_epoch(packs: Iterator[int]) -> None:
                drawn = 0
                while drawn < samples:
                    drawn += next(packs)

            calls = {key: lambda key=key: an_epoch(endless[key]) for key in endless}
            for call in calls.values():
                call()  # the first epoch fills the cache
            times = time_rounds(calls, 2 if quick else 5)
            for packs in endless.values():
                packs.close()
    table = Table(
        f"Training samples from an object store: {samples} of {size / samples / 1e6:.1f} MB",
        ["dataset", "samples/s", "MB/s", "relative to the disk"],
        note=f"The server, rclone's on loopback, runs on the same {os.cpu_count()} cores as the loader, and reads the "
        "files from the page cache, as the loader does from the disk. Packs of four samples. Target: >= 0.9.",
    )
    for key, reader in _READERS.items():
        took = median(times[key])
        against = ratio(times[reader.base], times[key])
        table.rows.append([reader.label, f"{samples / took:.0f}", f"{size / took / 1e6:.0f}", f"{against:.2f}"])
    yield table
