"""``python -m bench.data_ways``: one dataset by every way to prepare it, and the digest of its files."""

import argparse
import hashlib
import itertools
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.data import FRAMES, write_clips, write_model
from bench.measure import run_process
from bench.report import Table, to_markdown
from wan_data.sources.modification_times import TIMES_NAME
from wan_model.system.files import sha256_of
from wan_model.testing.object_store import environment, object_server

_CLIPS, _WINDOWS, _BUCKET = 8, 3, "s3://bucket"


class Ways:
    """The commands, each into a folder of its own.

    Args:
        work: a folder for all that is written.
        url: of the object store.
        served: the folder of its bucket.
    """

    def __init__(self, work: Path, url: str, served: Path) -> None:
        self.work, self.served, self.variables = work, served, environment(url, RAY_AUTH_MODE="disabled")
        (served / "clips").mkdir(parents=True)
        write_clips(served / "clips", _CLIPS, _WINDOWS)
        self.model = write_model(work / "model", true_size=False)

    def digest(self, places: str, run_by: str, processes: int) -> tuple[int, str]:
        """Files of the dataset and their digest.

        Args:
            places: ``SOURCES to OUTPUT``, each ``disk`` or ``store``.
            run_by: ``local``, ``torchrun`` or ``Ray``, which has a cluster of its own.
            processes: encoding processes, ranks or actors.
        """
        sources, output = places.split(" to ")
        folder = f"{run_by}-{processes}-{sources}-{output}"
        out = (self.work if output == "disk" else self.served) / folder
        command: Sequence[object] = [
            *("prepare", "--video-folder", self.served / "clips" if sources == "disk" else f"{_BUCKET}/clips"),
            *("--output-folder", out if output == "disk" else f"{_BUCKET}/{folder}"),
            *("--work-folder", self.work / f"{folder}.work", "--model", self.model, "--device", "cpu"),
            *("--height", 32, "--width", 48, "--frames", FRAMES, "--samples-per-shard", 2),
        ]
        scripts = Path(sysconfig.get_path("scripts"))
        if run_by == "torchrun":
            start = [scripts / "torchrun", "--standalone", "--nproc-per-node", processes, "--no-python"]
            command = [*start, scripts / "wan-data", *command]
        else:
            place = "ray" if run_by == "Ray" else "local"
            command = [scripts / "wan-data", *command, "--num-processes", processes, "--on", place]
        run_process(command, 1, **self.variables)
        return digest_of(out)


def digest_of(folder: Path) -> tuple[int, str]:
    """The number of files below a folder, and one digest of their names and contents.

    Without the times at which the sources were changed: a store has others.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != TIMES_NAME)
    lines = (f"{sha256_of(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    return len(files), hashlib.sha256("".join(lines).encode()).hexdigest()


def table() -> Table:
    """Every way and its digest."""
    found = Table("One dataset by every way", ["sources to output", "run by, processes", "files", "digest"])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with object_server(work / "served") as port:
            ways = Ways(work, f"http://127.0.0.1:{port}", work / "served" / "bucket")
            for places in ("disk to disk", "store to disk", "disk to store", "store to store"):
                for run_by, count in itertools.product(("local", "torchrun", "Ray"), (1, 2, 3)):
                    files, digest = ways.digest(places, run_by, count)
                    found.rows.append([places, f"{run_by}, {count}", f"{files}", digest])
                    print(*found.rows[-1], sep=", ", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Print the table; 1 if the digests differ."""
    argparse.ArgumentParser(prog="bench.data_ways", description=__doc__).parse_args()
    found = table()
    print(to_markdown(found))
    return int(len({tuple(row[2:]) for row in found.rows}) > 1)


if __name__ == "__main__":
    sys.exit(main())
