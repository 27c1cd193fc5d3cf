"""Ranks in the threads of one process."""

from wan_data.prepare.ranks import TorchrunRanks


class ThreadRanks(TorchrunRanks):
    """One of several ranks that are threads and share a store in memory."""

    def __init__(self, store, rank, world_size):
        self._store, self.rank, self.world_size, self.local_rank = store, rank, world_size, rank
        self._prefix = "wan-data/0"
