"""The sources that a folder holds, and what else is in it."""

import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import NoReturn

from wan_data.sources.captions import json_lines, names_in
from wan_data.sources.source import NO_UNICODE, SourceFile, source_suffixes
from wan_data.sources.source_table import SourceTable
from wan_data.video.media_types import IMAGE_SUFFIXES, VIDEO_SUFFIXES

CAPTION_SUFFIXES = (".txt", ".json")
LIST_SUFFIX = ".jsonl"
_NAMED = 5


class SourceFolder:
    """A folder of videos, or of videos and images, as it is when it is opened.

    Links to folders are followed, each folder once; hidden files and folders, whose names begin with a dot, are left
    out.

    Args:
        folder: the folder, which is listed once.
        images: images are sources, as videos are.

    Raises:
        ValueError: the folder does not exist, or a folder in it cannot be listed.
    """

    def __init__(self, folder: Path, *, images: bool = False) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; expected one with videos and captions")
        self._folder = folder
        self._suffixes = source_suffixes(images=images)
        self._sources = SourceTable(folder)
        self._left_out = {kind: Few() for kind in LEFT_OUT_KINDS}
        for place, skipped, names in _walk(folder):
            self._add(place, skipped, names)

    def files(self) -> SourceTable:
        """The sources, by name.

        Raises:
            ValueError: there are none.
        """
        if not len(self._sources):
            raise ValueError(f"{self._folder} holds no files ending in {', '.join(self._suffixes)}")
        return self._sources

    def left_out(self) -> list[str]:
        """What of the folder is not read, one line a kind; empty if all of it is."""
        return left_out_lines(self._left_out)

    def _leave_out(self, kind: str, path: Path) -> None:
        self._left_out[kind].add(path.relative_to(self._folder).as_posix())

    def _add(self, place: Path, skipped: dict[str, str], names: list[str]) -> None:
        shown = [name for name in names if not name.startswith(".")]
        for name in {*names} - {*shown}:
            self._leave_out(KIND_HIDDEN, place / name)
        for name, reason in skipped.items():
            self._leave_out(KIND_HIDDEN if reason == "hidden" else KIND_AGAIN, place / name)
        files = {name for name in shown if _suffix(name) in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)}
        media = {Path(name).stem for name in files}
        for name in shown:
            kind, path = _suffix(name), place / name
            if kind in self._suffixes:
                self._sources.add(_named(path, self._folder))
            elif kind in CAPTION_SUFFIXES:
                if Path(name).stem not in media:
                    self._leave_out(KIND_TEXTS, path)
            elif kind == LIST_SUFFIX:
                self._add_list(path, files | media, Path(name).stem in media)
            else:
                self._leave_out(KIND_IMAGES if kind in IMAGE_SUFFIXES else KIND_OTHER, path)

    def _add_list(self, path: Path, clips: Set[str], of_a_clip: bool) -> None:
        unused, unread, used = unused_lines(path, clips)
        for line in unread:
            self._leave_out(KIND_BROKEN, line)
        if used or of_a_clip:
            for line in unused:
                self._leave_out(KIND_LINES, line)
        elif unused:
            self._leave_out(KIND_TEXTS, path)


KIND_HIDDEN, KIND_AGAIN, KIND_OTHER = "hidden", "linked a second time", "of a kind that is not read"
KIND_IMAGES, KIND_TEXTS = "images, which --mode frames reads", "texts without a clip of their name"
KIND_LINES, KIND_BROKEN = "lines that name no clip beside them", "captions that cannot be read"
KIND_NAMED = "with a part of the name that is empty, '.' or '..'"
LEFT_OUT_KINDS = (KIND_HIDDEN, KIND_AGAIN, KIND_OTHER, KIND_IMAGES, KIND_TEXTS, KIND_LINES, KIND_BROKEN, KIND_NAMED)


def left_out_lines(left_out: Mapping[str, "Few"]) -> list[str]:
    """What is not read, one line for each kind of which there is something."""
    return [f"{few.count} left out, {kind}: {few}" for kind, few in left_out.items() if few.count]


class Few:
    """Counts names, and keeps the first of them."""

    def __init__(self) -> None:
        self._first, self.count = list[str](), 0

    def add(self, name: str) -> None:
        """Count a name."""
        self.count += 1
        self._first = sorted([*self._first, name])[:_NAMED]

    def __str__(self) -> str:
        """The first, and how many there are more."""
        more = f" and {self.count - _NAMED} more" if self.count > _NAMED else ""
        # A name that is not valid Unicode cannot be printed.
        return (", ".join(self._first) + more).encode("utf-8", "backslashreplace").decode()


def unused_lines(path: Path, clips: Set[str]) -> tuple[list[Path], list[Path], bool]:
    """The lines of a list of captions that belong to no clip, those that cannot be read, and whether any is used.

    Args:
        path: of the list.
        clips: names of the clips beside it, with and without their suffixes.
    """
    unused, broken, used = [], [], False
    try:
        for where, value in json_lines(path):
            names = names_in(value)
            if isinstance(value, ValueError):
                broken.append(path.with_name(where))
            elif not clips & {*names}:
                # A line without a name is the caption of the clip that has the name of the list.
                if names or path.stem not in clips:
                    unused.append(path.with_name(where))
            else:
                used = True
    except ValueError:
        broken.append(path)
    return unused, broken, used


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _walk(folder: Path) -> Iterator[tuple[Path, dict[str, str], list[str]]]:
    """Each folder below one, with the folders in it that are not entered, and why, and the names of its files."""
    seen = set()
    for name, folders, names in os.walk(folder, onerror=_not_listed, followlinks=True):
        place, skipped = Path(name), {}
        if place == folder:
            seen.add(_identity(place))
        for one in sorted(folders):
            if one.startswith("."):
                skipped[one] = "hidden"
            elif (identity := _identity(place / one)) in seen:
                skipped[one] = "again"
            else:
                seen.add(identity)
        # os.walk enters what is left in its list.
        folders[:] = sorted({*folders} - {*skipped})
        yield place, skipped, names


def _not_listed(error: OSError) -> NoReturn:
    # Its files would seem to be gone.
    raise ValueError(f"{error.filename} cannot be listed: {error.strerror or error}; make it readable, or hide it")


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _named(path: Path, folder: Path) -> SourceFile:
    name = path.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        # The manifest, which is JSON in UTF-8, cannot hold such a name.
        readable = name.encode("utf-8", "backslashreplace").decode()
        return SourceFile(readable, path, problem=NO_UNICODE)
    return SourceFile(name, path)
