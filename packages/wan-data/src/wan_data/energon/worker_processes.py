"""The worker processes of a loader: forked, without what their parent has left to the garbage collector.

A collection in a worker would finalize garbage of the parent, although the threads that it may wait for do not exist in
a fork: a decoded frame of PyAV in a reference cycle ends a pool of threads, and waits for it forever.
"""

import gc
from multiprocessing.context import ForkContext, ForkProcess


class _Process(ForkProcess):
    def start(self) -> None:
        """Fork; in the child everything that exists now is never collected."""
        frozen_before = gc.get_freeze_count()
        gc.freeze()
        try:
            super().start()  # does not return in the child
        finally:
            if not frozen_before:
                gc.unfreeze()


class WorkerContext(ForkContext):
    """The multiprocessing context of a loader's workers."""

    Process = _Process
