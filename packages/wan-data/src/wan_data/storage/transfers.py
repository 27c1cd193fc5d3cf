"""Threads that wait for a store while the caller goes on."""

import concurrent.futures
import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_THREADS = 8
# Of one transfer: its result, and the function that makes it; None ends a thread.
_Job = tuple["concurrent.futures.Future[Any]", Callable[[], Any]]
_Queue = queue.SimpleQueue["_Job | None"]


class Transfers:
    """Runs functions in threads, in the order in which they are submitted.

    Unlike an executor of the standard library, nothing waits for the threads: a process may end, also by an
    interruption, while a store does not answer. A fork has threads of its own.

    Args:
        threads: that run at a time.
    """

    def __init__(self, threads: int = _THREADS) -> None:
        self._threads = threads
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._queue: _Queue = queue.SimpleQueue()
        self._pending: weakref.WeakSet[concurrent.futures.Future[Any]] = weakref.WeakSet()
        self._started = 0

    def submit(self, function: Callable[[], T]) -> "concurrent.futures.Future[T]":
        """Run a function; called by one thread at a time."""
        if self._process != os.getpid():
            self._begin()
        if self._started < self._threads:
            # The thread knows the queue only, so that it does not keep this object.
            threading.Thread(target=_work, args=(self._queue,), name="transfers", daemon=True).start()
            weakref.finalize(self, self._queue.put, None)
            self._started += 1
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._pending.add(future)
        self._queue.put((future, function))
        return future

    def settle(self, seconds: float) -> None:
        """Wait until nothing is in progress, at most so long: then this process may fork."""
        if self._process == os.getpid():
            concurrent.futures.wait(list(self._pending), timeout=seconds)

    def cancel(self) -> None:
        """Leave out what has not begun."""
        if self._process == os.getpid():
            for future in list(self._pending):
                future.cancel()


def _work(jobs: _Queue) -> None:
    while (job := jobs.get()) is not None:
        future, function = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        del job, future, function  # a result may be large
