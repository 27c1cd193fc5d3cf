"""Looking at every source before anything is encoded: what it is, what will be made of it, or why not."""

import collections
import concurrent.futures
import dataclasses
import json
import queue
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_data.prepare.captions import CaptionFinder
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.sources import SourceFile, caption_of
from wan_data.video.buckets import Size, choose_bucket, enlargement
from wan_data.video.decode import ClipInfo, Rejected
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.windows import Window, plan_windows
from wan_model.system.files import naming, sha256_of


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """A source that will become samples.

    Attributes:
        name: see ``inputs.SourceFile``.
        path: where it lies.
        bytes, sha256: of the file.
        caption: what it shows.
        info: what a full decode found.
        size: the bucket it is resized to.
        windows: what is cut from it, at the target rate.
    """

    name: str
    path: Path
    bytes: int
    sha256: str
    caption: str
    info: ClipInfo
    size: Size
    windows: tuple[Window, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = dataclasses.asdict(self)
        value["windows"] = [[window.start, window.stop] for window in self.windows]
        return {**value, "path": str(self.path)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "PlannedSource":
        """What ``to_dict`` gave."""
        return cls(
            **{
                **value,
                "path": Path(value["path"]),
                "info": ClipInfo(**value["info"]),
                "size": Size(**value["size"]),
                "windows": tuple(Window(*pair) for pair in value["windows"]),
            }
        )


@dataclasses.dataclass(frozen=True)
class RejectedSource:
    """A source that cannot be used, and why."""

    name: str
    reason: str
    bytes: int = 0
    sha256: str | None = None


Verdict = PlannedSource | RejectedSource


class Journal:
    """What full decodes have found, so that a run that takes up another one need not repeat them.

    A line a source; a line that was cut short by a crash is skipped.

    Args:
        path: of the file; None remembers nothing.
        settings: findings under another rate or other caps do not count.
    """

    def __init__(self, path: Path | None, settings: PrepareSettings) -> None:
        self.path = path
        self._about = [str(settings.fps), *dataclasses.astuple(settings.caps)]
        self._known: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().split(b"\n") if path is not None and path.is_file() else ():
            try:
                value = json.loads(line)
                self._known[value["name"]] = value
            except (ValueError, KeyError, TypeError):
                continue

    def find(self, name: str, size: int, mtime_ns: int) -> tuple[str, ClipInfo] | None:
        """Digest and finding of a source that has not changed since, if there are any."""
        value = self._known.get(name)
        if value is None or [value.get("bytes"), value.get("mtime_ns")] != [size, mtime_ns]:
            return None
        try:
            return (str(value["sha256"]), ClipInfo(**value["info"])) if value["about"] == self._about else None
        except (KeyError, TypeError):
            return None

    def note(self, name: str, size: int, mtime_ns: int, sha256: str, info: ClipInfo) -> None:
        """Remember a finding."""
        if self.path is None:
            return
        value = {"name": name, "bytes": size, "mtime_ns": mtime_ns, "sha256": sha256, "about": self._about}
        # The line begins with its end: whatever stood there cut short is over then.
        with naming(self.path), self.path.open("ab") as file:
            file.write(b"\n" + json.dumps({**value, "info": dataclasses.asdict(info)}).encode())


def examine(
    sources: Sequence[SourceFile],
    settings: PrepareSettings,
    report: Callable[[Verdict], None],
    *,
    decoders: int,
    journal: Journal,
) -> list[Verdict]:
    """Decode every source to its end, in processes that may die, and plan its samples.

    Args:
        sources: what there is.
        settings: of the preparation.
        report: called with each verdict, in the order of the sources.
        decoders: processes that decode.
        journal: of earlier findings.

    Returns:
        A verdict a source, in order.
    """
    captions = CaptionFinder(settings.caption_key)
    resolutions = settings.resolutions()
    verdicts: list[Verdict] = []
    idle: queue.SimpleQueue[Decoder] = queue.SimpleQueue()

    def look(source: SourceFile) -> tuple[Verdict, tuple[int, str, ClipInfo] | None]:
        decoder = idle.get()
        try:
            return _look(source, settings, captions, resolutions, decoder, journal)
        finally:
            idle.put(decoder)

    def close() -> None:
        while not idle.empty():
            idle.get().__exit__()

    for _ in range(decoders):
        idle.put(Decoder())
    with concurrent.futures.ThreadPoolExecutor(decoders) as pool:
        try:
            for source, (verdict, fresh) in in_order(pool, look, sources, 4 * decoders):
                if fresh is not None and source.path is not None:
                    mtime_ns, digest, info = fresh
                    journal.note(source.name, verdict.bytes, mtime_ns, digest, info)
                verdicts.append(verdict)
                report(verdict)
        finally:
            pool.shutdown(cancel_futures=True)
            close()
    return verdicts


def in_order(
    pool: concurrent.futures.Executor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int
) -> Iterator[tuple[Any, Any]]:
    """Each item with the function's result of it, in the order of the items; at most so many are under way or done."""
    waiting: collections.deque[tuple[Any, concurrent.futures.Future[Any]]] = collections.deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) >= ahead:
            first, future = waiting.popleft()
            yield first, future.result()
    for item, future in waiting:
        yield item, future.result()


def _look(
    source: SourceFile,
    settings: PrepareSettings,
    captions: CaptionFinder,
    resolutions: tuple[tuple[Size, ...], ...],
    decoder: Decoder,
    journal: Journal,
) -> tuple[Verdict, tuple[int, str, ClipInfo] | None]:
    """The verdict, and what the journal does not know yet."""
    size, digest, fresh = 0, None, None
    try:
        if source.problem is not None:
            raise Rejected(source.problem)
        assert source.path is not None, "a source without a path has a problem"
        status = source.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("it is no regular file")
        size = status.st_size
        if size > settings.max_source_bytes:
            raise Rejected(f"it has {size} bytes; at most {settings.max_source_bytes} are read (--max-source-bytes)")
        caption = caption_of(source, captions)
        known = journal.find(source.name, size, status.st_mtime_ns)
        if known is None:
            digest = sha256_of(source.path)
            info = _probe(source.path, settings, decoder)
            fresh = status.st_mtime_ns, digest, info
        else:
            digest, info = known
        return _plan(source, size, digest, caption, info, settings, resolutions), fresh
    except OSError as error:
        return RejectedSource(source.name, f"it cannot be read: {error.strerror or error}", size, digest), fresh
    except ValueError as error:
        return RejectedSource(source.name, str(error), size, digest), fresh


def _probe(path: Path, settings: PrepareSettings, decoder: Decoder) -> ClipInfo:
    (answer,) = decoder.decode([Job(path, settings.fps, settings.caps)])
    _, found = answer
    if isinstance(found, Rejected):
        raise found
    assert isinstance(found, ClipInfo)
    return found


def _plan(
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
    growth = enlargement(bucket, info.height, info.width)
    if growth > 1 and not settings.allow_upscaling:
        raise Rejected(
            f"its {info.height:.0f}x{info.width:.0f} pixels would be enlarged {growth:.2f} times to fill {bucket}; "
            "choose a smaller size, or pass --allow-upscaling"
        )
    kind = settings.windows
    if settings.mode == "frames" and kind == "whole":
        kind = "consecutive"  # every frame of it is an image
    windows = plan_windows(info.frames, kind, settings.window_lengths)
    return PlannedSource(source.name, source.path, size, digest, caption, info, bucket, tuple(windows))
