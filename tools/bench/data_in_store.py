"""Reading a dataset from an object store on loopback against reading it from the disk that the store has it on."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from bench.data import write_shards
from bench.measure import median, ratio, time_rounds
from bench.report import Table
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_model.testing.object_store import environment, object_server

# Label, whether the dataset is in the store, worker processes, bytes of the cache.
_READERS = {
    "disk": ("disk", False, 0, 0),
    "store": ("store", True, 0, 0),
    "disk, worker": ("disk, one worker", False, 1, 0),
    "store, worker": ("store, one worker", True, 1, 0),
    "cache": ("store, kept in a cache on the disk", True, 0, 10**12),
}


def _server(folder: Path) -> contextlib.AbstractContextManager[int]:
    # By default it reads a whole object for the tag of each answer, as no store does.
    return object_server(folder, "--etag-hash", "")


def _packs(url: str, workers: int, cache: int) -> Iterator[int]:
    config = LoaderConfig(url, capacity=4 * 7800, num_workers=workers, packing_buffer=16, cache_bytes=cache)
    for pack in PackLoader(config, rank=0, world_size=1):
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
                key: _packs("s3://bucket/data" if stored else str(folder), workers, cache)
                for key, (_, stored, workers, cache) in _READERS.items()
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
    for key, (label, *_) in _READERS.items():
        took, base = median(times[key]), "disk, worker" if "worker" in key else "disk"
        table.rows.append(
            [label, f"{samples / took:.0f}", f"{size / took / 1e6:.0f}", f"{ratio(times[base], times[key]):.2f}"]
        )
    yield table
