"""Which sampled videos the page shows, and their bytes.

A page has whole steps, so that videos stand side by side: the newest step, the first, and then those halfway between,
as far as the size of the page allows.
"""

import base64
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_model.system.safe_reading import read_bytes, require_file
from wan_model.system.units import format_bytes
from wan_train.checkpoint.sample_videos import SAMPLES, SampleVideo, read_samples

MOST_STEPS = 24
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
        sample: what is known about it.
        path: of its file.
        size: in bytes.
    """

    run: int
    sample: SampleVideo
    path: Path
    size: int


def find_videos(run: int, folder: Path) -> tuple[list[FoundVideo], list[str]]:
    """The videos of a run, and sentences about those that are left out.

    Args:
        run: its index on the page.
        folder: its checkpoint folder.
    """
    found, notes, refused = [], [], []
    try:
        samples = read_samples(folder)
    except ValueError as error:
        return [], [str(error)]
    inside = (folder / SAMPLES).resolve()
    for sample in samples:
        path = sample.path(folder)
        try:
            size = require_file(path, LARGEST_VIDEO)
            # The page may be handed on, so it takes nothing that a link brings from elsewhere.
            if not path.resolve().is_relative_to(inside):
                raise ValueError(f"{path} leads out of {folder / SAMPLES}")
            kind = _KINDS[sample.suffix]
            with path.open("rb") as file:
                if not file.read(_HEAD).startswith(kind.mark, kind.place):
                    raise ValueError(f"{path} is not {kind.name}")
        except FileNotFoundError:
            refused.append(f"{path} does not exist")
        except (ValueError, OSError) as error:
            refused.append(str(error))
        else:
            found.append(FoundVideo(run, sample, path, size))
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        notes.append(f"A video is left out: {refused[0]}{more}.")
    return found, notes


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


def media_type(path: Path) -> str:
    """Of the file of a video that was found: ``video/mp4``, or ``image/png`` of a single frame."""
    return _KINDS[path.suffix].media_type


def data_uri(path: Path) -> str:
    """The video as a data URI.

    Raises:
        ValueError: it cannot be read.
    """
    return f"data:{media_type(path)};base64," + base64.b64encode(read_bytes(path, LARGEST_VIDEO)).decode("ascii")


def table(videos: Iterable[FoundVideo], source: Callable[[Path], str]) -> dict[str, Any]:
    """The videos as the page has them: ascending steps, and a row for each name and run with a video at each of them.

    A video is its media type and its URL.

    Args:
        videos: to show.
        source: the URL of a file.
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
                "sources": [
                    [media_type(at[step].path), source(at[step].path)] if step in at else None for step in steps
                ],
            }
            for (name, run), at in sorted(rows.items(), key=lambda item: (names.index(item[0][0]), item[0][1]))
        ],
    }
