"""Reading single samples of a dataset by number, by the offsets in the ``.idx`` files beside its shards."""

import bisect
import collections
import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from wan_data.shards.energon_index import OFFSETS_SUFFIX, REMEDY, read_offsets
from wan_data.shards.reader import grouped, read_members
from wan_data.shards.serialization import MEMBERS
from wan_data.shards.tar_headers import tar_members
from wan_model.system.safe_reading import open_file


class IndexedShards:
    """The samples of several shards by number: the bytes of their members, each checked to be where the index says.

    Files are opened when they are needed, so that a fork made before that has its own.

    Args:
        folder: of the dataset.
        shards: names and numbers of samples, in order.
        open_files: most shards that are open at once.
    """

    def __init__(self, folder: Path, shards: Sequence[tuple[str, int]], open_files: int = 16) -> None:
        self._folder, self._shards, self._most = folder, shards, open_files
        self._firsts = [0, *itertools.accumulate(count for _, count in shards)]
        self._open: collections.OrderedDict[int, tuple[BinaryIO, Sequence[int]]] = collections.OrderedDict()
        # The dictionary is kept until its files are closed, although this object is part of a cycle.
        weakref.finalize(self, _close, self._open)

    def read(self, number: int) -> tuple[str, Path, dict[str, bytes]]:
        """A sample.

        Returns:
            Its key, the path of its shard, and the bytes of its members by extension.

        Raises:
            ValueError: shard or index cannot be read or are damaged, or they do not belong together.
        """
        place = bisect.bisect_right(self._firsts, number) - 1
        if not 0 <= place < len(self._shards):
            raise ValueError(f"{self._folder} has {self._firsts[-1]} samples; the one numbered {number} was asked for")
        path = self._folder / self._shards[place][0]
        file, offsets = self._file(place, path)
        own = number - self._firsts[place]
        try:
            samples = list(grouped(tar_members(file, offsets[own], offsets[own + 1])))
            if len(samples) != 1:
                raise ValueError(f"it has {len(samples)} samples where one is expected")
            ((key, members),) = samples
            if missing := sorted({*MEMBERS} - {one.kind for one in members}):
                raise ValueError(f"sample {key} has no {' and no '.join(missing)} member there")
            return key, path, read_members(file, members)
        except OSError as error:
            raise ValueError(f"shard {path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise ValueError(
                f"shard {path}, bytes {offsets[own]} to {offsets[own + 1]}: {error}; if wan-data verify finds the "
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
