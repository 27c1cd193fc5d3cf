"""A child process: it ends when its parent does, and records why it fails. Imports no torch.

Started by                       the parent is found by                its error is shown by
===============================  ====================================  =============================================
``wan_model.system.launcher``    the environment                       the launcher, if it is the cause of the end
torchrun                         being this process's parent           this process, and in torchrun's summary
neither                          (nobody is followed)                  this process
===============================  ====================================  =============================================
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

from wan_model.system.files import write_bytes

# Set by the launcher for each rank: its own process id, and the folder where ranks record failures.
LAUNCHER_PID, FAILURES = "WAN_LAUNCHER_PID", "WAN_LAUNCHER_FAILURES"
_TORCHRUN = "TORCHELASTIC_RUN_ID"
_POLL_SECONDS = 0.5
_SECONDS_FOR_THE_CAUSE = 5.0
_PR_SET_PDEATHSIG = 1


# -- why a process fails ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a rank cannot go on.

    Attributes:
        at: by ``time.monotonic``, which all processes of a machine share, seconds.
        code: the exit status that goes with it.
        text: a sentence for users, or a traceback.
        lost_peer: it follows from another rank's end, or from its silence.
    """

    at: float
    code: int
    text: str
    lost_peer: bool

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """A ValueError is a sentence, anything else is shown with its traceback."""
        if isinstance(error, ValueError):
            return cls(time.monotonic(), 2, str(error), lost_peer=False)
        text = "".join(traceback.format_exception(error)).rstrip()
        return cls(time.monotonic(), 1, text, _lost_peer(error))

    def write(self, folder: Path, rank: int) -> None:
        """Record it for the launcher."""
        write_bytes(folder / f"{rank}.json", json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def read(cls, folder: Path, rank: int) -> "Failure | None":
        """What a rank has recorded, if it has."""
        try:
            return cls(**json.loads((folder / f"{rank}.json").read_bytes()))
        except FileNotFoundError:
            return None


def _lost_peer(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.distributed.DistError):
        return True
    # Errors of gloo, and some of NCCL, are plain ones; gloo's begin with the place in its source.
    if isinstance(error, RuntimeError) and ("gloo/" in str(error) or "NCCL" in str(error)):
        return True
    return error.__cause__ is not None and _lost_peer(error.__cause__)


def error_message(text: str, rank: str | int | None) -> str:
    """An error as users see it; without a rank where it is every rank's."""
    where = "Error" if rank is None else f"Error (rank {rank})"
    return f"{where}:{chr(10) if chr(10) in text else ' '}{text}"


# -- the end of a process ---------------------------------------------------------------------------------------------


def end_after(wait: Callable[[], object]) -> None:
    """From now on this process ends, with all that it has started in its group, when ``wait`` returns.

    Args:
        wait: returns when whoever this process works for is gone; called in a thread of its own.
    """

    def run() -> None:
        wait()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # workers of a data loader and writers of checkpoints too
        os._exit(1)

    threading.Thread(target=run, name="follows the parent", daemon=True).start()
    if sys.platform == "linux":
        # The thread of a stopped process would not run: the kernel continues the process when its parent ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))


def follow_parent(pid: int | None = None) -> None:
    """From now on this process ends, with all that it has started in its group, when its parent does.

    Args:
        pid: of the parent, if it is known from before; a parent that is gone already is then noticed, too.
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
    if os.getppid() == parent:  # else it was gone before, and its number is another process's
        end = select.poll()
        end.register(descriptor, select.POLLIN)
        end.poll()


def end_process(code: int) -> NoReturn:
    """End this process with an exit status; after an error at once, without the interpreter's finalization.

    Finalization waits for threads and for child processes, which may wait for other ranks. It also breaks gloo: a
    thread of gloo that releases the tensors of a failed collective then asks for the interpreter, Python ends that
    thread inside a destructor of C++, and the process aborts with ``terminate called without an active exception`` on
    standard error.
    """
    if code == 0:
        sys.exit(0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


# -- whoever started this process -------------------------------------------------------------------------------------


class Supervisor:
    """Whoever started this process and ends it with the other ranks.

    Args:
        failures: the launcher's folder for failures, if our launcher started this process.
        parent: process id of our launcher or of torchrun, if one of them started this process.
    """

    def __init__(self, failures: Path | None, parent: int | None) -> None:
        self._failures, self._parent = failures, parent

    @classmethod
    def find(cls) -> "Supervisor":
        """From the environment; the launcher's variables are removed, so that children do not take them for theirs."""
        folder, pid = os.environ.pop(FAILURES, None), os.environ.pop(LAUNCHER_PID, None)
        if folder is not None and pid is not None:
            return cls(Path(folder), int(pid))
        return cls(None, os.getppid() if _TORCHRUN in os.environ else None)

    @property
    def is_launcher(self) -> bool:
        """Whether ``wan_model.system.launcher`` started this process."""
        return self._failures is not None

    def follow(self) -> None:
        """From now on this process, and all that it starts in its group, ends when the supervisor does."""
        if self._parent is not None:
            follow_parent(self._parent)

    def record(self, error: Exception) -> int:
        """Say why this process ends: to the launcher, which shows the cause of all ranks' failures, else on stderr.

        Returns:
            The exit status for it.
        """
        failure, rank = Failure.of(error), os.environ.get("RANK")
        if self._failures is not None:
            assert rank is not None, "the launcher sets it"
            with contextlib.suppress(OSError):  # a full disk, for one: shown below
                failure.write(self._failures, int(rank))
                return failure.code
        elif self._parent is not None:
            if failure.lost_peer:
                # torchrun ends this process as soon as the one ends that is the cause, whose error should be seen.
                time.sleep(_SECONDS_FOR_THE_CAUSE)
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)  # for torchrun's own summary
        print(error_message(failure.text, rank), file=sys.stderr, flush=True)
        return failure.code
