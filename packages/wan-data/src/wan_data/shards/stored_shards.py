"""Reading single samples of a dataset in a store: a request for each sample, and one for the offsets of a shard."""

import collections
import concurrent.futures
import threading
import time
from collections.abc import Sequence

from wan_data.shards.energon_index import read_offsets
from wan_data.storage.files import Listing, forget_listing
from wan_data.storage.location import StorePath
from wan_data.storage.range_cache import RangeCache
from wan_data.storage.store import StoredObject, look, read

# Offsets of samples that are kept, of eight bytes each.
_MOST_OFFSETS = 4_000_000
# Seconds after which an object is looked at again before more of it is read: another may have replaced it.
_LOOK_AFTER = 600.0


class StoredShards:
    """The bytes of samples in shards of a store; threads may use it.

    Args:
        folder: of the dataset.
        shards: names and numbers of samples, in order.
        listing: the objects of the folder as they were when it was opened.
        cache: keeps what was read on a disk; None for no cache.
    """

    def __init__(
        self, folder: StorePath, shards: Sequence[tuple[str, int]], listing: Listing, cache: RangeCache | None = None
    ) -> None:
        self._folder, self._shards, self._listing, self._cache = folder, shards, listing, cache
        self._lock = threading.Lock()
        self._offsets: collections.OrderedDict[int, concurrent.futures.Future[Sequence[int]]] = (
            collections.OrderedDict()
        )
        self._kept = 0
        self._looked: dict[int, float] = {}

    def sample(self, place: int, number: int, most: int | None = None) -> tuple[bytes, int, int]:
        """The bytes of a sample.

        Args:
            place: of the shard.
            number: of the sample in it.
            most: at most so many bytes, from its beginning.

        Returns:
            The bytes, and where the sample begins and ends in the shard.

        Raises:
            ValueError: the index is missing or damaged, or the shard is not the one that was listed.
            OSError: one of them cannot be read.
        """
        found = self._object(place)
        self._check(place, found)
        offsets = self._offsets_of(place, found)
        start, end = offsets[number], offsets[number + 1]
        length = end - start if most is None else min(most, end - start)
        if self._cache is None:
            return read(found.path, start, length), start, end
        return self._cache.read(found, start, length), start, end

    def check(self, place: int) -> None:
        """Look whether a shard is still the one that was listed.

        Raises:
            ValueError: it is not.
            OSError: it cannot be looked at.
        """
        self._check(place, self._object(place), now=True)

    def _object(self, place: int) -> StoredObject:
        found = self._listing.object_of(self._shards[place][0])
        assert found is not None, "what the metadata names was listed"
        return found

    def _check(self, place: int, found: StoredObject, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._looked.get(place, self._listing.taken) <= _LOOK_AFTER:
            return
        current = look(found.path)
        if not found.is_same(current):
            forget_listing(self._folder)
            raise ValueError(
                f"shard {found.path} was replaced while the dataset was read: it had {found.bytes} bytes and has "
                f"{current.bytes}; restore it, or begin again with the dataset as it is now"
            )
        self._looked[place] = time.monotonic()

    def _offsets_of(self, place: int, found: StoredObject) -> Sequence[int]:
        name, samples = self._shards[place]
        with self._lock:
            known = self._offsets.get(place)
            if mine := known is None:
                known = self._offsets[place] = concurrent.futures.Future()
            self._offsets.move_to_end(place)
        assert known is not None
        if mine:  # other threads wait for this one
            try:
                known.set_result(read_offsets(self._folder / name, samples, found.bytes))
            except BaseException as error:
                with self._lock:
                    del self._offsets[place]
                known.set_exception(error)
            else:
                self._forget_some(samples + 1)
        return known.result()

    def _forget_some(self, more: int) -> None:
        with self._lock:
            self._kept += more
            while self._kept > _MOST_OFFSETS and len(self._offsets) > 1:
                place, _ = self._offsets.popitem(last=False)
                self._kept -= self._shards[place][1] + 1
