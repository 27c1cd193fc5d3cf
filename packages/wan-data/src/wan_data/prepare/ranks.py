"""Ranks of one preparation under torchrun: shared counters distribute files and shards among them."""

import atexit
import contextlib
import datetime
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from wan_model.system import torchrun

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(days=30)
_POLL_SECONDS = 0.2
_BEAT_SECONDS = 2.0
# No library that a rank calls keeps its other threads from running for so long.
_SILENT_SECONDS = 300.0


class Ranks:
    """The ranks of a single process; ``TorchrunRanks`` overrides it for several.

    Attributes:
        rank, world_size: of this process and of all processes.
        local_rank: rank on this machine.
    """

    rank, world_size, local_rank = 0, 1, 0

    def partition(self, items: Iterable[T]) -> Iterator[T]:
        """The items of this rank; every item belongs to exactly one rank."""
        return itertools.islice(items, self.rank, None, self.world_size)

    def claim(self, items: Sequence[T], name: str) -> Iterator[T]:
        """Yield items that no other rank has claimed; over all ranks every item is yielded exactly once.

        Args:
            items: the same sequence on every rank.
            name: key of the shared counter, different for every call.
        """
        del name
        yield from items

    def barrier(self, name: str) -> None:
        """Wait until every rank has reached the barrier of this name."""


class TorchrunRanks(Ranks):
    """The processes that torchrun has started; they share a key-value store.

    A thread of each counts up its own number there. One that was stopped, or whose machine hangs, does not, and the
    others no longer wait for it.
    """

    def __init__(self) -> None:
        from torch.distributed.rendezvous import rendezvous

        self._store: Any
        self._store, self.rank, self.world_size = next(rendezvous("env://", timeout=_TIMEOUT))
        self.local_rank = torchrun.local_rank(self.rank)
        # A restarted group begins with new counters.
        self._prefix = f"wan-data/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        end = threading.Event()
        thread = threading.Thread(target=self._beat, args=(end,), name="shows that this rank lives", daemon=True)
        thread.start()
        # A thread that is in the store's code when the interpreter is finalized would abort the process.
        atexit.register(thread.join, _BEAT_SECONDS)
        atexit.register(end.set)  # the last that is registered is called first

    def _beat(self, end: threading.Event) -> None:
        with contextlib.suppress(Exception):  # the store ends with the run
            while self._beats(self.rank, 1) and not end.wait(_BEAT_SECONDS):
                pass

    def _beats(self, rank: int, more: int = 0) -> int:
        return int(self._store.add(f"{self._prefix}/alive/{rank}", more))

    def claim(self, items: Sequence[T], name: str) -> Iterator[T]:
        """See ``Ranks``."""
        while (number := self._store.add(f"{self._prefix}/{name}", 1) - 1) < len(items):
            yield items[number]

    def barrier(self, name: str) -> None:
        """See ``Ranks``.

        Raises:
            ChildProcessError: another rank gives no sign of life.
        """
        key = f"{self._prefix}/barrier/{name}"
        self._store.add(key, 1)
        # The number of each rank, and since when it is the same; one rank at a time, because there may be hundreds.
        last: dict[int, tuple[int, float]] = {}
        others = itertools.cycle([rank for rank in range(self.world_size) if rank != self.rank])
        looked = time.monotonic()
        while self._store.add(key, 0) < self.world_size:
            time.sleep(_POLL_SECONDS)
            if (now := time.monotonic()) - looked > _SILENT_SECONDS / 2:
                last.clear()  # this process was stopped itself
            looked, rank = now, next(others)
            beats = self._beats(rank)
            if rank not in last or last[rank][0] != beats:
                last[rank] = beats, now
            elif now - last[rank][1] >= _SILENT_SECONDS:
                raise ChildProcessError(
                    f"rank {rank} has given no sign of life for {_SILENT_SECONDS:.0f} seconds: it was stopped, has "
                    "died, or its machine hangs; end it and run the same command again to resume"
                )


def ranks_from_environment() -> Ranks:
    """The ranks of torchrun if it has started this process; otherwise a single rank."""
    if torchrun.world_size() > 1 and "MASTER_ADDR" in os.environ:
        return TorchrunRanks()
    return Ranks()
