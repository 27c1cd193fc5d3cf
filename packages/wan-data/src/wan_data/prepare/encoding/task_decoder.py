"""Decoding the windows of a task in batches of one shape, as the autoencoder takes them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import EncodeTask, SourceWindows
from wan_data.storage.store import check_copy
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.source_file import Rejected
from wan_model.system.files import sha256_of

# Name of the source, and number of the window.
WindowKey = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class FrameBatch:
    """Windows of one shape that are encoded together.

    Attributes:
        keys: of the windows.
        frames: of each window.
    """

    keys: tuple[WindowKey, ...]
    frames: tuple[UInt8[Tensor, "T H W 3"], ...]


Problems = Mapping[WindowKey, str]


class TaskDecoder:
    """Decodes tasks, one after another.

    Args:
        settings: of the preparation.
        decoder: the decoder process; the caller ends it.
    """

    def __init__(self, settings: PrepareSettings, decoder: Decoder) -> None:
        self._settings, self._decoder = settings, decoder

    def submit(self, task: EncodeTask) -> None:
        """Queue a task's windows for decoding."""
        for part in task.parts:
            if part.problem is None:
                self._decoder.submit(self._job(part))

    def batches(self, task: EncodeTask) -> Iterator[FrameBatch | Problems]:
        """Decode the oldest submitted task, which must be this one.

        Which windows are together follows from the task alone, because it changes the last digits of latents.

        Yields:
            The batches; and at the end why windows cannot be used, also ones that have been decoded.

        Raises:
            OSError: the local copy of an object is gone.
        """
        problems: dict[WindowKey, str] = {}
        waiting: dict[int, list[tuple[WindowKey, Tensor]]] = {}
        for part in task.parts:
            name = part.source.name
            if part.problem is not None:
                problems |= {(name, number): part.problem for number in part.windows}
                continue
            # results() comes first in zip, so that it is read to its end: one item per window, or a rejection.
            for frames, number in zip(self._decoder.results(), part.windows, strict=False):
                if isinstance(frames, Rejected):
                    if part.file is not None:
                        check_copy(part.file)
                    # The source was decoded to its end when it was probed.
                    problem = f"{frames}, although it could be decoded before"
                    problems |= {(name, missing): problem for missing in range(number, part.windows.stop)}
                    continue
                batch = waiting.setdefault(len(frames), [])
                batch.append(((name, number), frames))
                if len(batch) == self._settings.batch_size:
                    yield _batch(waiting.pop(len(frames)))
        while waiting:
            yield _batch(waiting.pop(next(iter(waiting))))
        for part in task.parts:
            if has_changed(part):
                for number in part.windows:
                    problems.setdefault((part.source.name, number), "the file has changed since it was probed")
        yield problems

    def _job(self, part: SourceWindows) -> Job:
        settings, source = self._settings, part.source
        return Job(
            _file(part),
            settings.fps,
            settings.limits,
            tuple(source.windows[number] for number in part.windows),
            source.size,
            settings.resize_mode,
            settings.center_crop,
            settings.display,
        )


def _batch(windows: list[tuple[WindowKey, Tensor]]) -> FrameBatch:
    return FrameBatch(tuple(key for key, _ in windows), tuple(frames for _, frames in windows))


def _file(part: SourceWindows) -> Path:
    path = part.file or part.source.path
    assert isinstance(path, Path), "an object is fetched before it is decoded"
    return path


def has_changed(part: SourceWindows) -> bool:
    """Whether a file has another content than when it was probed."""
    if part.problem is not None:
        return False
    source, path = part.source, _file(part)
    try:
        status = path.stat()
    except OSError:
        return False  # it was there to be decoded
    if status.st_size != source.bytes:
        return True
    return status.st_mtime_ns != source.mtime_ns and _digest(path, status.st_mtime_ns) != source.sha256


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, mtime_ns: int) -> str:
    return sha256_of(path)
