"""Supervision of the processes that write checkpoints.

Megatron-Core waits for their results forever: on CUDA for the process that writes asynchronous checkpoints, and with
Core 0.16 everywhere for those that a writer, or a rank that saves synchronously, forks to write files side by side.
Here the end of one of them raises an error in the main thread of the process that waits.
"""

import contextlib
import multiprocessing.connection
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
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
    """Raises ``WriterExitedError`` in the main thread, in which it is made, even while that waits.

    Args:
        once: not again where an error was raised already. It can be lost: Python ignores one that is raised in a hook.

    Attributes:
        quiet: whether nothing is raised now.
    """

    def __init__(self, *, once: bool) -> None:
        assert threading.current_thread() is threading.main_thread(), "signal handlers run in the main thread"
        self._main = threading.get_ident()
        self._said = ""
        self._once, self.quiet = once, False
        self.before = signal.signal(_SIGNAL, self._fail)

    def _fail(self, number: int, frame: FrameType | None) -> None:
        if self.quiet:
            return
        self.quiet = self._once
        raise WriterExitedError(self._said)

    def ring(self, said: str, wait: Callable[[float], Any]) -> None:
        """Raise the error; ``wait`` waits some seconds, and returns true if it is not to be raised any more."""
        self._said = said
        # Repeated, because a signal just before the main thread starts to wait does not interrupt the wait.
        while not (self._once and self.quiet):
            signal.pthread_kill(self._main, _SIGNAL)
            if wait(_REPEAT_SECONDS):
                return


def supervise_writer(find: Callable[[], BaseProcess | None]) -> None:
    """If the process ends with a failure, raise ``WriterExitedError`` in the main thread, even while that waits.

    Call from the main thread.

    Args:
        find: returns the process, or None before it is started.
    """
    alarm = _Alarm(once=True)

    def wait() -> None:
        while (process := find()) is None:
            time.sleep(_POLL_SECONDS)
        # By its sentinel: waiting for the process itself would take the exit status from Megatron-Core.
        multiprocessing.connection.wait([process.sentinel])
        # The sentinel is ready shortly before the exit status is.
        while (code := process.exitcode) is None:
            time.sleep(_POLL_SECONDS)
        if code:
            alarm.ring(
                f"the process that writes checkpoints ended with {_ending(code)}; "
                "earlier checkpoints are unchanged, and the same command resumes from them",
                time.sleep,
            )

    threading.Thread(target=wait, name="watches the writer of checkpoints", daemon=True).start()


@contextlib.contextmanager
def forked_writers_supervised() -> Iterator[None]:
    """In this context, if a process that is forked in it ends with a failure, raise ``WriterExitedError``.

    The other processes are ended then: nobody would take their results. Enter it in the main thread.
    """
    started: list[BaseProcess] = []
    left, alarm = threading.Event(), _Alarm(once=False)

    def watch() -> None:
        while not left.wait(_POLL_SECONDS):
            if failed := [code for code in (process.exitcode for process in list(started)) if code]:
                alarm.ring(f"a process that writes its files ended with {_ending(failed[0])}", left.wait)
                return

    def start(process: BaseProcess) -> None:
        alarm.quiet = True  # a fork has hooks
        try:
            BaseProcess.start(process)
            started.append(process)
        finally:
            alarm.quiet = False

    thread = threading.Thread(target=watch, name="watches the writers of a checkpoint", daemon=True)
    # The processes are noted here: multiprocessing forgets those that have ended when it starts another.
    ForkProcess.start = start  # type: ignore[method-assign, assignment]
    thread.start()
    try:
        try:
            yield
        finally:
            alarm.quiet = True
            del ForkProcess.start
            left.set()
            thread.join()
    except BaseException:
        for process in started:
            process.kill()
            process.join()
        raise
    finally:
        signal.signal(_SIGNAL, alarm.before)


def _ending(code: int) -> str:
    if code < 0:
        hint = "; the system does that when memory runs out" if code == -signal.SIGKILL else ""
        return f"{signal.Signals(-code).name}{hint}"
    return f"exit status {code}"
