"""The end of a rank whose child process is stopped (SIGSTOP) and does not go on. Imports no torch.

A rank waits for its loader's workers and for writers of checkpoints without a limit: both may take long where a file
system is slow. One that is stopped never answers, and unlike one that is killed it tells nobody.
"""

import os
import threading
import time
from typing import NoReturn

from wan_model.system.child_process import Supervisor, end_process
from wan_model.system.process_tree import STOPPED_SECONDS, kill_descendants

_POLL_SECONDS = 1.0


class StoppedChildError(ValueError):
    """A child process is stopped."""


def watch_children(supervisor: Supervisor) -> None:
    """End this process with one sentence if one of its children stays stopped; where the system can tell (Linux).

    Args:
        supervisor: to whom it is reported.
    """
    if hasattr(os, "waitid"):
        watch = threading.Thread(target=_watch, args=(supervisor,), name="watches for stopped children", daemon=True)
        watch.start()


def _watch(supervisor: Supervisor) -> NoReturn:
    # Counted in polls, not by a clock: a job that is suspended as a whole, this process included, goes on afterwards.
    polls, pid = 0, None
    while True:
        time.sleep(min(_POLL_SECONDS, STOPPED_SECONDS))
        before, pid = pid, _stopped_child()
        polls = 0 if pid is None or pid != before else polls + 1
        if pid is not None and polls * _POLL_SECONDS >= STOPPED_SECONDS:
            break
    seconds = polls * _POLL_SECONDS
    try:
        # Raised, because torchrun's summary has its traceback.
        raise StoppedChildError(
            f"process {pid}, a worker of the data loader or a writer of checkpoints, was stopped (SIGSTOP) "
            f"{seconds:.0f} seconds ago and does not go on; the same command resumes from the last checkpoint"
        )
    except StoppedChildError as error:
        code = supervisor.record(error)
    kill_descendants()
    end_process(code)


def _stopped_child() -> int | None:
    """A child that is stopped now; its state, and the exit statuses of all, are left to who waits for them.

    One call of the system; ``process_tree.StoppedProcesses`` reads a file for each process of the machine, which would
    take the interpreter from the training loop.
    """
    try:
        found = os.waitid(os.P_ALL, 0, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # there is none
        return None
    return found.si_pid if found is not None and found.si_code == os.CLD_STOPPED else None  # else a debugger did it
