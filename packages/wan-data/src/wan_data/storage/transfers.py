"""Reads of a store that run while the caller goes on, in each process in threads of its own."""

import concurrent.futures
import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from wan_data.storage.background import Background

T = TypeVar("T")
_THREADS = 8


class Transfers:
    """Runs functions in threads, in the order in which they are submitted.

    The threads begin with the first function, so that a process that forks before has none, and a fork has its own.

    Args:
        threads: that run at a time.
    """

    def __init__(self, threads: int = _THREADS) -> None:
        self._threads = threads
        self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._background: Background | None = None
        self._pending: weakref.WeakSet[concurrent.futures.Future[Any]] = weakref.WeakSet()

    def submit(self, function: Callable[[], T]) -> "concurrent.futures.Future[T]":
        """Run a function; called by one thread at a time."""
        if self._process != os.getpid():
            self._forget()
        if self._background is None:
            self._background = Background(self._threads, "reads of a store", computes=True)
            weakref.finalize(self, self._background.end)
        future = self._background.submit(function)
        self._pending.add(future)
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
