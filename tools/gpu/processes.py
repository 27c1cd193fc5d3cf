"""A stage in a process of its own: its deadline, the end of all of its processes, and the rows that it wrote.

Imports no torch, so that the check itself reports where torch cannot be imported.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gpu.rows import Row
from gpu.stage_process import DEVICE_LOST
from gpu.stages import Stage
from wan_model.system.process_tree import processes_with

# Inherited by every process of a stage, also by those in sessions of their own.
_MARK = "WAN_GPU_CHECK_STAGE"
# Between the time that a stage is told and its end by force; a stage needs some seconds to start again.
_GRACE_SECONDS, _RESTART_SECONDS = 4.0, 8.0
_MOST_STARTS = 10
# Of the time that a stage is planned with: with less, it is no fault of the machine that it does not end.
_LITTLE = 0.75
_LOG_LINES, _LOG_BYTES = 40, 20_000


@dataclasses.dataclass
class StageResult:
    """What is known of a stage.

    Attributes:
        stage: which.
        seconds: that it was given, and that it took.
        rows: so far.
        log: the last lines that its processes printed, if a row failed.
        finished: whether it has ended.
    """

    stage: Stage
    deadline: float
    seconds: float = 0.0
    rows: list[Row] = dataclasses.field(default_factory=list)
    log: list[str] = dataclasses.field(default_factory=list)
    finished: bool = False

    def count(self, outcome: str) -> int:
        """Rows that ended so."""
        return sum(row.outcome == outcome for row in self.rows)


def kill_marked(mark: str, seconds: float = 10.0) -> None:
    """Kill all processes with a mark; they may start others meanwhile."""
    deadline = time.monotonic() + seconds
    while (pids := processes_with(_MARK, mark)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


class _Events:
    """The file that a stage writes its rows to, read as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._read, self._rest = path, 0, b""
        self.running: str | None = None
        self.ended = False

    def rows(self) -> list[Row]:
        """The new rows."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            content = file.read()
        self._read += len(content)
        *lines, self._rest = (self._rest + content).split(b"\n")
        found = []
        for line in lines:
            event = json.loads(line)
            if "row" in event:
                found.append(Row(**event["row"]))
                self.running = None
            elif "end" in event:
                self.ended = True
            else:
                self.running = event["begin"]
        return found


def run_stage(
    stage: Stage,
    device: str,
    seconds: float,
    folder: Path,
    environment: Mapping[str, str],
    publish: Callable[[StageResult], None],
    options: Sequence[str] = (),
    ended: Callable[[], bool] = lambda: False,
) -> StageResult:
    """Run a stage; a crash ends one row, and a new process measures the others.

    Args:
        stage: which.
        device: ``cuda`` or ``cpu``.
        seconds: after which all of its processes are killed.
        folder: for its files.
        environment: of its processes.
        publish: called with what is known when rows are new.
        options: further options of ``gpu.stage_process``.
        ended: whether the whole check is to end at once.

    Returns:
        The result, complete.
    """
    folder.mkdir(parents=True)
    start = time.monotonic()
    result, events, log = StageResult(stage, round(seconds, 1)), _Events(folder / "rows.jsonl"), folder / "log"
    end, mark = start + seconds, uuid.uuid4().hex

    def update() -> None:
        if new := events.rows():
            result.rows += new
            result.seconds = round(time.monotonic() - start, 1)
            publish(result)

    again, starts = True, 0
    try:
        while again:
            starts += 1
            left = end - time.monotonic()
            command = [
                *(sys.executable, "-m", "gpu.stage_process", stage.function, "--device", device),
                *("--folder", str(folder), "--seconds", f"{max(1.0, left - _GRACE_SECONDS):.1f}"),
                *("--parent", str(os.getpid()), *options),
            ]
            with log.open("ab") as output:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                    env={**environment, _MARK: mark},
                )  # fmt: skip
            code = _wait(process, end, update, ended)
            kill_marked(mark)
            update()
            # A process that has measured everything may be killed while it ends.
            again = not events.ended and _after(result, code, events.running, end, ended())
            again = again and starts < _MOST_STARTS
            events.running = None
    finally:
        kill_marked(mark)
    result.finished, result.seconds = True, round(time.monotonic() - start, 1)
    if result.count("failed") and log.exists():
        result.log = log.read_bytes()[-_LOG_BYTES:].decode(errors="replace").splitlines()[-_LOG_LINES:]
    publish(result)
    return result


def _wait(
    process: "subprocess.Popen[bytes]", end: float, update: Callable[[], None], ended: Callable[[], bool]
) -> int | None:
    """The exit status, or None at the deadline, or when the whole check ends."""
    while True:
        try:
            return process.wait(min(0.25, max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            update()
            if time.monotonic() >= end or ended():
                process.kill()
                process.wait()
                return None


def _after(result: StageResult, code: int | None, running: str | None, end: float, ended: bool) -> bool:
    """Add the row of a process that ended before its last row; returns whether another one should measure the rest."""
    where = f" in {running!r}" if running else ""
    if ended:
        result.rows.append(Row("the stage itself", "not run", f"the check was ended{where}"))
        return False
    if code is None:
        result.rows.append(_overrun(result, where))
        return False
    if code != DEVICE_LOST:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        result.rows.append(Row(running or "the stage itself", "failed", f"its process was ended {how}"))
    # Without a row that began, a new process would end in the same way.
    progress = running is not None or code == DEVICE_LOST
    if progress and end - time.monotonic() > _RESTART_SECONDS:
        return True
    result.rows.append(Row("the rest of the stage", "failed", "it was not measured after the failure before"))
    return False


def _overrun(result: StageResult, where: str) -> Row:
    """A stage that was given its time and more hangs; one with less may have needed what it was not given."""
    if result.deadline < _LITTLE * result.stage.share:
        why = (
            f"it had {result.deadline:.0f} of the {result.stage.share:.0f} s that it is planned with, and ended{where}"
        )
        return Row("the stage itself", "not run", f"{why}; give more --minutes")
    why = f"it overran its {result.deadline:.0f} s{where} and was killed; what follows was not measured"
    return Row("the stage itself", "failed", why)
