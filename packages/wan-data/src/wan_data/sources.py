"""Examining the input before anything is encoded: what each file is, what will be made of it, or why not."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from wan_data.buckets import Size, choose_bucket, enlargement
from wan_data.captions import CaptionFinder
from wan_data.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, ClipInfo, Rejected, probe
from wan_data.files import sha256_of
from wan_data.settings import PrepareSettings
from wan_data.windows import Window, plan_windows


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """A source that will become samples.

    Attributes:
        name: path relative to the input folder, with forward slashes.
        path: where it lies.
        sha256: of the file.
        caption: as written beside it.
        info: what a full decode found.
        size: the bucket it is resized to.
        windows: what is cut from it, at the target rate.
    """

    name: str
    path: Path
    sha256: str
    caption: str
    info: ClipInfo
    size: Size
    windows: tuple[Window, ...]


@dataclasses.dataclass(frozen=True)
class RejectedSource:
    """A source that cannot be used, and why."""

    name: str
    reason: str
    sha256: str | None = None


def find_sources(folder: Path, settings: PrepareSettings) -> list[Path]:
    """Videos under a folder, and images too in ``frames`` mode, in an order that depends on their names only.

    Raises:
        ValueError: the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected one with videos and captions")
    suffixes = VIDEO_SUFFIXES + (IMAGE_SUFFIXES if settings.mode == "frames" else ())
    found = [
        Path(place, file)
        for place, _, files in os.walk(folder)
        for file in files
        if Path(file).suffix.lower() in suffixes and not file.startswith(".")
    ]
    if not found:
        raise ValueError(f"{folder} holds no files ending in {', '.join(suffixes)}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def examine(
    folder: Path,
    paths: Sequence[Path],
    settings: PrepareSettings,
    report: Callable[[PlannedSource | RejectedSource], None],
) -> tuple[list[PlannedSource], list[RejectedSource]]:
    """Decode every source once and plan its samples.

    Args:
        folder: the input folder.
        paths: sources in it.
        settings: of the preparation.
        report: called with each verdict as it falls.

    Returns:
        Accepted and rejected sources, in order.
    """
    captions = CaptionFinder(settings.caption_key)
    buckets = settings.buckets()
    accepted: list[PlannedSource] = []
    rejected: list[RejectedSource] = []
    for path in paths:
        name = path.relative_to(folder).as_posix()
        verdict: PlannedSource | RejectedSource
        digest = None
        try:
            # A name that is no Unicode could not be written down in the manifest.
            name.encode()
            digest = sha256_of(path)
            verdict = _plan(name, path, digest, captions.find(path), settings, buckets)
        except UnicodeEncodeError:
            name = name.encode("utf-8", "backslashreplace").decode()
            verdict = RejectedSource(name, "its name is not valid Unicode; rename it", digest)
        except OSError as error:
            verdict = RejectedSource(name, f"it cannot be read: {error.strerror or error}", digest)
        except ValueError as error:
            verdict = RejectedSource(name, str(error), digest)
        if isinstance(verdict, PlannedSource):
            accepted.append(verdict)
        else:
            rejected.append(verdict)
        report(verdict)
    return accepted, rejected


def _plan(
    name: str, path: Path, digest: str, caption: str, settings: PrepareSettings, buckets: tuple[Size, ...]
) -> PlannedSource:
    info = probe(path, settings.fps)
    size = choose_bucket(buckets, info.height, info.width)
    growth = enlargement(size, info.height, info.width)
    if growth > 1 and not settings.allow_upscaling:
        raise Rejected(
            f"its {info.height:.0f}x{info.width:.0f} pixels would be enlarged {growth:.2f} times to fill {size}; "
            "choose a smaller size, or pass --allow-upscaling"
        )
    kind = settings.windows
    if settings.mode == "frames" and kind == "whole":
        kind = "consecutive"  # every frame of it is an image
    windows = plan_windows(info.frames, kind, settings.longest, settings.shortest)
    return PlannedSource(name, path, digest, caption, info, size, tuple(windows))


def split_sources(sources: Sequence[PlannedSource], fraction: float, seed: int) -> dict[str, list[PlannedSource]]:
    """Share the sources between ``train`` and ``val``: never two windows of one source on both sides.

    The choice depends on the seed and the sources' names, not on their order. With a positive fraction and at least
    two sources both splits have at least one; files of equal content stay on one side.

    Args:
        sources: accepted ones.
        fraction: share of ``val``.
        seed: of the choice.

    Returns:
        ``train``, and ``val`` where there is one; sources in their given order.
    """

    def draw(source: PlannedSource) -> str:
        return hashlib.sha256(f"{seed}\n{source.name}".encode()).hexdigest()

    contents: dict[str, list[PlannedSource]] = {}
    for source in sorted(sources, key=draw):
        contents.setdefault(source.sha256, []).append(source)
    wanted = 0
    if fraction > 0 and len(contents) > 1:
        wanted = min(max(1, round(fraction * len(contents))), len(contents) - 1)
    chosen = {source.name for group in list(contents.values())[:wanted] for source in group}
    splits = {"train": [source for source in sources if source.name not in chosen]}
    if chosen:
        splits["val"] = [source for source in sources if source.name in chosen]
    return splits
