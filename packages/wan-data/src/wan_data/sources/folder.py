"""The sources that a folder holds, and what else is in it."""

import os
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import NoReturn

from wan_data.sources.captions import json_lines, names_in
from wan_data.sources.source import NO_UNICODE, SourceFile, source_suffixes
from wan_data.video.media_types import IMAGE_SUFFIXES, VIDEO_SUFFIXES

_CAPTION_SUFFIXES = (".txt", ".json")
_LIST_SUFFIX = ".jsonl"
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
        self._places = list(_walk(folder))

    def files(self) -> list[SourceFile]:
        """The sources, sorted by name.

        Raises:
            ValueError: there are none.
        """
        found = [
            place / name
            for place, _, names in self._places
            for name in names
            if _suffix(name) in self._suffixes and not name.startswith(".")
        ]
        if not found:
            raise ValueError(f"{self._folder} holds no files ending in {', '.join(self._suffixes)}")
        return sorted((_named(path, self._folder) for path in found), key=lambda source: source.name)

    def left_out(self) -> list[str]:
        """What of the folder is not read, one line a kind; empty if all of it is."""
        hidden: list[Path] = []
        again: list[Path] = []
        other: list[Path] = []
        images: list[Path] = []
        texts: list[Path] = []
        lines: list[Path] = []
        broken: list[Path] = []
        for place, folders, names in self._places:
            shown = [name for name in names if not name.startswith(".")]
            hidden += [place / name for name in {*names} - {*shown}]
            for name, reason in folders.items():
                (hidden if reason == "hidden" else again).append(place / name)
            files = {name for name in shown if _suffix(name) in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)}
            media = {Path(name).stem for name in files}
            for name in shown:
                kind = _suffix(name)
                if kind in _CAPTION_SUFFIXES:
                    texts += [] if Path(name).stem in media else [place / name]
                elif kind == _LIST_SUFFIX:
                    unused, unread, used = _unused_lines(place / name, files | media)
                    broken += unread
                    if used or Path(name).stem in media:
                        lines += unused
                    elif unused:
                        texts.append(place / name)
                elif kind in IMAGE_SUFFIXES and kind not in self._suffixes:
                    images.append(place / name)
                elif kind not in self._suffixes:
                    other.append(place / name)
        kinds = {
            "hidden": hidden,
            "linked a second time": again,
            "of a kind that is not read": other,
            "images, which --mode frames reads": images,
            "texts without a clip of their name": texts,
            "lines that name no clip beside them": lines,
            "captions that cannot be read": broken,
        }
        return [f"{len(paths)} left out, {kind}: {_few(paths, self._folder)}" for kind, paths in kinds.items() if paths]


def _unused_lines(path: Path, clips: Set[str]) -> tuple[list[Path], list[Path], bool]:
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


def _few(paths: Sequence[Path], folder: Path) -> str:
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    # A name that is not valid Unicode cannot be printed.
    return (", ".join(names[:_NAMED]) + more).encode("utf-8", "backslashreplace").decode()


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
