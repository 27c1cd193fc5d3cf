"""On CUDA a process of its own writes asynchronous checkpoints; when it dies Megatron-Core waits for its word for ever.

So it is watched, and its end ends the run with a sentence.
"""

import multiprocessing.connection
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType

# Nobody else's: Slurm's warnings before the end of a job come as SIGUSR1.
_SIGNAL = signal.SIGUSR2
_LOOK_SECONDS = 0.05
_TELL_SECONDS = 0.5


class WriterDiedError(ValueError):
    """The process that writes checkpoints is gone."""


def watch_writer(find: Callable[[], BaseProcess | None]) -> None:
    """From now on the end of a process, other than in order, raises ``WriterDiedError`` in the main thread.

    That wakes the main thread from a wait too. Call from the main thread.

    Args:
        find: the process, or None as long as it has not been started; its starter waits for it at once.
    """
    codes: list[int] = []
    told = False

    def fail(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if told:
            return
        told = True
        raise WriterDiedError(
            f"the process that writes checkpoints ended with {_ending(codes[0])}; "
            "what was saved before is untouched, and the same command goes on from there"
        )

    def wait() -> None:
        while (process := find()) is None:
            time.sleep(_LOOK_SECONDS)
        # By its pipe: who waits for the process itself would take its exit status from Megatron-Core.
        multiprocessing.connection.wait([process.sentinel])
        # The pipe closes while the process ends, a moment before there is a status.
        while (code := process.exitcode) is None:
            time.sleep(_LOOK_SECONDS)
        codes.append(code)
        # Again until it is heard: a signal just before the main thread begins to wait does not wake it.
        while code and not told:
            signal.pthread_kill(main, _SIGNAL)
            time.sleep(_TELL_SECONDS)

    assert threading.current_thread() is threading.main_thread(), "signals are handled there"
    main = threading.get_ident()
    signal.signal(_SIGNAL, fail)
    threading.Thread(target=wait, name="watches the writer of checkpoints", daemon=True).start()


def _ending(code: int) -> str:
    if code < 0:
        hint = "; the system does so where memory runs out" if code == -signal.SIGKILL else ""
        return f"{signal.Signals(-code).name}{hint}"
    return f"exit status {code}"
