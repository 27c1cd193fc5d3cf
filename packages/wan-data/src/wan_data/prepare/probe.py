"""Probing sources before anything is encoded.

Every source is decoded to its end. The result is a plan of its windows, or the reason why it is rejected.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import queue
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wan_data.prepare.settings import PrepareSettings
from wan_data.shards.database import ValueFile
from wan_data.shards.json_records import from_json
from wan_data.sources.captions import CaptionFinder
from wan_data.sources.source import SourceFile, caption_of
from wan_data.video.buckets import Size, choose_bucket, enlargement
from wan_data.video.decode import ClipInfo
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.limits import READING_VERSION
from wan_data.video.source_file import Rejected, check_bytes, check_regular
from wan_data.video.windows import Window, plan_windows
from wan_model.system.files import sha256_of


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """An accepted source with the windows that become samples.

    Attributes:
        name: see ``wan_data.sources.source.SourceFile``.
        path: the file.
        bytes, sha256: size and digest of the file.
        caption: the caption of all its samples.
        info: properties found by decoding it completely.
        size: the bucket that its frames are resized to.
        windows: frame ranges at the target rate, one sample each.
        mtime_ns: modification time of the file before it was read; 0 if unknown.
    """

    name: str
    path: Path
    bytes: int
    sha256: str
    caption: str
    info: ClipInfo
    size: Size
    windows: tuple[Window, ...]
    mtime_ns: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The source as plain JSON values, of which ``from_json`` makes it again."""
        value = dataclasses.asdict(self)
        value["windows"] = [[window.start, window.stop] for window in self.windows]
        return {**value, "path": str(self.path)}


@dataclasses.dataclass(frozen=True)
class RejectedSource:
    """A source that cannot be used, with the reason."""

    name: str
    reason: str
    bytes: int = 0
    sha256: str | None = None


ProbeResult = PlannedSource | RejectedSource


class ProbeCache:
    """Probe results of earlier runs, so that a resumed preparation does not decode unchanged sources again.

    Args:
        path: the file; None disables the cache. A damaged one is begun anew.
        settings: entries that were made with another rate, other limits or another version are ignored.
    """

    def __init__(self, path: Path | None, settings: PrepareSettings) -> None:
        self._file = None if path is None else ValueFile(path)
        conditions = [READING_VERSION, str(settings.fps), settings.hdr, *dataclasses.astuple(settings.limits)]
        self._conditions = json.loads(json.dumps(conditions))

    def find(self, name: str, size: int, mtime_ns: int) -> tuple[str, ClipInfo] | None:
        """Digest and properties of a source, or None if it is unknown or has changed."""
        value = None if self._file is None else self._file.find([name]).get(name)
        if not isinstance(value, dict) or [value.get("bytes"), value.get("mtime_ns")] != [size, mtime_ns]:
            return None
        with contextlib.suppress(ValueError, KeyError):
            if value["about"] == self._conditions:
                return from_json(str, value["sha256"], "it"), from_json(ClipInfo, value["info"], "it")
        return None

    def add(self, name: str, size: int, mtime_ns: int, sha256: str, info: ClipInfo) -> None:
        """Remember the result of a source."""
        if self._file is not None:
            value = {"bytes": size, "mtime_ns": mtime_ns, "sha256": sha256, "about": self._conditions}
            self._file.put({name: {**value, "info": dataclasses.asdict(info)}})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def probe_sources(
    sources: Iterable[SourceFile],
    settings: PrepareSettings,
    *,
    decoders: int,
    cache: ProbeCache,
) -> Iterator[ProbeResult]:
    """Decode every source to its end in decoder processes, and plan its windows.

    Args:
        sources: the files to probe.
        settings: of the preparation.
        decoders: number of decoder processes.
        cache: results of earlier runs; new results are added to it.

    Yields:
        One result per source, in order.
    """
    captions = CaptionFinder(settings.caption_key)
    resolutions = settings.resolutions()
    idle: queue.SimpleQueue[Decoder] = queue.SimpleQueue()

    def probe(source: SourceFile) -> tuple[ProbeResult, tuple[int, str, ClipInfo] | None]:
        decoder = idle.get()
        try:
            return _probe_source(source, settings, captions, resolutions, decoder, cache)
        finally:
            idle.put(decoder)

    def close_decoders() -> None:
        while not idle.empty():
            idle.get().__exit__()

    for _ in range(decoders):
        idle.put(Decoder())
    with concurrent.futures.ThreadPoolExecutor(decoders) as pool:
        try:
            for source, (result, new) in map_in_order(pool, probe, sources, 4 * decoders):
                if new is not None and source.path is not None:
                    mtime_ns, digest, info = new
                    cache.add(source.name, result.bytes, mtime_ns, digest, info)
                yield result
        finally:
            pool.shutdown(cancel_futures=True)
            close_decoders()


def map_in_order(
    pool: concurrent.futures.Executor, function: Callable[[Any], Any], items: Iterable[Any], in_flight: int
) -> Iterator[tuple[Any, Any]]:
    """Yield each item with the function's result, in the order of the items; at most ``in_flight`` are submitted."""
    submitted: collections.deque[tuple[Any, concurrent.futures.Future[Any]]] = collections.deque()
    for item in items:
        submitted.append((item, pool.submit(function, item)))
        if len(submitted) >= in_flight:
            first, future = submitted.popleft()
            yield first, future.result()
    for item, future in submitted:
        yield item, future.result()


def _probe_source(
    source: SourceFile,
    settings: PrepareSettings,
    captions: CaptionFinder,
    resolutions: tuple[tuple[Size, ...], ...],
    decoder: Decoder,
    cache: ProbeCache,
) -> tuple[ProbeResult, tuple[int, str, ClipInfo] | None]:
    """The result of a source, and what is to be added to the cache."""
    size, digest, new = 0, None, None
    try:
        if source.problem is not None:
            raise Rejected(source.problem)
        assert source.path is not None, "a source without a path has a problem"
        status = source.path.stat()
        check_regular(status)
        size = status.st_size
        check_bytes(size, settings.limits)
        caption = caption_of(source, captions)
        known = cache.find(source.name, size, status.st_mtime_ns)
        if known is None:
            digest = sha256_of(source.path)
            info = _decode_completely(source.path, settings, decoder)
            new = status.st_mtime_ns, digest, info
        else:
            digest, info = known
        planned = _plan_source(source, size, digest, caption, info, settings, resolutions)
        return dataclasses.replace(planned, mtime_ns=status.st_mtime_ns), new
    except OSError as error:
        return RejectedSource(source.name, f"it cannot be read: {error.strerror or error}", size, digest), new
    except ValueError as error:
        return RejectedSource(source.name, str(error), size, digest), new


def _decode_completely(path: Path, settings: PrepareSettings, decoder: Decoder) -> ClipInfo:
    ((_, found),) = decoder.decode([Job(path, settings.fps, settings.limits, display=settings.display)])
    if isinstance(found, Rejected):
        raise found
    assert isinstance(found, ClipInfo)
    return found


def _plan_source(
    source: SourceFile,
    size: int,
    digest: str,
    caption: str,
    info: ClipInfo,
    settings: PrepareSettings,
    resolutions: tuple[tuple[Size, ...], ...],
) -> PlannedSource:
    assert source.path is not None
    bucket = choose_bucket(resolutions, info.height, info.width)
    factor = enlargement(bucket, info.height, info.width)
    if factor > 1 and not settings.allow_upscaling:
        raise Rejected(
            f"its {info.height:.0f}x{info.width:.0f} pixels would be enlarged {factor:.2f} times to fill {bucket}; "
            "choose a smaller size, or pass --allow-upscaling"
        )
    kind = settings.windows
    if settings.mode == "frames" and kind == "whole":
        kind = "consecutive"  # every frame becomes an image
    windows = plan_windows(info.frames, kind, settings.window_lengths)
    return PlannedSource(source.name, source.path, size, digest, caption, info, bucket, tuple(windows))
