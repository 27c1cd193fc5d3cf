"""Finding the near-duplicates of up to ten million clips whose fingerprints are made up."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.report import Table, seconds
from wan_data.curation.duplicates import find_duplicates
from wan_data.curation.fingerprints import BITS, PARTS
from wan_model.system.memory import peak_resident

SCALES = (100_000, 1_000_000, 10_000_000)
QUICK = (3_000,)
# One of so many clips is a copy of an earlier one.
_COPY_EVERY = 100
_CHUNK = 200 * _COPY_EVERY
_SHAPE = PARTS, BITS // 8


def tables(*, quick: bool) -> Iterator[Table]:
    """Yield the table when it is measured."""
    table = Table(
        "Near-duplicates of a whole set: the search alone, on fingerprints in a file",
        ["clips", "copies", "found", "others taken for copies", "CPU", "wall", "peak memory, all of Python"],
        note="All bits are independent; the hashes of a copy differ in four bits each from those of its original. The "
        "process has one thread. Target for planning with near-duplicates: <= 2 GB.",
    )
    for clips in QUICK if quick else SCALES:
        command = [sys.executable, "-m", "bench.data_duplicates", str(clips)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        copies = clips // _COPY_EVERY
        table.rows.append(
            [
                *(f"{clips:,}", f"{copies:,}", f"{found['found']:,}", f"{found['others']:,}"),
                *(seconds(found["cpu"]), seconds(found["wall"]), f"{found['megabytes']:.0f} MB"),
            ]
        )
    yield table


def _write(path: Path, clips: int) -> None:
    """Fingerprints of so many clips, of which the last of each hundred is a copy of its first."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, clips, _CHUNK):
            hashes = rng.integers(0, 256, (min(_CHUNK, clips - start), *_SHAPE), dtype=np.uint8)
            copies = hashes[::_COPY_EVERY][: len(hashes) // _COPY_EVERY].copy()
            for byte in range(4):  # a bit of each quarter of a hash
                at = rng.integers(8 * byte, 8 * byte + 8, copies.shape[:2])[..., None]
                bit = np.left_shift(1, rng.integers(0, 8, at.shape)).astype(np.uint8)
                np.put_along_axis(copies, at, np.take_along_axis(copies, at, 2) ^ bit, 2)
            hashes[_COPY_EVERY - 1 :: _COPY_EVERY] = copies
            file.write(hashes.tobytes())


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clips", type=int)
    clips = parser.parse_args().clips
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hashes"
        _write(path, clips)
        hashes = np.memmap(path, np.uint8, "r", shape=(clips, *_SHAPE))
        wall, cpu = time.perf_counter(), time.process_time()
        near = find_duplicates(hashes, np.ones((clips, PARTS), bool))
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    numbers = np.arange(clips)
    others = near.kept != numbers
    copies = numbers % _COPY_EVERY == _COPY_EVERY - 1
    right = others & copies & (near.kept == numbers - _COPY_EVERY + 1)
    print(
        json.dumps(
            {
                **took,
                "found": int(right.sum()),
                "others": int((others & ~right).sum()),
                "megabytes": peak_resident() / 1e6,
            }
        )
    )


if __name__ == "__main__":
    _main()
