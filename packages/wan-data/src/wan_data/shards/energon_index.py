"""Energon's index of the shards: a file of offsets beside each shard, and one database of all samples.

Energon's own ``prepare_dataset`` is not used: it forks workers, which outlive a preparation that is killed, and forking
a process with threads may hang. It also renames files that are not yet flushed to the disk, and skips a shard that it
cannot read. Nor is its writer of the database, so that the index is the same whatever version is installed.
"""

import contextlib
import errno
import sqlite3
import struct
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from wan_data.shards.writer import ShardRecord
from wan_model.system.files import atomic_path, naming, write_bytes

INDEX_NAME = "index.sqlite"
OFFSETS_SUFFIX = ".idx"
# The tables of Energon 7.4; 6.0 reads the first of them.
_TABLES = """
CREATE TABLE samples (
    tar_file_id INTEGER NOT NULL,
    sample_key TEXT NOT NULL UNIQUE,
    sample_index INTEGER NOT NULL,
    byte_offset INTEGER,
    byte_size INTEGER
);
CREATE TABLE sample_parts (
    tar_file_id INTEGER,
    sample_index INTEGER,
    part_name TEXT,
    content_byte_offset INTEGER,
    content_byte_size INTEGER
);
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full
    ON sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size);
"""


def write_index(folder: Path, meta: Path, shards: Sequence[ShardRecord]) -> None:
    """Write the ``.idx`` file of each shard and the database of all samples.

    Args:
        folder: folder of the dataset.
        meta: its metadata folder.
        shards: all shards, in order.

    Raises:
        OSError: a file cannot be written, or a shard holds another number of samples than its record says.
    """
    with atomic_path(meta / INDEX_NAME) as partial:
        # A killed process may have left these files.
        for leftover in (partial, *meta.glob(f"{INDEX_NAME}*-journal")):
            leftover.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(partial)) as database:
            database.executescript(_TABLES)
            for number, shard in enumerate(shards):
                samples, end = _samples_of(folder / shard.name)
                if len(samples) != shard.samples:
                    reason = f"it holds {len(samples)} samples instead of {shard.samples}"
                    raise OSError(errno.EIO, reason, str(folder / shard.name))
                offsets = [members[0].offset for _, members in samples] + [end]
                content = struct.pack(f"<{len(offsets)}Q", *offsets)
                write_bytes(folder / (shard.name + OFFSETS_SUFFIX), content)
                database.executemany(
                    "INSERT INTO samples VALUES (?, ?, ?, ?, ?)",
                    [
                        (number, key, index, offsets[index], offsets[index + 1] - offsets[index])
                        for index, (key, _) in enumerate(samples)
                    ],
                )
                database.executemany(
                    "INSERT INTO sample_parts VALUES (?, ?, ?, ?, ?)",
                    [
                        (number, index, member.name.partition(".")[2], member.offset_data, member.size)
                        for index, (_, members) in enumerate(samples)
                        for member in members
                    ],
                )
            database.commit()


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
