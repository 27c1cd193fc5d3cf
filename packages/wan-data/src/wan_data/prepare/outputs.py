"""Where a preparation writes its dataset: a folder of the disk. ``store_output`` has that of a store."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from wan_data.index.manifest import Manifest
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.removal import check_shard
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.shard_batches import ShardPlan
from wan_data.shards.energon_metadata import restore_metadata, write_metadata
from wan_data.shards.writer import ShardRecord

WrittenShards = Generator[tuple[ShardPlan, FinishedShard], None, None]


class Output:
    """The folder of the dataset itself, in which what is written is where it belongs.

    Args:
        folder: of the dataset.
        name: of the dataset, for messages.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    @contextlib.contextmanager
    def opened(self, ranks: Ranks) -> Iterator[None]:
        """Make the folder that of the dataset as it is; no other process uses it in the block."""
        del ranks
        yield

    def cleared(self) -> None:
        """The dataset is to be replaced, and its folder has been cleared."""

    def shards_written(self, written: WrittenShards) -> WrittenShards:
        """The shards, when they are where they belong."""
        return written

    def shard_written(self, shard: ShardRecord) -> None:
        """Bring one shard to where it belongs."""

    def check_shard(self, shard: ShardRecord) -> None:
        """Check that a shard can be written again without some samples.

        Raises:
            ValueError: it is missing or damaged.
        """
        check_shard(self.folder, shard)

    @contextlib.contextmanager
    def shard_here(self, shard: ShardRecord) -> Iterator[None]:
        """Have a shard in the folder, for the block."""
        yield

    def write_metadata(self, shards: Iterable[ShardRecord], before: Iterable[ShardRecord]) -> None:
        """See ``wan_data.shards.energon_metadata.write_metadata``."""
        write_metadata(self.folder, tuple(shards), tuple(before))

    def restore_metadata(self, manifest: Manifest) -> bool:
        """See ``wan_data.shards.energon_metadata.restore_metadata``."""
        return restore_metadata(self.folder, manifest.shards)

    def commit(self, manifest: Manifest) -> None:
        """Make what the folder holds that of the dataset: all that its manifest names is complete."""
