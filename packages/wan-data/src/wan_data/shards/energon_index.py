"""Energon's index of the shards, made by its own parts in this process.

Energon's ``prepare_dataset`` forks workers. They outlive a preparation that is killed, and a fork of a process with
threads may hang.
"""

import contextlib
import errno
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_data.shards.writer import ShardRecord
from wan_model.system.files import atomic_path

INDEX_NAME = "index.sqlite"
_ROWS = 4096  # written at once


def write_index(folder: Path, meta: Path, shards: Sequence[ShardRecord]) -> None:
    """Write each shard's ``.idx`` and the database of all samples, which takes its name when it is whole.

    Args:
        folder: the dataset's.
        meta: its folder of metadata.
        shards: in their order.

    Raises:
        OSError: a file cannot be written, or a shard holds other samples than its record says.
    """
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.prepare import (
        IndexShardInfo,
        SqliteIndexWriterAggregator,
        WebdatasetPreparator,
    )

    places = {shard.name: number for number, shard in enumerate(shards)}
    with atomic_path(meta / INDEX_NAME) as partial:
        # A killed process may have left them.
        for left in (partial, *meta.glob(f"{INDEX_NAME}*-journal")):
            left.unlink(missing_ok=True)
        index: Any = SqliteIndexWriterAggregator(EPath(partial), total_tasks=len(shards))
        index.on_start(None)
        with contextlib.closing(index.writer.db):
            for shard in shards:
                rows = WebdatasetPreparator._preprocess_tar(
                    shard.name, shard_to_idx=places, parent_path=EPath(folder), max_parts=50
                )
                while batch := list(itertools.islice(rows, _ROWS)):
                    last = batch[-1]
                    # Energon logs what goes wrong and goes on with no samples.
                    if isinstance(last, IndexShardInfo) and last.shard_info.count != shard.samples:
                        found = f"{last.shard_info.count} samples instead of {shard.samples}"
                        raise OSError(errno.EIO, f"Energon finds {found} in it", str(folder / shard.name))
                    index.on_item(batch, None)
            index.on_finish(None)
