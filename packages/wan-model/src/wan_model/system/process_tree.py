"""Processes by their descent or environment, whatever their session and process group (Linux; elsewhere none)."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

STOPPED_SECONDS = 8.0
_PR_SET_CHILD_SUBREAPER = 36
# A longer time between two looks is that of a process which was itself stopped, such as by Ctrl+Z.
_LONGEST_LOOK_SECONDS = 1.0


def _state_and_parent(process: int) -> tuple[str, int]:
    # A name in parentheses, which may contain anything; then the state and the parent.
    state, parent = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[:2]
    return state.decode(), int(parent)


def is_running(process: int) -> bool:
    """Whether a process has not ended; one whose exit status nobody has collected yet has."""
    with contextlib.suppress(OSError):
        return _state_and_parent(process)[0] not in "ZX"
    return False


def environment_of(process: int) -> dict[str, str]:
    """The environment that a process was started with; empty if it has ended or is another user's."""
    with contextlib.suppress(OSError):
        entries = Path(f"/proc/{process}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return {}


def processes_with(variable: str, value: str) -> list[int]:
    """The process ids of all other processes that were started with this variable of the environment."""
    with contextlib.suppress(FileNotFoundError):
        numbers = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
        return [one for one in numbers if one != os.getpid() and environment_of(one).get(variable) == value]
    return []


class StoppedProcesses:
    """Finds processes that a signal such as SIGSTOP has stopped and that do not go on (Linux; elsewhere none).

    Args:
        seconds: how long they may stand still.
    """

    def __init__(self, seconds: float = STOPPED_SECONDS) -> None:
        self._seconds = seconds
        self._stopped: dict[int, float] = {}
        self._last = time.monotonic()

    def look(self, processes: Iterable[int]) -> list[int]:
        """Those of the processes that have been stopped at every look for so long; call it several times a second."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, _LONGEST_LOOK_SECONDS), now
        before, self._stopped = self._stopped, {}
        for process in processes:
            with contextlib.suppress(OSError):
                if _state_and_parent(process)[0] == "T":
                    self._stopped[process] = before.get(process, -passed) + passed
        return [process for process, seconds in self._stopped.items() if seconds >= self._seconds]


@contextlib.contextmanager
def subreaper() -> Iterator[None]:
    """Make orphaned descendants of this process its children, so that it can find them and wait for their end."""
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def descendants(kept: Collection[int] = ()) -> list[int]:
    """The process ids of the descendants of this process, parents first.

    Args:
        kept: children that are left out, and what is below them.
    """
    children = defaultdict(list)
    with contextlib.suppress(FileNotFoundError):
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) not in kept:
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    _, parent = _state_and_parent(int(folder.name))
                    children[parent].append(int(folder.name))
    found = [os.getpid()]
    for process in found:
        found += children[process]
    return found[1:]


def kill_descendants(kept: Collection[int] = ()) -> list[int]:
    """Send SIGKILL to all descendants of this process but those of ``kept``; returns their process ids."""
    found = descendants(kept)
    for process in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    return found


def end_descendants(kept: Collection[int], deadline: float) -> None:
    """Kill all descendants, and collect the exit status of those that are or become children of this process.

    Args:
        kept: see ``descendants``.
        deadline: by ``time.monotonic``; what has not ended then is left.
    """
    while (left := kill_descendants(kept)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        time.sleep(0.01)
