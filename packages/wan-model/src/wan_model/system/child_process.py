"""A child process that ends with its parent and reports its failure. Imports no torch.

| started by | the parent is identified by | its error is printed by |
|---|---|---|
| ``wan_model.system.launcher`` | the environment | the launcher, if it is the first cause |
| torchrun | ``os.getppid()`` | this process, and in torchrun's summary |
| neither | (no parent is monitored) | this process |
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from wan_model.system.process_tree import kill_descendants
from wan_model.system.standard_streams import is_unread_output, system_error_message

# Set by the launcher for each rank: its own process id, and the file where the rank records its failure.
LAUNCHER_PID, FAILURE_FILE = "WAN_LAUNCHER_PID", "WAN_LAUNCHER_FAILURE_FILE"
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_POLL_SECONDS = 0.5
_SECONDS_FOR_THE_CAUSE = 5.0
_PR_SET_PDEATHSIG = 1


# -- failures ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Failure:
    """The failure of a rank.

    Attributes:
        at: time of the failure by ``time.monotonic``, which is common to all processes of a machine, in seconds.
        code: the exit status.
        text: a sentence for users, or a traceback; empty for nothing to be said.
        lost_peer: whether it is a consequence of the end or the hang of another rank.
    """

    at: float
    code: int
    text: str
    lost_peer: bool

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """The failure for an exception.

        A ValueError gives its message, what the system refuses a sentence, any other error its traceback.
        Nothing is said of standard output that nobody reads.
        """
        if is_unread_output(error):
            return cls(time.monotonic(), 1, "", lost_peer=False)
        sentence = str(error) if isinstance(error, ValueError) else system_error_message(error)
        if sentence is not None:
            return cls(time.monotonic(), 2, sentence, lost_peer=False)
        text = "".join(traceback.format_exception(error)).rstrip()
        return cls(time.monotonic(), 1, text, _lost_peer(error))

    def write(self, path: Path) -> None:
        """Write it to a file for the launcher; a line, so that the launcher does not read a part of it."""
        with path.open("wb", buffering=0) as file:
            file.write(json.dumps(dataclasses.asdict(self)).encode() + b"\n")

    @classmethod
    def read(cls, descriptor: int) -> "Failure | None":
        """The failure that a rank has written to an open file, or None."""
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return cls(**json.loads(content)) if content.endswith(b"\n") else None


def _lost_peer(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.distributed.DistError):
        return True
    # gloo, and in some cases NCCL, raise plain RuntimeErrors; those of gloo begin with the location in its source.
    if isinstance(error, RuntimeError) and ("gloo/" in str(error) or "NCCL" in str(error)):
        return True
    return error.__cause__ is not None and _lost_peer(error.__cause__)


def error_message(text: str, rank: str | int | None) -> str:
    """The message that users see; ``rank`` is None for an error that all ranks share."""
    where = "Error" if rank is None else f"Error (rank {rank})"
    return f"{where}:{chr(10) if chr(10) in text else ' '}{text}"


# -- the end of a process ---------------------------------------------------------------------------------------------


def end_after(wait: Callable[[], object]) -> None:
    """Kill this process, its descendants and its process group when ``wait`` returns.

    Args:
        wait: blocks until the parent has ended; called in a separate thread.
    """

    def run() -> None:
        wait()
        kill_descendants()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # includes workers of data loaders and writers of checkpoints
        os._exit(1)

    threading.Thread(target=run, name="follows the parent", daemon=True).start()
    if sys.platform == "linux":
        # The thread of a stopped process does not run, so the kernel continues the process when its parent ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))


def follow_parent(pid: int | None = None) -> None:
    """Kill this process and its process group when its parent ends.

    Args:
        pid: process id of the parent, if known; then a parent that has already ended is detected as well.
    """
    parent = os.getppid() if pid is None else pid
    end_after(lambda: _wait_for_parent(parent))


def _wait_for_parent(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not Linux, an old one, or a container that does not allow it
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        return
    if os.getppid() == parent:  # otherwise it ended before, and its process id may be another process's
        end = select.poll()
        end.register(descriptor, select.POLLIN)
        end.poll()


def end_process(code: int) -> NoReturn:
    """End this process with an exit status; after an error immediately, without the interpreter's finalization.

    Finalization waits for threads and child processes, which may wait for other ranks. It can also abort the process:
    when a thread of gloo releases the tensors of a failed collective, it acquires the GIL, Python terminates the thread
    inside a C++ destructor, and the process aborts with ``terminate called without an active exception`` on standard
    error.
    """
    if code == 0:
        sys.exit(0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# -- the supervisor ---------------------------------------------------------------------------------------------------


class Supervisor:
    """The launcher or torchrun, which started this process and ends it together with the other ranks.

    Args:
        failure_file: the launcher's file for the failure of this process, if our launcher started it.
        parent: process id of our launcher or of torchrun, if one of them started this process.
    """

    def __init__(self, failure_file: Path | None, parent: int | None) -> None:
        self._failure_file, self._parent = failure_file, parent

    @classmethod
    def find(cls) -> "Supervisor":
        """Find it in the environment, and remove the launcher's variables, so that child processes do not use them."""
        file, pid = os.environ.pop(FAILURE_FILE, None), os.environ.pop(LAUNCHER_PID, None)
        if file is not None and pid is not None:
            return cls(Path(file), int(pid))
        return cls(None, os.getppid() if _TORCHRUN in os.environ else None)

    @property
    def is_launcher(self) -> bool:
        """Whether ``wan_model.system.launcher`` started this process."""
        return self._failure_file is not None

    def follow(self) -> None:
        """Kill this process and its process group when the supervisor ends."""
        if self._parent is not None:
            follow_parent(self._parent)

    def record(self, error: Exception) -> int:
        """Report a failure: to the launcher, which prints the first cause over all ranks, otherwise on stderr.

        Returns:
            The exit status.
        """
        failure, rank = Failure.of(error), os.environ.get("RANK")
        if self._failure_file is not None:
            with contextlib.suppress(OSError):  # printed below
                failure.write(self._failure_file)
                return failure.code
        elif self._parent is not None:
            if failure.lost_peer:
                # torchrun ends this process when the rank that is the cause ends; its error should be the only one.
                time.sleep(_SECONDS_FOR_THE_CAUSE)
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)  # for torchrun's own summary
        if failure.text:
            print(error_message(failure.text, rank), file=sys.stderr, flush=True)
        return failure.code
