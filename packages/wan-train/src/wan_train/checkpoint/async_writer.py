"""Supervision of the processes that write checkpoints.

Megatron-Core waits for their results forever: on CUDA for the process that writes asynchronous checkpoints, and with
Core 0.16 everywhere for those that a writer, or a rank that saves synchronously, forks to write files side by side.
Here the end of one of them raises an error in the main thread of the process that waits.
"""

import contextlib
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

# Not SIGUSR1, with which Slurm announces the end of a job.
_SIGNAL = signal.SIGUSR2
_POLL_SECONDS = 0.05
_REPEAT_SECONDS = 0.5


class WriterExitedError(ValueError):
    """A process that writes checkpoints has ended."""


class _Alarm:
    """Raises ``WriterExitedError`` in the main thread, in which it is made, even while that waits."""

    def __init__(self) -> None:
        assert threading.current_thread() is threading.main_thread(), "signal handlers run in the main thread"
        self._main = threading.get_ident()
        self._code = 0
        self._raised = False
        self.before = signal.signal(_SIGNAL, self._fail)

    def _fail(self, number: int, frame: FrameType | None) -> None:
        if self._raised:
            return
        self._raised = True
        raise WriterExitedError(
            f"the process that writes checkpoints ended with {_ending(self._code)}; "
            "earlier checkpoints are unchanged, and the same command resumes from them"
        )

    def raise_for(self, code: int, wait: Callable[[float], Any]) -> None:
        """Raise it for an exit status; ``wait`` waits some seconds, and returns true if it is not to be raised."""
        self._code = code
        # Repeated, because a signal just before the main thread starts to wait does not interrupt the wait.
        while not self._raised:
            signal.pthread_kill(self._main, _SIGNAL)
            if wait(_REPEAT_SECONDS):
                return


def supervise_writer(find: Callable[[], BaseProcess | None]) -> None:
    """If the process ends with a failure, raise ``WriterExitedError`` in the main thread, even while that waits.

    Call from the main thread.

    Args:
        find: returns the process, or None before it is started.
    """
    alarm = _Alarm()

    def wait() -> None:
        while (process := find()) is None:
            time.sleep(_POLL_SECONDS)
        # By its sentinel: waiting for the process itself would take the exit status from Megatron-Core.
        multiprocessing.connection.wait([process.sentinel])
        # The sentinel is ready shortly before the exit status is.
        while (code := process.exitcode) is None:
            time.sleep(_POLL_SECONDS)
        if code:
            alarm.raise_for(code, time.sleep)

    threading.Thread(target=wait, name="watches the writer of checkpoints", daemon=True).start()


@contextlib.contextmanager
def forked_writers_supervised() -> Iterator[None]:
    """In this context, if a process that was forked in it ends with a failure, raise ``WriterExitedError``.

    Enter it in the main thread.
    """
    children = multiprocessing.process._children  # type: ignore[attr-defined]  # there is no public list with the dead
    earlier, left, alarm = set(children), threading.Event(), _Alarm()

    def watch() -> None:
        while not left.wait(_POLL_SECONDS):
            codes = [_exit_status(process) for process in set(children) - earlier]
            if failed := [code for code in codes if code]:
                alarm.raise_for(failed[0], left.wait)
                return

    thread = threading.Thread(target=watch, name="watches the writers of a checkpoint", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
        signal.signal(_SIGNAL, alarm.before)


def _exit_status(process: BaseProcess) -> int:
    """0 while it runs; it is left to who waits for it."""
    assert process.pid is not None, "it was started"
    try:
        found = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # somebody has waited for it
        return process.exitcode or 0
    if found is None:
        return 0
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _ending(code: int) -> str:
    if code < 0:
        hint = "; the system does that when memory runs out" if code == -signal.SIGKILL else ""
        return f"{signal.Signals(-code).name}{hint}"
    return f"exit status {code}"
