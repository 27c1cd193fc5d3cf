"""The command: installs carried wheels into a temporary folder, runs the stages, writes the report after each."""

import argparse
import contextlib
import fcntl
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from gpu.processes import StageResult, run_stage
from gpu.report import OUTCOMES, Report
from gpu.rows import Row
from gpu.stages import STAGES, Stage
from gpu.wheel_install import install_wheels

ROOT = Path(__file__).resolve().parents[2]
_INSTALL = Stage("install", "Carried wheels", "", 25)
# Of eight minutes, for the start of the check itself and the end of killed processes.
_RESERVE_SECONDS = 5.0


def source_folders() -> list[str]:
    """The folders of our own modules."""
    return [str(ROOT / "tools"), *(str(folder) for folder in sorted(ROOT.glob("packages/*/src")))]


def environment(device: str, site: Path | None = None) -> dict[str, str]:
    """The environment of all processes of the check; ``site`` is the folder of the carried wheels."""
    known = os.environ.get("PYTHONPATH")
    path = [*([str(site)] if site else []), *source_folders(), *([known] if known else [])]
    # On a machine with a GPU, commands would choose it by themselves.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {
        **os.environ,
        **hidden,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore:The pynvml package is deprecated:FutureWarning",
    }


def _commit() -> str | None:
    if (git := shutil.which("git")) is None:
        return None
    done = subprocess.run(
        [git, "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _likely_device() -> str:
    """Without asking torch."""
    return "cuda" if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists() else "cpu"


class Check:
    """A run of the check.

    Args:
        out: folder of the report.
        minutes: for everything.
        device: ``auto``, ``cuda`` or ``cpu``.
        stages: in order.
        wheels: folder of wheels to install for this run, or None.
        quick: on a CPU, only what shows that every stage runs.
    """

    def __init__(
        self,
        out: Path,
        minutes: float,
        device: str,
        stages: Sequence[Stage] = STAGES,
        wheels: Path | None = None,
        quick: bool = False,
    ) -> None:
        self.out, self.stages, self.wheels, self.quick = out, stages, wheels, quick
        # "auto" until torch has been asked, in the first stage.
        self.device = device
        if device == "auto" and all(stage.name != "versions" for stage in stages):
            self.device = _likely_device()
        self.end = time.monotonic() + 60 * minutes - _RESERVE_SECONDS * minutes / 8
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        self._began = time.monotonic()
        self._places = {stage.name: place for place, stage in enumerate(stages)}
        self._lock = threading.Lock()
        # Plain values, because a signal's handler may take no lock that the interrupted code holds.
        self._signal, self._leaving = 0, False
        self.report = Report({"device": self.device, "minutes": minutes, "started": started, "commit": _commit()})

    def _publish(self, result: StageResult) -> None:
        with self._lock:
            if not any(result is known for known in self.report.results):
                self.report.results.append(result)
                # A stage beside others has its first row at no certain time.
                self.report.results.sort(key=lambda known: self._places.get(known.stage.name, -1))
            self._write()

    def _write(self) -> None:
        self.report.seconds = time.monotonic() - self._began
        self.report.write(self.out)

    def _ended(self) -> bool:
        return self._leaving or self._signal != 0

    @contextlib.contextmanager
    def _noted_signals(self) -> Iterator[None]:
        """A signal that asks the process to end is noted, however often it comes; an ignored one stays ignored."""

        def note(number: int, frame: FrameType | None) -> None:
            self._signal = self._signal or number

        asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        heard = [number for number in asking if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                # Once the process is on its way out, a further signal would only change its status.
                signal.signal(number, signal.SIG_IGN if self._signal else handler)

    def run(self) -> int:
        """Run everything; returns the exit status: 0 if no row failed, else 1.

        A signal that asks the process to end ends the stage with all of its processes, and leaves a report; the status
        is then 128 and the signal's number.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with self._noted_signals():
            self._write()
            try:
                with tempfile.TemporaryDirectory(prefix="wan-gpu-check-", ignore_cleanup_errors=True) as name:
                    self._run_stages(Path(name))
                self.report.finished = not self._signal
            finally:
                with self._lock:
                    self._write()
                print(self.report.summary(), flush=True)
            if self._signal:
                return 128 + self._signal
        return 1 if self.report.counts()["failed"] else 0

    def _run_stages(self, work: Path) -> None:
        site = self._install(work) if self.wheels else None
        beside: list[threading.Thread] = []
        try:
            for number, stage in enumerate(self.stages):
                if stage.timed:
                    _join(beside)
                if self._ended():
                    self._publish(_not_begun(stage))
                    continue
                seconds = self._seconds(number)
                if self._runs_beside(stage):
                    beside.append(threading.Thread(target=self._run_guarded, args=(stage, seconds, work, site)))
                    beside[-1].start()
                else:
                    self._run_one(stage, seconds, work, site)
            _join(beside)
        finally:
            self._leaving = True
            _join(beside)

    def _runs_beside(self, stage: Stage) -> bool:
        # On a CPU stages would only take each other's cores.
        return stage.beside and self.device != "cpu"

    def _seconds(self, number: int) -> float:
        """Of the time that is left, for a stage; one beside others has that of those up to the first timed one."""
        stage, later = self.stages[number], self.stages[number:]

        def share(stages: Iterable[Stage]) -> float:
            return sum(one.share for one in stages if not self._runs_beside(one))

        if not self._runs_beside(stage):
            part = stage.share / share(later)
        elif mine := share(itertools.takewhile(lambda one: not one.timed, later)):
            part = mine / share(later)
        else:
            # It has no other to run beside: half is left to the timed ones.
            part = 0.5 if share(later) else 1.0
        return max(1.0, (self.end - time.monotonic()) * part)

    def _run_guarded(self, stage: Stage, seconds: float, work: Path, site: Path | None) -> None:
        """In a thread, whose error would otherwise be seen by nobody."""
        try:
            self._run_one(stage, seconds, work, site)
        except Exception as error:
            lost = StageResult(stage, round(seconds, 1), finished=True)
            lost.rows = [Row("the stage itself", "failed", f"it could not be run: {type(error).__name__}: {error}")]
            self._publish(lost)

    def _run_one(self, stage: Stage, seconds: float, work: Path, site: Path | None) -> None:
        # A GPU has no quick run: what is left out there may be what is wrong.
        options = ["--quick"] if self.quick and self.device == "cpu" else []
        variables = environment(self.device, site)
        folder = work / stage.name
        result = run_stage(stage, self.device, seconds, folder, variables, self._publish, options, self._ended)
        if stage.name == "versions":
            self._note_device(result)
        counts = ", ".join(f"{result.count(outcome)} {outcome}" for outcome in OUTCOMES)
        print(f"{stage.name}: {counts} in {result.seconds:.0f} of {seconds:.0f} s", flush=True)

    def _install(self, work: Path) -> Path:
        assert self.wheels is not None
        start, seconds = time.monotonic(), (self.end - time.monotonic()) * 0.1
        result = StageResult(_INSTALL, round(seconds, 1))
        result.rows = install_wheels(self.wheels, work / "site", seconds, self._ended)
        result.seconds, result.finished = round(time.monotonic() - start, 1), True
        self._publish(result)
        return work / "site"

    def _note_device(self, result: StageResult) -> None:
        said = [str(row.numbers["device"]) for row in result.rows if "device" in row.numbers]
        if self.device == "auto":
            self.device = said[0] if said else _likely_device()
        self.report.facts["device"] = self.device
        for row in result.rows:
            if "card" in row.numbers:
                self.report.facts["card"] = row.numbers["card"]


def _join(threads: Sequence[threading.Thread]) -> None:
    for thread in threads:
        thread.join()


def _not_begun(stage: Stage) -> StageResult:
    return StageResult(stage, 0.0, rows=[Row("the stage itself", "not run", "the check was ended before")])


def _lock_of(out: Path) -> int | None:
    """A lock on a folder for as long as this process runs.

    Returns:
        Its file descriptor, or None on a file system without locks.

    Raises:
        BlockingIOError: another process has it.
    """
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise
    except OSError:
        os.close(folder)
        return None
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_check.json and gpu_check.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="on a CPU: only what shows that every stage runs")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use in this run, see gpu_wheels.py")
    parser.add_argument("--stages", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    given = parser.parse_args(arguments)
    if not 0 < given.minutes < math.inf:
        parser.error(f"--minutes is {given.minutes:g}; it must be positive")
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=given.out):
            pass
        lock = _lock_of(given.out)
    except BlockingIOError:
        parser.error(f"--out is {given.out}, where another check writes its report; name another folder")
    except OSError as error:
        parser.error(f"--out is {given.out}, where nothing can be written ({error.strerror}); name another folder")
    if given.wheels is not None and not list(given.wheels.glob("*.whl")):
        parser.error(f"--wheels is {given.wheels}, which has no wheel; make it with tools/gpu_wheels.py")
    chosen = [stage for stage in STAGES if given.stages is None or stage.name in given.stages]
    try:
        return Check(given.out, given.minutes, given.device, chosen, given.wheels, given.quick).run()
    finally:
        if lock is not None:
            os.close(lock)


if __name__ == "__main__":
    sys.exit(main())
