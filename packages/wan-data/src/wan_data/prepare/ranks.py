"""Several launches of one preparation, under torchrun: a few shared counters say who does what."""

import datetime
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
_PATIENCE = datetime.timedelta(days=30)


class Ranks:
    """This process alone.

    Attributes:
        rank, world_size: among the launches.
        local_rank: on this machine.
    """

    rank, world_size, local_rank = 0, 1, 0

    def share(self, items: Sequence[T]) -> list[T]:
        """The items that fall to this rank; every item falls to exactly one."""
        return list(items[self.rank :: self.world_size])

    def claim(self, items: Sequence[T], name: str) -> Iterator[T]:
        """Items that no other rank has taken yet, one after another; every item is given out exactly once.

        Args:
            items: the same on every rank.
            name: of this distribution.
        """
        del name
        yield from items

    def wait_for_all(self, name: str) -> None:
        """Return when every rank has come here."""


class TorchrunRanks(Ranks):
    """The processes that torchrun has started, who share a key-value store."""

    def __init__(self) -> None:
        from torch.distributed.rendezvous import rendezvous

        self._store: Any
        self._store, self.rank, self.world_size = next(rendezvous("env://", timeout=_PATIENCE))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        # Of a restarted group: its counters begin anew.
        self._prefix = f"wan-data/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def claim(self, items: Sequence[T], name: str) -> Iterator[T]:
        """See ``Ranks``."""
        while (number := self._store.add(f"{self._prefix}/{name}", 1) - 1) < len(items):
            yield items[number]

    def wait_for_all(self, name: str) -> None:
        """See ``Ranks``."""
        key = f"{self._prefix}/barrier/{name}"
        self._store.add(key, 1)
        while self._store.add(key, 0) < self.world_size:
            time.sleep(0.2)


def ranks_of_environment() -> Ranks:
    """Torchrun's, where it has started this process; else this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ:
        return TorchrunRanks()
    return Ranks()
