"""Ranks of one preparation under torchrun: shared counters distribute files and shards among them."""

import datetime
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from wan_model.system import torchrun

T = TypeVar("T")
_TIMEOUT = datetime.timedelta(days=30)


class Ranks:
    """The ranks of a single process; ``TorchrunRanks`` overrides it for several.

    Attributes:
        rank, world_size: of this process and of all processes.
        local_rank: rank on this machine.
    """

    rank, world_size, local_rank = 0, 1, 0

    def partition(self, items: Sequence[T]) -> list[T]:
        """The items of this rank; every item belongs to exactly one rank."""
        return list(items[self.rank :: self.world_size])

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
    """The processes that torchrun has started; they share a key-value store."""

    def __init__(self) -> None:
        from torch.distributed.rendezvous import rendezvous

        self._store: Any
        self._store, self.rank, self.world_size = next(rendezvous("env://", timeout=_TIMEOUT))
        self.local_rank = torchrun.local_rank(self.rank)
        # A restarted group begins with new counters.
        self._prefix = f"wan-data/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def claim(self, items: Sequence[T], name: str) -> Iterator[T]:
        """See ``Ranks``."""
        while (number := self._store.add(f"{self._prefix}/{name}", 1) - 1) < len(items):
            yield items[number]

    def barrier(self, name: str) -> None:
        """See ``Ranks``."""
        key = f"{self._prefix}/barrier/{name}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.world_size:
            time.sleep(0.2)


def ranks_from_environment() -> Ranks:
    """The ranks of torchrun if it has started this process; otherwise a single rank."""
    if torchrun.world_size() > 1 and "MASTER_ADDR" in os.environ:
        return TorchrunRanks()
    return Ranks()
