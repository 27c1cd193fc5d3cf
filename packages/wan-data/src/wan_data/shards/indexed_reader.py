"""Reading single samples of a dataset by number, by the offsets in the ``.idx`` files beside its shards."""

import bisect
import collections
import contextlib
import io
import itertools
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from wan_data.shards.energon_index import OFFSETS_SUFFIX, REMEDY, read_offsets
from wan_data.shards.reader import grouped, read_members
from wan_data.shards.serialization import MEMBERS
from wan_data.shards.stored_shards import StoredShards
from wan_data.shards.tar_headers import read_member, tar_members
from wan_data.storage.files import Listing
from wan_data.storage.location import Location, StorePath
from wan_data.storage.range_cache import RangeCache
from wan_model.system.safe_reading import open_file

# Bytes at the beginning of a sample, in which its side information is if it comes first.
_HEAD = 1 << 16


class IndexedShards:
    """The samples of several shards by number: the bytes of their members, each checked to be where the index says.

    Files are opened when they are needed, so that a fork made before that has its own. Threads may read from a store.

    Args:
        folder: of the dataset.
        shards: names and numbers of samples, in order.
        open_files: most shards that are open at once.
        listing: of the folder, if it is in a store.
        cache: of what is read from a store.
    """

    def __init__(
        self,
        folder: Location,
        shards: Sequence[tuple[str, int]],
        open_files: int = 16,
        *,
        listing: Listing | None = None,
        cache: RangeCache | None = None,
    ) -> None:
        self._folder, self._shards, self._most = folder, shards, open_files
        self._firsts = [0, *itertools.accumulate(count for _, count in shards)]
        self._stored: StoredShards | None = None
        if isinstance(folder, StorePath):
            assert listing is not None, "a folder of a store is listed"
            self._stored = StoredShards(folder, shards, listing, cache)
        self._open: collections.OrderedDict[int, tuple[BinaryIO, Sequence[int]]] = collections.OrderedDict()
        # The dictionary is kept until its files are closed, although this object is part of a cycle.
        weakref.finalize(self, _close, self._open)

    def read(self, number: int) -> tuple[str, Location, dict[str, bytes]]:
        """A sample.

        Returns:
            Its key, the path of its shard, and the bytes of its members by extension.

        Raises:
            ValueError: shard or index cannot be read or are damaged, or they do not belong together.
        """
        place, own = self._place(number)
        path = self._folder / self._shards[place][0]
        with self._failures_named(path):
            file, start, end, where = self._part(place, own, path)
            with self._damage_named(place, path, where):
                samples = list(grouped(tar_members(file, start, end)))
                if len(samples) != 1:
                    raise ValueError(f"it has {len(samples)} samples where one is expected")
                ((key, members),) = samples
                if missing := sorted({*MEMBERS} - {one.kind for one in members}):
                    raise ValueError(f"sample {key} has no {' and no '.join(missing)} member there")
                return key, path, read_members(file, members)

    def read_info(self, number: int) -> tuple[str, Location, bytes]:
        """Key, shard and the bytes of the side information of a sample; of a store not more is read if it comes first.

        Raises:
            ValueError: see ``read``.
        """
        if self._stored is not None:
            place, own = self._place(number)
            path = self._folder / self._shards[place][0]
            with self._failures_named(path):
                head, start, end = self._stored.sample(place, own, _HEAD)
            with contextlib.suppress(ValueError, StopIteration):  # more is needed, or it is damaged: see below
                first = next(tar_members(io.BytesIO(head), 0, end - start))
                if first.kind == "json":
                    return first.key, path, read_member(io.BytesIO(head), first)
        key, path, members = self.read(number)
        return key, path, members["json"]

    def _place(self, number: int) -> tuple[int, int]:
        """The place of a sample's shard, and the sample's number in it."""
        place = bisect.bisect_right(self._firsts, number) - 1
        if not 0 <= place < len(self._shards):
            raise ValueError(f"{self._folder} has {self._firsts[-1]} samples; the one numbered {number} was asked for")
        return place, number - self._firsts[place]

    def _part(self, place: int, own: int, path: Location) -> tuple[BinaryIO, int, int, str]:
        """A file with a sample, where it begins and ends there, and where that is in the shard."""
        if self._stored is not None:
            content, start, end = self._stored.sample(place, own)
            return io.BytesIO(content), 0, end - start, f"bytes {start} to {end}"
        assert isinstance(path, Path)
        file, offsets = self._file(place, path)
        return file, offsets[own], offsets[own + 1], f"bytes {offsets[own]} to {offsets[own + 1]}"

    @contextlib.contextmanager
    def _failures_named(self, path: Location) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(f"shard {path} cannot be read: {error.strerror or error}") from error

    @contextlib.contextmanager
    def _damage_named(self, place: int, path: Location, where: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            if self._stored is not None:
                self._stored.check(place)
            raise ValueError(
                f"shard {path}, {where}: {error}; if wan-data verify finds the "
                f"shard whole, its {OFFSETS_SUFFIX} file is of another one: {REMEDY}"
            ) from None

    def _file(self, place: int, path: Path) -> tuple[BinaryIO, Sequence[int]]:
        if place not in self._open:
            offsets = read_offsets(path, self._shards[place][1])
            while len(self._open) >= self._most:
                self._open.popitem(last=False)[1][0].close()
            self._open[place] = open_file(path), offsets
        self._open.move_to_end(place)
        return self._open[place]


def _close(opened: "collections.OrderedDict[int, tuple[BinaryIO, Sequence[int]]]") -> None:
    for file, _ in opened.values():
        file.close()
