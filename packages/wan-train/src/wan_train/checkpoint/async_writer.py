"""Supervision of the process that writes asynchronous checkpoints on CUDA.

If that process dies, Megatron-Core waits for its result forever; here its end raises an error in the main thread.
"""

import multiprocessing.connection
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType

# Not SIGUSR1, with which Slurm announces the end of a job.
_SIGNAL = signal.SIGUSR2
_POLL_SECONDS = 0.05
_REPEAT_SECONDS = 0.5


class WriterExitedError(ValueError):
    """The process that writes checkpoints has ended."""


def supervise_writer(find: Callable[[], BaseProcess | None]) -> None:
    """If the process ends with a failure, raise ``WriterExitedError`` in the main thread, even while that waits.

    Call from the main thread.

    Args:
        find: returns the process, or None before it is started.
    """
    codes: list[int] = []
    raised = False

    def fail(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised:
            return
        raised = True
        raise WriterExitedError(
            f"the process that writes checkpoints ended with {_ending(codes[0])}; "
            "earlier checkpoints are unchanged, and the same command resumes from them"
        )

    def wait() -> None:
        while (process := find()) is None:
            time.sleep(_POLL_SECONDS)
        # By its sentinel: waiting for the process itself would take the exit status from Megatron-Core.
        multiprocessing.connection.wait([process.sentinel])
        # The sentinel is ready shortly before the exit status is.
        while (code := process.exitcode) is None:
            time.sleep(_POLL_SECONDS)
        codes.append(code)
        # Repeated, because a signal just before the main thread starts to wait does not interrupt the wait.
        while code and not raised:
            signal.pthread_kill(main, _SIGNAL)
            time.sleep(_REPEAT_SECONDS)

    assert threading.current_thread() is threading.main_thread(), "signal handlers run in the main thread"
    main = threading.get_ident()
    signal.signal(_SIGNAL, fail)
    threading.Thread(target=wait, name="watches the writer of checkpoints", daemon=True).start()


def _ending(code: int) -> str:
    if code < 0:
        hint = "; the system does that when memory runs out" if code == -signal.SIGKILL else ""
        return f"{signal.Signals(-code).name}{hint}"
    return f"exit status {code}"
