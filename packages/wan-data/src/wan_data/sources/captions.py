"""Captions of clips: finding them in the files beside a clip, and validating them."""

import codecs
import itertools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from wan_data.sources.texts import Texts
from wan_data.storage.failures import is_of_the_object
from wan_data.storage.location import Location
from wan_data.storage.store import StoredObject
from wan_model.system import safe_reading

# Keys under which a line of a listing may name its clip. Those of NVIDIA's own files come first.
NAME_KEYS = ("video_path", "file_name", "filename", "video", "path", "name", "file", "image", "image_path")


# Bytes of a list of captions: some ten million lines.
LARGEST_LISTING = 64 << 30
LONGEST_LINE = 16 << 20
# A compressed listing of a megabyte can have any number.
MOST_ROWS = 20_000_000
# Characters; a text encoder takes 512 tokens of it.
LONGEST_CAPTION = 100_000
_NAMED = 5
_FOLDERS = 16  # whose lists are kept


def read_text(path: Path, limit: int = safe_reading.SMALL_FILE) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read, is larger than ``limit`` bytes, or is not UTF-8.
    """
    try:
        return safe_reading.read_text(path, limit)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the location and the value of each line that is not blank; a ``ValueError`` for a line that is not JSON.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8.
    """
    rows = 0
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        rows += 1
        check_rows(path, rows)
        where = f"{path.name} line {number}"
        try:
            value = safe_reading.parse_json(line, where)
        except ValueError as error:
            value = error
        yield where, value


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without their ends, one at a time, with or without a byte order mark.

    Raises:
        ValueError: it cannot be read, is not UTF-8, or has a line of over ``LONGEST_LINE`` bytes.
    """
    try:
        file = safe_reading.open_file(path, LARGEST_LISTING)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    place, last = 0, b"\n"
    with file:
        # Not splitlines: JSON text may hold U+2028.
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{path} has a line of over {LONGEST_LINE:,} bytes at byte {place}")
            if not place:
                line = line.removeprefix(codecs.BOM_UTF8)
                place = file.tell() - len(line)
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {place + error.start}") from None
            yield text.removesuffix("\n")
            place, last = place + len(line), line
    if last.endswith(b"\n"):
        yield ""  # what follows the last end


def check_rows(path: Path, rows: int) -> None:
    """Refuse a list of more rows than are kept.

    Raises:
        ValueError: it has more; the message names the file.
    """
    if rows > MOST_ROWS:
        raise ValueError(f"{path} has over {MOST_ROWS:,} rows; divide it, and prepare a dataset of each part")


def names_in(value: Any) -> list[str]:
    """The names of files that a line of a list of captions names its clip by."""
    if not isinstance(value, dict):
        return []
    return sorted({Path(value[key]).name for key in NAME_KEYS if isinstance(value.get(key), str)})


class NoCaptionError(ValueError):
    """An object without the key of the caption."""


def caption_in(value: Any, key: str, where: str) -> str:
    """The caption under a key of an object.

    Raises:
        NoCaptionError: the key is missing; the message begins with ``where``.
        ValueError: the value is no object, or what is under the key is no text.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds a JSON {type(value).__name__}; expected an object with the key {key!r}")
    if key not in value:
        keys = ", ".join(sorted(map(repr, value))) or "none"
        raise NoCaptionError(f"{where} has no key {key!r}, only {keys}; choose another with --caption-key")
    caption = value[key]
    if not isinstance(caption, str):
        raise ValueError(f"{where} has a {type(caption).__name__} under {key!r}; expected text")
    return _checked(caption, f"{where} under {key!r}")


def _checked(caption: str, where: str) -> str:
    if not caption.strip():
        raise ValueError(f"{where} has an empty caption")
    if len(caption) > LONGEST_CAPTION:
        raise ValueError(f"{where} has a caption of {len(caption):,} characters; expected at most {LONGEST_CAPTION:,}")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} has half of a surrogate pair; expected valid Unicode text") from None
    return caption


class CaptionFinder:
    """Captions of clips, from ``.json``, ``.jsonl`` and ``.txt`` files in the clips' own folders.

    A clip ``a/clip.mp4`` gets its caption from exactly one of: ``a/clip.json`` (an object), ``a/clip.jsonl`` (one
    line with an object), ``a/clip.txt`` (all of it is the caption), or any other ``a/*.jsonl`` that has a line naming
    ``clip.mp4`` or ``clip``.

    Args:
        caption_key: key of the caption in the JSON object.
    """

    def __init__(self, caption_key: str = "caption") -> None:
        self.caption_key = caption_key
        self._lists: dict[Location, tuple[dict[str, list[tuple[str, Any]]], list[str]]] = {}
        self._lock = threading.Lock()

    def find(self, clip: Location, listed: Sequence[StoredObject] = ()) -> str:
        """The caption of a clip.

        Args:
            clip: the file, or the object of a store.
            listed: of an object: the texts beside it.

        Raises:
            ValueError: no caption, several that differ, or one that cannot be read; the message names the file.
            OSError: a text of a store cannot be read.
        """
        texts, stem = Texts(clip, listed), Path(clip.name).stem
        found: list[tuple[str, str]] = []
        without: list[str] = []
        if texts.stands(beside := f"{stem}.json"):
            with texts.open(beside) as path:
                value = safe_reading.parse_json(read_text(path), beside)
            try:
                found.append((beside, caption_in(value, self.caption_key, beside)))
            except NoCaptionError as error:  # it may hold something else, and the caption stands in another file
                without.append(str(error))
        if texts.stands(beside := f"{stem}.jsonl") and (caption := self._single_line(texts, beside)) is not None:
            found.append((beside, caption))
        if texts.stands(beside := f"{stem}.txt"):
            with texts.open(beside) as path:
                found.append((beside, _checked(read_text(path).strip(), beside)))
        with self._lock:  # a list is read once
            listing, broken = self._listed(clip.parent, texts)
        for name in (clip.name, stem):
            for where, value in listing.get(name, []):
                found.append((where, caption_in(value, self.caption_key, where)))
        if not found and without:
            raise NoCaptionError(without[0])
        if not found:
            more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
            hint = f"; unreadable beside it: {'; '.join(broken[:_NAMED])}{more}" if broken else ""
            raise ValueError(f"it has no caption: expected {stem}.json, .jsonl or .txt beside it{hint}")
        if len({caption for _, caption in found}) > 1:
            raise ValueError(f"its captions in {' and '.join(where for where, _ in found)} differ; keep one")
        return found[0][1]

    def _single_line(self, texts: Texts, name: str) -> str | None:
        with texts.open(name, LARGEST_LISTING) as path:
            lines = list(itertools.islice(json_lines(path), 2))
        if len(lines) != 1:
            return None  # a list of clips; _listed reads it
        ((_, value),) = lines
        if isinstance(value, ValueError):
            raise value
        if isinstance(value, dict) and any(isinstance(value.get(key), str) for key in NAME_KEYS):
            return None
        return caption_in(value, self.caption_key, name)

    def _listed(self, folder: Location, texts: Texts) -> tuple[dict[str, list[tuple[str, Any]]], list[str]]:
        if (known := self._lists.get(folder)) is not None:
            return known
        listed: dict[str, list[tuple[str, Any]]] = {}
        broken: list[str] = []
        for name in texts.lists():
            try:
                with texts.open(name, LARGEST_LISTING) as path:
                    lines = list(json_lines(path))
            except ValueError as error:
                broken.append(str(error))
                continue
            except OSError as error:
                if not is_of_the_object(error):
                    raise
                broken.append(f"{name} cannot be read: {error.strerror or error}")
                continue
            for where, value in lines:
                if isinstance(value, ValueError):
                    broken.append(str(value))
                else:
                    for one in names_in(value):
                        listed.setdefault(one, []).append((where, value))
        # Sources come by name, and so folder by folder; some threads are still at the one before.
        if len(self._lists) >= _FOLDERS:
            self._lists.pop(next(iter(self._lists)), None)
        self._lists[folder] = listed, broken
        return listed, broken
