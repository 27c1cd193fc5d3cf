"""The sources that a folder of a store holds, with the texts beside them, from one listing of it."""

import posixpath
import sqlite3
import weakref
from collections.abc import Iterator
from typing import Any

from wan_data.sources.captions import LARGEST_LISTING
from wan_data.sources.folder import (
    CAPTION_SUFFIXES,
    KIND_BROKEN,
    KIND_HIDDEN,
    KIND_IMAGES,
    KIND_LINES,
    KIND_NAMED,
    KIND_OTHER,
    KIND_TEXTS,
    LEFT_OUT_KINDS,
    LIST_SUFFIX,
    Few,
    left_out_lines,
    unused_lines,
)
from wan_data.sources.source import Listed, SourceFile, source_suffixes
from wan_data.sources.texts import text_copy
from wan_data.storage.failures import is_of_the_object
from wan_data.storage.location import StorePath
from wan_data.storage.store import StoredObject, list_objects
from wan_data.video.media_types import IMAGE_SUFFIXES, VIDEO_SUFFIXES

_TABLES = """
CREATE TABLE objects (name TEXT PRIMARY KEY, folder TEXT NOT NULL, stem TEXT NOT NULL, kind TEXT NOT NULL,
    bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX by_stem ON objects (folder, stem, kind);
CREATE INDEX by_kind ON objects (kind, folder);
"""
_CLIP, _OTHER_CLIP, _TEXT, _LIST = "clip", "other clip", "text", "list"


class StoreFolder:
    """A folder of a store, as it is when it is opened; objects whose names, or folders, begin with a dot are left out.

    The list stands in a temporary file, because there may be ten million.

    Args:
        folder: the folder, which is listed once.
        images: images are sources, as videos are.

    Raises:
        OSError: it cannot be listed.
    """

    def __init__(self, folder: StorePath, *, images: bool = False) -> None:
        self._folder, self._suffixes = folder, source_suffixes(images=images)
        self._database = sqlite3.connect("", check_same_thread=False)
        weakref.finalize(self, self._database.close)
        self._database.executescript(_TABLES)
        self._left_out = {kind: Few() for kind in LEFT_OUT_KINDS}
        self._database.executemany("INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?)", self._listed())
        self._find_unused()
        self._sources = _StoredSources(folder, self._database)

    def files(self) -> "_StoredSources":
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

    def _listed(self) -> Iterator[tuple[Any, ...]]:
        for found in list_objects(self._folder, unusable=self._left_out[KIND_NAMED].add):
            name = found.path.relative_to(self._folder)
            if any(part.startswith(".") for part in name.split("/")):
                self._left_out[KIND_HIDDEN].add(name)
                continue
            stem, suffix = posixpath.splitext(posixpath.basename(name))
            kind = self._kind(suffix.lower())
            if kind in (KIND_IMAGES, KIND_OTHER):
                self._left_out[kind].add(name)
            if kind == KIND_IMAGES:
                kind = _OTHER_CLIP  # a text beside it has a clip of its name
            if kind != KIND_OTHER:
                yield name, posixpath.dirname(name), stem, kind, found.bytes, found.mtime_ns

    def _kind(self, suffix: str) -> str:
        if suffix in self._suffixes:
            return _CLIP
        if suffix in CAPTION_SUFFIXES:
            return _TEXT
        if suffix == LIST_SUFFIX:
            return _LIST
        return KIND_IMAGES if suffix in IMAGE_SUFFIXES and suffix not in VIDEO_SUFFIXES else KIND_OTHER

    def _find_unused(self) -> None:
        alone = (
            "SELECT name, bytes, mtime_ns FROM objects AS text WHERE kind = ? AND NOT EXISTS (SELECT 1 FROM objects "
            f"WHERE folder = text.folder AND stem = text.stem AND kind IN ('{_CLIP}', '{_OTHER_CLIP}'))"
        )
        for name, _, _ in self._database.execute(alone, [_TEXT]):
            self._left_out[KIND_TEXTS].add(name)
        # The list of one clip is read with it.
        for name, size, mtime_ns in self._database.execute(alone, [_LIST]).fetchall():
            folder = posixpath.dirname(name)
            beside = self._database.execute(
                f"SELECT name, stem FROM objects WHERE folder = ? AND kind IN ('{_CLIP}', '{_OTHER_CLIP}')", [folder]
            )
            clips = {one for clip, stem in beside for one in (posixpath.basename(clip), stem)}
            try:
                with text_copy(StoredObject(self._folder / name, size, mtime_ns), LARGEST_LISTING) as path:
                    unused, unread, used = unused_lines(path, clips)
            except (ValueError, OSError) as error:  # it is too large, or cannot be read
                if isinstance(error, OSError) and not is_of_the_object(error):
                    raise
                self._left_out[KIND_BROKEN].add(name)
                continue
            for line in unread:
                self._left_out[KIND_BROKEN].add(posixpath.join(folder, line.name))
            if used:
                for line in unused:
                    self._left_out[KIND_LINES].add(posixpath.join(folder, line.name))
            elif unused:
                self._left_out[KIND_TEXTS].add(name)


class _StoredSources:
    """The sources of such a folder; see ``wan_data.sources.source.Sources``."""

    def __init__(self, folder: StorePath, database: sqlite3.Connection) -> None:
        self._folder, self._database = folder, database
        ((self._count,),) = database.execute("SELECT count(*) FROM objects WHERE kind = ?", [_CLIP])
        # The lists of the folder that was read last.
        self._lists: tuple[str | None, tuple[StoredObject, ...]] = None, ()

    def __len__(self) -> int:
        """The number of sources."""
        return int(self._count)

    def __iter__(self) -> Iterator[SourceFile]:
        """The sources, by name."""
        query = "SELECT name, folder, stem, bytes, mtime_ns FROM objects WHERE kind = ? ORDER BY name"
        for name, folder, stem, size, mtime_ns in self._database.execute(query, [_CLIP]):
            yield self._source(name, folder, stem, size, mtime_ns)

    def _source(self, name: str, folder: str, stem: str, size: int, mtime_ns: int) -> SourceFile:
        if self._lists[0] != folder:
            self._lists = folder, self._texts("folder = ? AND kind = ?", folder, _LIST)
        own = self._texts("folder = ? AND stem = ? AND kind = ?", folder, stem, _TEXT)
        clip = StoredObject(self._folder / name, size, mtime_ns)
        return SourceFile(name, clip.path, listed=Listed(clip, (*own, *self._lists[1])))

    def _texts(self, where: str, *values: str) -> tuple[StoredObject, ...]:
        rows = self._database.execute(f"SELECT name, bytes, mtime_ns FROM objects WHERE {where} ORDER BY name", values)
        return tuple(StoredObject(self._folder / name, size, mtime_ns) for name, size, mtime_ns in rows)
