"""Energon's index of the shards: a file of offsets beside each shard, and one database of all samples.

Energon's own ``prepare_dataset`` is not used: it forks workers, which outlive a preparation that is killed, and forking
a process with threads may hang. It also renames files that are not yet flushed to the disk, and skips a shard that it
cannot read.
"""

import contextlib
import errno
import struct
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wan_data.shards.writer import ShardRecord
from wan_model.system.files import atomic_path, naming, write_bytes

INDEX_NAME = "index.sqlite"
OFFSETS_SUFFIX = ".idx"


def write_index(folder: Path, meta: Path, shards: Sequence[ShardRecord]) -> None:
    """Write the ``.idx`` file of each shard and the database of all samples.

    Args:
        folder: folder of the dataset.
        meta: its metadata folder.
        shards: all shards, in order.

    Raises:
        OSError: a file cannot be written, or a shard holds another number of samples than its record says.
    """
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.indexing import SqliteIndexWriter
    from megatron.energon.flavors.webdataset.prepare import IndexSample, IndexSamplePart

    with atomic_path(meta / INDEX_NAME) as partial:
        # A killed process may have left these files.
        for leftover in (partial, *meta.glob(f"{INDEX_NAME}*-journal")):
            leftover.unlink(missing_ok=True)
        database: Any = SqliteIndexWriter(EPath(partial))
        with contextlib.closing(database.db):
            for number, shard in enumerate(shards):
                samples, end = _samples_of(folder / shard.name)
                if len(samples) != shard.samples:
                    reason = f"it holds {len(samples)} samples instead of {shard.samples}"
                    raise OSError(errno.EIO, reason, str(folder / shard.name))
                offsets = [members[0].offset for _, members in samples] + [end]
                content = struct.pack(f"<{len(offsets)}Q", *offsets)
                write_bytes(folder / (shard.name + OFFSETS_SUFFIX), content)
                database.append_samples(
                    [
                        IndexSample(
                            tar_file_id=number,
                            sample_key=key,
                            sample_index=index,
                            byte_offset=offsets[index],
                            byte_size=offsets[index + 1] - offsets[index],
                        )
                        for index, (key, _) in enumerate(samples)
                    ]
                )
                database.append_parts(
                    [
                        IndexSamplePart(
                            tar_file_id=number,
                            sample_index=index,
                            part_name=member.name.partition(".")[2],
                            content_byte_offset=member.offset_data,
                            content_byte_size=member.size,
                        )
                        for index, (_, members) in enumerate(samples)
                        for member in members
                    ]
                )
            database.close()


def _samples_of(shard: Path) -> tuple[list[tuple[str, list[tarfile.TarInfo]]], int]:
    """The members of each sample, by key, and the offset of the end of the last member."""
    samples: list[tuple[str, list[tarfile.TarInfo]]] = []
    with naming(shard), _as_os_error(shard), tarfile.open(shard, "r:") as tar:
        for member in tar:
            key = member.name.partition(".")[0]
            if not samples or samples[-1][0] != key:
                samples.append((key, []))
            samples[-1][1].append(member)
        return samples, tar.offset


@contextlib.contextmanager
def _as_os_error(shard: Path) -> Iterator[None]:
    try:
        yield
    except tarfile.TarError as error:
        raise OSError(errno.EIO, f"it is no complete tar file: {error}", str(shard)) from error
