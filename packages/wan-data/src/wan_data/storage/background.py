"""Threads that make requests: unlike those of an executor they never hold up the end of a command."""

import atexit
import concurrent.futures
import contextlib
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_SECONDS_AT_EXIT = 5.0
_computing: "weakref.WeakSet[Background]" = weakref.WeakSet()


class Background:
    """Calls functions in threads, which end with the process: a stalled transfer does not hold it up for long.

    Args:
        threads: their number.
        name: of the threads.
        computes: the functions call torch. A thread that Python's end meets in its C++ would abort the process, so that
            at the end some seconds are waited for what is in progress.
    """

    def __init__(self, threads: int, name: str, *, computes: bool = False) -> None:
        self._jobs: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=name, daemon=True) for _ in range(threads)]
        self._process = os.getpid()
        for thread in self._threads:
            thread.start()
        if computes:
            _computing.add(self)

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> concurrent.futures.Future[T]:
        """Call a function when a thread is free."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._jobs.put((future, lambda: function(*arguments, **named)))
        return future

    def end(self) -> None:
        """Let the threads end when they have done what was submitted, and do not wait for them."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self, seconds: float) -> None:
        """Wait for the threads to end, at most some seconds for each."""
        for thread in self._threads:
            thread.join(seconds)

    def finish(self, until: float) -> None:
        """Do nothing more of what was submitted, and wait for the threads until that time of ``time.monotonic``."""
        if self._process != os.getpid():
            return  # of the parent, whose threads a fork does not have
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._jobs.get_nowait()) is not None:
                    job[0].cancel()
        self.end()
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, function = job
            if not future.set_running_or_notify_cancel():
                continue
            with contextlib.suppress(concurrent.futures.InvalidStateError):  # nobody waits for it any more
                try:
                    result = function()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            del job, future, function  # what they hold is not the thread's


@atexit.register
def _finish_computing() -> None:
    until = time.monotonic() + _SECONDS_AT_EXIT
    for one in list(_computing):
        one.finish(until)


def give_up(future: "concurrent.futures.Future[Any]") -> None:
    """Let who waits for a call have a ``CancelledError``, although it may still run."""
    if not future.cancel() and not future.done():
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # it has just ended
            future.set_exception(concurrent.futures.CancelledError())
