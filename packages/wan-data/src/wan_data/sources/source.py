"""A source, which is a video or an image to prepare, and its caption."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from wan_data.sources.captions import CaptionFinder
from wan_data.storage.location import Location, location
from wan_data.storage.store import StoredObject
from wan_data.video.media_types import IMAGE_SUFFIXES, VIDEO_SUFFIXES

NO_UNICODE = "its name is not valid Unicode; rename it"


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """What the listing of a folder of a store says of a source.

    Attributes:
        clip: the source.
        texts: those beside it that may have its caption, by name.
    """

    clip: StoredObject
    texts: tuple[StoredObject, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SourceFile:
    """A video or image file to prepare.

    Attributes:
        name: its path relative to the input folder, with forward slashes; messages and the manifest use it.
        path: the file, or the object of a store; None if a row of a listing has no path.
        caption: the caption of a listing; None if the caption is in a file beside the source.
        problem: the reason why it cannot be used, if known already.
        listed: what is known of an object whose folder was listed.
    """

    name: str
    path: Location | None
    caption: str | None = None
    problem: str | None = None
    listed: Listed | None = None


def place_of(folder: Location, name: str) -> Location:
    """Where the source of a name in a dataset is: below the folder, or where a listing has named it."""
    return location(name) if "://" in name or Path(name).is_absolute() else folder / name


class Sources(Protocol):
    """Sources that can be read any number of times, by ascending names; a list is one."""

    def __len__(self) -> int:
        """Their number."""

    def __iter__(self) -> Iterator[SourceFile]:
        """The sources, by name."""


def source_suffixes(*, images: bool) -> tuple[str, ...]:
    """The suffixes of the files that are sources: those of videos, and with ``images`` also those of images."""
    return VIDEO_SUFFIXES + (IMAGE_SUFFIXES if images else ())


def caption_of(source: SourceFile, captions: CaptionFinder) -> str:
    """The caption of a source, from the listing or from a file beside it.

    Raises:
        ValueError: see ``CaptionFinder.find``.
    """
    if source.caption is not None:
        return source.caption
    assert source.path is not None, "a source without a path has a problem"
    return captions.find(source.path, () if source.listed is None else source.listed.texts)
