"""Writing shards; FORMAT.md describes their content. Equal samples give equal bytes."""

import contextlib
import dataclasses
import fnmatch
import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from wan_data.shards.serialization import info_to_json, tensor_to_pickle, tensor_to_pth
from wan_model.system.files import atomic_write, naming, sha256_of

SHARD_PATTERN = "shard-rank{rank:02d}-{number:06d}.tar"
# All names that a preparation gives: its shards do not depend on the ranks.
SHARD_GLOB = "shard-rank00-*.tar"


def is_shard_name(name: str) -> bool:
    """Whether a preparation may have given a shard this name; it leads to no other folder."""
    return fnmatch.fnmatchcase(name, SHARD_GLOB) and "/" not in name and "\0" not in name


@dataclasses.dataclass(frozen=True)
class Sample:
    """The latent and the text embedding of a window.

    Attributes:
        key: its key in the shard; letters, digits and ``_`` only.
        latent: normalised latent [C, F, H, W].
        text: text embedding [L, D] without padding.
        info: side information for the json member.
    """

    key: str
    latent: Float[Tensor, "C F H W"]
    text: Float[Tensor, "L D"]
    info: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class ShardRecord:
    """The entry of a finished shard in the manifest."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


def sample_key(source: str, start: int) -> str:
    """The key of a window: a digest of its source's relative path, and its first frame at the target rate.

    File names may contain dots, blanks and other characters that readers of shards cannot handle; a digest contains
    none of them, and a window has the same key in every run.
    """
    return f"{source_key(source)}_{start:06d}"


def source_key(source: str) -> str:
    """What the keys of a source's samples begin with, before ``_``; see ``sample_key``."""
    return hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mtime = 0  # the bytes depend on neither time nor user
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))


class ShardWriter:
    """Writes one shard, which gets its name when the block ends without an error.

    Args:
        folder: folder of the dataset.
        number: of the shard.
        split: split of the shard.

    Attributes:
        record: entry of the finished shard; None before, and if no sample was written, which leaves no file.
    """

    def __init__(self, folder: Path, number: int, split: str) -> None:
        self.path, self.split = folder / SHARD_PATTERN.format(rank=0, number=number), split
        self.record: ShardRecord | None = None
        self._stack = contextlib.ExitStack()
        self._tar: tarfile.TarFile | None = None
        self._count = 0

    def __enter__(self) -> "ShardWriter":
        """The file is created with the first sample."""
        return self

    def write(self, sample: Sample) -> None:
        """Add a sample."""
        members = {
            "json": info_to_json(sample.info),
            "pickle": tensor_to_pickle(sample.text),
            "pth": tensor_to_pth(sample.latent),
        }
        self.write_members(sample.key, members)

    def write_members(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample that is serialised already: the content of its members, by what follows the key."""
        if self._tar is None:
            self._file = self._stack.enter_context(atomic_write(self.path))
            self._tar = self._stack.enter_context(
                tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
            )
        with naming(self.path):
            for kind, content in members.items():
                _add(self._tar, f"{key}.{kind}", content)
        self._count += 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Rename the complete file to its name; after an error remove it."""
        if kind is not None:
            # The caller should see the first error, not one of closing the file.
            with contextlib.suppress(Exception):
                self._stack.__exit__(kind, error, trace)
            return
        self._stack.close()
        if self._count:
            size, digest = self.path.stat().st_size, sha256_of(self.path)
            self.record = ShardRecord(self.path.name, self.split, self._count, size, digest)
