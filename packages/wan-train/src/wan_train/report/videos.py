"""Which sampled videos the page shows, and their bytes.

A page has whole steps, so that videos stand side by side: the newest step, the first, and then those halfway between,
as far as the size of the page allows. Of a run with more videos than are looked at, it has the newest ones.
"""

import base64
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_model.system.safe_reading import open_below, read_whole
from wan_model.system.units import format_bytes
from wan_train.checkpoint.sample_videos import SampleVideo, read_samples, records_path

MOST_STEPS = 24
MOST_VIDEOS = 2000
LARGEST_VIDEO = 64 << 20
_HEAD = 12


@dataclass(frozen=True)
class _Kind:
    """Of a file: its media type, its name in a sentence, and bytes that it has at a place near its beginning."""

    media_type: str
    name: str
    place: int
    mark: bytes


_KINDS: Mapping[str, _Kind] = {
    ".mp4": _Kind("video/mp4", "an MP4 file", 4, b"ftyp"),  # after the size of this box
    ".png": _Kind("image/png", "a PNG file", 0, b"\x89PNG\r\n\x1a\n"),
}


@dataclass(frozen=True)
class FoundVideo:
    """A sampled video that exists.

    Attributes:
        run: index of its run.
        folder: the run's checkpoint folder.
        sample: what is known about it.
        size: in bytes.
        changed: when its file was, in nanoseconds.
    """

    run: int
    folder: Path
    sample: SampleVideo
    size: int
    changed: int

    @property
    def path(self) -> Path:
        """Of its file."""
        return self.sample.path(self.folder)

    @property
    def media_type(self) -> str:
        """``video/mp4``, or ``image/png`` of a single frame."""
        return _KINDS[self.sample.suffix].media_type

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            FileNotFoundError: it does not exist any more.
            ValueError: it cannot be read, is too large, or is reached by a link by now.
        """
        with open_below(self.folder, self.path, LARGEST_VIDEO) as file:
            return read_whole(file, self.path, LARGEST_VIDEO)

    def data_uri(self) -> str:
        """The video as a data URI.

        Raises:
            FileNotFoundError, ValueError: see ``read``.
        """
        return f"data:{self.media_type};base64," + base64.b64encode(self.read()).decode("ascii")


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes with a file's content; None if there is no file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class RunVideos:
    """The sampled videos of a run that may be in progress.

    Args:
        folder: its checkpoint folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._samples: list[SampleVideo] = []
        self._notes: list[str] = []
        self._records: tuple[int, ...] | None = None
        self._files: list[tuple[int, ...] | None] = []
        self.refresh()

    def refresh(self) -> bool:
        """Read the records if they have changed; returns whether they or the videos have."""
        records = _state(records_path(self._folder))
        changed = records != self._records
        if changed:
            self._samples, self._notes = self._newest()
            self._records = records
        files = [_state(sample.path(self._folder)) for sample in self._samples]
        changed, self._files = changed or files != self._files, files
        return changed

    def _newest(self) -> tuple[list[SampleVideo], list[str]]:
        try:
            samples, notes = read_samples(self._folder)
        except ValueError as error:
            return [], [f"Sampled videos are left out: {error}."]
        if len(samples) <= MOST_VIDEOS:
            return samples, notes
        kept, before = samples[-MOST_VIDEOS:], samples[-MOST_VIDEOS - 1]
        if before.step < kept[-1].step:  # otherwise the newest step alone has too many
            kept = [sample for sample in kept if sample.step != before.step]
        newest, steps = (len({sample.step for sample in some}) for some in (kept, samples))
        notes.append(
            f"Sampled videos of the newest {newest} of {steps} steps are looked at: at most {MOST_VIDEOS:,} of a run."
        )
        return kept, notes

    def find(self, run: int) -> tuple[list[FoundVideo], list[str]]:
        """The videos, and sentences about those that are left out.

        Args:
            run: index of the run on the page.
        """
        found, refused = [], []
        for sample in self._samples:
            path, kind = sample.path(self._folder), _KINDS[sample.suffix]
            try:
                # The page may be handed on, so it takes nothing that a link brings from elsewhere.
                with open_below(self._folder, path, LARGEST_VIDEO) as file:
                    state = os.fstat(file.fileno())
                    if not file.read(_HEAD).startswith(kind.mark, kind.place):
                        raise ValueError(f"{path} is not {kind.name}")
            except FileNotFoundError:
                refused.append(f"{path} does not exist")
            except (ValueError, OSError) as error:
                refused.append(str(error))
            else:
                found.append(FoundVideo(run, self._folder, sample, state.st_size, state.st_mtime_ns))
        if not refused:
            return found, self._notes
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        return found, [*self._notes, f"A video is left out: {refused[0]}{more}."]


def halving(steps: Iterable[int]) -> list[int]:
    """Steps in the order in which a page takes them: the newest, the first, then always halfway between two of them."""
    ascending = sorted(steps)
    if len(ascending) < 3:
        return ascending[::-1]
    order = [ascending[-1], ascending[0]]
    gaps = [(0, len(ascending) - 1)]
    while gaps:
        low, high = gaps.pop(0)
        if high - low > 1:
            middle = (low + high) // 2
            order.append(ascending[middle])
            gaps += [(low, middle), (middle, high)]
    return order


def choose(videos: Iterable[FoundVideo], limit: int) -> tuple[list[FoundVideo], list[str]]:
    """The videos of the steps that fit, and a sentence if there are others.

    Args:
        videos: of all runs.
        limit: bytes of all of them.
    """
    by_step: Mapping[int, list[FoundVideo]] = defaultdict(list)
    for video in videos:
        by_step[video.sample.step].append(video)
    chosen: list[FoundVideo] = []
    taken, size = 0, 0
    for step in halving(by_step):
        more = sum(video.size for video in by_step[step])
        if taken == MOST_STEPS or size + more > limit:
            break
        taken, size = taken + 1, size + more
        chosen += by_step[step]
    if taken == len(by_step):
        return chosen, []
    return chosen, [
        f"Videos of {taken} of {len(by_step)} steps are shown ({format_bytes(size)}): a page has those of at most "
        f"{MOST_STEPS} steps and {format_bytes(limit)}; raise --max-video-mb for more bytes."
    ]


def table(videos: Iterable[FoundVideo], source: Callable[[FoundVideo], str]) -> dict[str, Any]:
    """The videos as the page has them: ascending steps, and a row for each name and run with a video at each of them.

    A video is its media type and its URL.

    Args:
        videos: to show.
        source: the URL of a video.
    """
    videos = list(videos)
    steps = sorted({video.sample.step for video in videos})
    rows: dict[tuple[str, int], dict[int, FoundVideo]] = {}
    for video in videos:
        rows.setdefault((video.sample.name, video.run), {})[video.sample.step] = video
    names = list(dict.fromkeys(name for name, _ in rows))
    return {
        "steps": steps,
        "rows": [
            {
                "name": name,
                "run": run,
                "caption": (newest := at[max(at)].sample).caption,
                "seed": newest.seed,
                "sources": [[at[step].media_type, source(at[step])] if step in at else None for step in steps],
            }
            for (name, run), at in sorted(rows.items(), key=lambda item: (names.index(item[0][0]), item[0][1]))
        ],
    }
