"""Samples of shards as the pipeline has them: read when they are drawn, or by other threads meanwhile."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(slots=True)
class RawSample:
    """The members of a sample as they are in its shard.

    Attributes:
        __key__: its key.
        __restore_key__: where Energon finds it again when a state is loaded.
        shard: path, or URL, of its shard.
        members: the bytes of each member by extension, such as ``json``.
    """

    __key__: str
    __restore_key__: tuple[Any, ...]
    shard: Any
    members: dict[str, bytes]


@dataclasses.dataclass(slots=True)
class AwaitedSample:
    """A sample that another thread reads and cooks.

    Attributes:
        __restore_key__: where Energon finds it again when a state is loaded; as of the sample itself.
        future: of the sample.
    """

    __restore_key__: tuple[Any, ...]
    future: "concurrent.futures.Future[Any]"

    def result(self) -> Any:
        """The sample; waits for it."""
        sample = self.future.result()
        sample.__restore_key__ = self.__restore_key__
        return sample


def result_of(sample: Any) -> Any:
    """A cooked sample; waits for one that another thread reads."""
    return sample.result() if isinstance(sample, AwaitedSample) else sample


@dataclasses.dataclass(frozen=True)
class Source:
    """The shards of one dataset, and how they are read.

    Attributes:
        shards: names and numbers of samples, in order.
        read: the key, the shard and the members of a sample, by its number among those of all shards.
        cook: turns a sample into one to pack; the result has ``__key__`` and ``__restore_key__`` of its argument.
        weight: relative frequency in a blend.
        run_length: number of neighbouring samples that are read one after another; None for a whole shard.
        submit: runs a function in another thread, so that samples are read while the pipeline goes on: it waits for
            them where packs are chosen. None reads each when it is drawn. Neither order nor state depends on it.
    """

    shards: Sequence[tuple[str, int]]
    read: Callable[[int], tuple[str, Any, dict[str, bytes]]]
    cook: Callable[[RawSample], Any]
    weight: float = 1.0
    run_length: int | None = None
    submit: Callable[[Callable[[], Any]], "concurrent.futures.Future[Any]"] | None = None


def cook_unless_awaited(cook: Callable[[RawSample], Any], sample: Any) -> Any:
    """A cooked sample; one that is awaited is cooked by the thread that reads it."""
    return sample if isinstance(sample, AwaitedSample) else cook(sample)


class SampleReader:
    """What Energon's readers of shards are to its datasets.

    Args:
        source: that is read.
        ahead: number of samples beyond the one that is asked for which are read too.
    """

    def __init__(self, source: Source, ahead: int) -> None:
        self._source, self._ahead = source, ahead
        self._samples = sum(count for _, count in source.shards)
        self._pending: dict[int, concurrent.futures.Future[Any]] = {}

    def __getitem__(self, number: int) -> RawSample | AwaitedSample:
        key = ("Webdataset", number)
        if self._source.submit is None:
            name, shard, members = self._source.read(number)
            return RawSample(name, key, shard, members)
        if number not in self._pending:
            for future in self._pending.values():
                future.cancel()
            self._pending.clear()
        for one in range(number, min(number + self._ahead + 1, self._samples)):
            if one not in self._pending:
                self._pending[one] = self._source.submit(functools.partial(self._sample, one))
        return AwaitedSample(key, self._pending.pop(number))

    def _sample(self, number: int) -> Any:
        key, shard, members = self._source.read(number)
        return self._source.cook(RawSample(key, (), shard, members))
