"""Probing many sources in decoder processes of this machine, with results in the order of the sources."""

import collections
import concurrent.futures
import queue
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from wan_data.index.sources import batched
from wan_data.prepare.probing.cache import Found, ProbeCache
from wan_data.prepare.probing.source_probe import Probed, SourceProbe
from wan_data.prepare.settings import PrepareSettings
from wan_data.sources.source import SourceFile
from wan_data.storage.local_copies import LocalCopies
from wan_data.video.decoder_process import Decoder

Item = TypeVar("Item")
Value = TypeVar("Value")


# A source with what an earlier run has found of it.
KnownSource = tuple[SourceFile, Found | None]


def probe_sources(
    sources: Iterable[KnownSource], settings: PrepareSettings, *, decoders: int, copies: LocalCopies
) -> Generator[tuple[SourceFile, Probed], None, None]:
    """Decode every source to its end in decoder processes, and plan its windows.

    Args:
        sources: the files to probe.
        settings: of the preparation.
        decoders: number of decoder processes.
        copies: of clips in a store, which are downloaded ahead.

    Yields:
        Each source with its result, in order.
    """
    one, idle = SourceProbe(settings, copies), queue.SimpleQueue[Decoder]()

    def probe(item: KnownSource) -> Probed:
        decoder = idle.get()
        try:
            return one.probe(*item, decoder)
        finally:
            idle.put(decoder)

    def close_decoders() -> None:
        while not idle.empty():
            idle.get().__exit__()

    for _ in range(decoders):
        idle.put(Decoder(program=one.program))
    with concurrent.futures.ThreadPoolExecutor(decoders) as pool:
        try:
            for (source, _), probed in map_in_order(pool, probe, map(one.ahead, sources), 4 * decoders):
                yield source, probed
        except BaseException:
            copies.stop()  # no thread waits for a clip any more
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            close_decoders()


def with_known(sources: Iterable[SourceFile], cache: ProbeCache) -> Iterator[KnownSource]:
    """Each source with what earlier runs have found of it."""
    for some in batched(sources):
        known = cache.find([source.name for source in some])
        yield from ((source, known.get(source.name)) for source in some)


def map_in_order(
    pool: concurrent.futures.Executor, function: Callable[[Item], Value], items: Iterable[Item], in_flight: int
) -> Iterator[tuple[Item, Value]]:
    """Yield each item with the function's result, in the order of the items; at most ``in_flight`` are submitted."""
    submitted: collections.deque[tuple[Item, concurrent.futures.Future[Value]]] = collections.deque()
    for item in items:
        submitted.append((item, pool.submit(function, item)))
        if len(submitted) >= in_flight:
            first, future = submitted.popleft()
            yield first, future.result()
    for item, future in submitted:
        yield item, future.result()
