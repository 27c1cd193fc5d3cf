"""Preparations that are killed, lack disk space or compete: ``python reliability_runs.py CLIPS WORK MODEL COUNTS``.

Everything is imported and the codec loaded once; each preparation is then a forked copy of this process, so that
hundreds of them take minutes. The copy decodes itself, because the subject of these tests is the writing. COUNTS is
JSON, a number for each of ``kills``, ``full_disk`` and ``races``; what was seen is printed as JSON.
"""

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from folder_digests import without_index

from wan_data.prepare import run as running
from wan_data.prepare.encoding import encoder_pool
from wan_data.prepare.probing import pool
from wan_data.prepare.run import prepare
from wan_data.prepare.settings import PrepareSettings
from wan_data.shards.lock import writer_lock
from wan_data.sources.folder import SourceFolder
from wan_data.video.decode import probe, read_windows
from wan_data.video.source_file import Rejected
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.files import sha256_of

SETTINGS = PrepareSettings(areas=(32 * 48,), frames=9, min_frames=5, samples_per_shard=2)


class HereDecoder:
    """``Decoder`` without a process."""

    def __exit__(self, *error: object) -> None:
        pass

    def __init__(self, **options: Any) -> None:
        self.jobs: list[Any] = []

    def start(self) -> None:
        pass

    def submit(self, job: Any) -> None:
        self.jobs.append(job)

    def results(self) -> Any:
        job = self.jobs.pop(0)
        try:
            if job.windows is None:
                yield probe(job.path, job.fps, limits=job.limits)
                return
            yield from read_windows(
                job.path, job.windows, job.size, fps=job.fps, resize_mode="bicubic", center_crop=True, limits=job.limits
            )
        except Rejected as error:
            yield error

    def decode(self, jobs: Any) -> Any:
        for job in jobs:
            self.submit(job)
            for result in self.results():
                yield job, result


class Quiet:
    def stage(self, name: str, total: int) -> None: ...
    def step(self, line: str) -> None: ...
    def log(self, line: str) -> None: ...


@contextlib.contextmanager
def competing_lock(folder: Path) -> Iterator[None]:
    """``writer_lock``, which is kept until both processes have come to it, however busy the machine is."""
    arrivals = folder.with_suffix(".arrivals")
    with arrivals.open("ab") as file:
        file.write(b"x")
    with writer_lock(folder):
        while arrivals.stat().st_size < 2:
            time.sleep(0.001)
        yield


def fork(
    clips: Path, out: Path, model: str, *, limit: int | None = None, log: Path | None = None, competing: bool = False
) -> int:
    """A preparation as a process of its own; its exit code is 0, 1 after a sentence, 70 after anything else."""
    pid = os.fork()
    if pid:
        return pid
    code, said = 70, ""
    try:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if competing:
            running.writer_lock = competing_lock
        prepare(SourceFolder(clips).files(), out, model, SETTINGS, report=Quiet(), device="cpu", decoders=1)
        code = 0
    except (ValueError, OSError) as error:
        code, said = 1, f"{getattr(error, 'filename', '')} | {error}"
    except BaseException as error:
        said = repr(error)
    finally:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if log is not None:
            log.write_text(said)
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kills(clips: Path, work: Path, model: str, count: int, wanted: dict[str, str], seconds: float) -> dict[str, Any]:
    """Kill, take up, kill again, until it is through; then anew."""
    shards = {name: digest for name, digest in wanted.items() if name.endswith(".tar")}
    rng, killed, finished, halves, different = random.Random(0), 0, 0, 0, 0
    number = 0
    while killed < count:
        out = work / f"run{number}"
        number += 1
        while True:
            pid = fork(clips, out, model)
            time.sleep(rng.uniform(0, 1.1 * seconds))
            os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            assert code in (0, -signal.SIGKILL), f"{out}: what was killed cannot be taken up, exit code {code}"
            killed += code == -signal.SIGKILL
            # A shard that can be seen is whole.
            halves += sum(
                shards.get(path.name) != sha256_of(path) for path in (out.glob("*.tar") if out.is_dir() else ())
            )
            if code == 0 or killed >= count:
                break
        assert wait(fork(clips, out, model)) == 0
        finished += 1
        different += without_index(out) != wanted
    return {"killed": killed, "finished": finished, "half_shards": halves, "different": different, "seconds": seconds}


def full_disk(clips: Path, work: Path, model: str, count: int, wanted: dict[str, str], largest: int) -> dict[str, Any]:
    """No file may grow beyond a limit, which is different each time; then it may."""
    seen = []
    for number in range(count):
        out, log = work / f"run{number}", work / f"log{number}"
        limit = round(largest * (number + 0.5) / count)
        code = wait(fork(clips, out, model, limit=limit, log=log))
        again = wait(fork(clips, out, model))
        seen.append([limit, code, log.read_text(), again, without_index(out) == wanted])
    return {"largest": largest, "runs": seen}


def races(clips: Path, work: Path, model: str, count: int, wanted: dict[str, str]) -> dict[str, Any]:
    """Two at the same moment in one folder."""
    seen = []
    for number in range(count):
        out = work / f"run{number}"
        logs = [work / f"log{number}{which}" for which in "ab"]
        pids = [fork(clips, out, model, log=log, competing=True) for log in logs]
        codes = [wait(pid) for pid in pids]
        seen.append([codes, [log.read_text() for log in logs], without_index(out) == wanted])
    return {"runs": seen}


def main() -> None:
    clips, work, model, counts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    torch.set_num_threads(1)
    codec = LatentCodec.from_pretrained(model)
    LatentCodec.from_pretrained = classmethod(lambda cls, *_, **__: codec)  # type: ignore[method-assign]
    pool.Decoder = encoder_pool.Decoder = HereDecoder  # type: ignore[assignment,misc]
    start = time.monotonic()
    assert wait(fork(clips, work / "reference", model)) == 0
    seconds, wanted = time.monotonic() - start, without_index(work / "reference")
    largest = max(path.stat().st_size for path in (work / "reference").rglob("*") if path.is_file())
    found: dict[str, Any] = {}
    for run, more in ((kills, [wanted, seconds]), (full_disk, [wanted, largest]), (races, [wanted])):
        folder = work / run.__name__
        folder.mkdir()
        try:
            found[run.__name__] = run(clips, folder, model, counts[run.__name__], *more)  # type: ignore[operator]
        except Exception:  # the other two are of interest all the same
            found[run.__name__] = {"error": traceback.format_exc()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
