"""Writing shards: FORMAT.md beside this file says what they hold. Equal samples give equal bytes."""

import contextlib
import dataclasses
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from wan_data.files import sha256_of, written_aside
from wan_data.members import info_to_json, tensor_to_pickle, tensor_to_pth

SHARD_PATTERN = "shard-rank{rank:02d}-{number:06d}.tar"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A window's latent with its text.

    Attributes:
        key: its name in the shard; letters, digits and ``_`` only.
        latent: normalised latent [C, F, H, W].
        text: text embedding [L, D] of true length.
        info: side information for the json member.
    """

    key: str
    latent: Float[Tensor, "C F H W"]
    text: Float[Tensor, "L D"]
    info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ShardRecord:
    """A finished shard, as the manifest lists it."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


def sample_key(source: str, start: int) -> str:
    """The name of a window: a digest of its source's relative path, and its first frame at the target rate.

    File names may hold dots, blanks and anything else that readers of shards stumble over; a digest holds none of it,
    and the same window has the same name in every run.
    """
    return f"{hashlib.sha256(source.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}_{start:06d}"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mtime = 0  # no trace of when, where and by whom
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))


class ShardWriter:
    """Collects samples into numbered shards, one open at a time; a shard is visible only when it is whole.

    Args:
        folder: where.
        samples_per_shard: samples of a full shard.
        rank: the number behind ``shard-rank``.
    """

    def __init__(self, folder: Path, samples_per_shard: int, rank: int = 0) -> None:
        self.folder, self.samples_per_shard, self.rank = folder, samples_per_shard, rank
        self.records: list[ShardRecord] = []

    @contextlib.contextmanager
    def split(self, name: str) -> Iterator["SplitWriter"]:
        """A writer for the samples of one split; its last shard is finished when the block ends well."""
        writer = SplitWriter(self, name)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        writer.finish_shard()


class SplitWriter:
    """Writes samples of one split; made by ``ShardWriter.split``."""

    def __init__(self, shards: ShardWriter, split: str) -> None:
        self.shards, self.split_name = shards, split
        self._stack: contextlib.ExitStack | None = None
        self._tar: tarfile.TarFile | None = None
        self._count = 0

    def _open(self) -> tarfile.TarFile:
        self._path = self.shards.folder / SHARD_PATTERN.format(rank=self.shards.rank, number=len(self.shards.records))
        self._stack = contextlib.ExitStack()
        file = self._stack.enter_context(written_aside(self._path))
        tar = tarfile.TarFile(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        self._tar = self._stack.enter_context(tar)
        return self._tar

    def write(self, sample: Sample) -> None:
        """Add a sample; a full shard is finished at once."""
        tar = self._tar or self._open()
        _add(tar, f"{sample.key}.json", info_to_json(sample.info))
        _add(tar, f"{sample.key}.pickle", tensor_to_pickle(sample.text))
        _add(tar, f"{sample.key}.pth", tensor_to_pth(sample.latent))
        self._count += 1
        if self._count == self.shards.samples_per_shard:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Make the open shard visible, if there is one."""
        if self._stack is None:
            return
        self._stack.close()
        size = self._path.stat().st_size
        self.shards.records.append(
            ShardRecord(self._path.name, self.split_name, self._count, size, sha256_of(self._path))
        )
        self._stack = self._tar = None
        self._count = 0

    def abandon(self) -> None:
        """Drop the open shard, after a failure."""
        if self._stack is None:
            return
        stack, self._stack, self._tar = self._stack, None, None
        error = RuntimeError("abandoned")
        with contextlib.suppress(RuntimeError, OSError):
            stack.__exit__(RuntimeError, error, None)
