"""Whether the end of a file is missing, in the containers where FFmpeg takes a cut for the end.

These are Matroska, Ogg, GIF and fragmented mp4. Sources: RFC 8794 and RFC 9559 (EBML and Matroska, WebM), RFC 3533
(Ogg), the GIF89a specification, ISO/IEC 14496-12 (mp4).
"""

import os
from collections.abc import Callable


def missing_end(demuxer: str, descriptor: int) -> str | None:
    """How one sees that a file is cut off, as the end of a sentence; None if it is complete or does not tell.

    Args:
        demuxer: FFmpeg's name of the container.
        descriptor: of the open file, whose position is not changed.
    """
    checks: dict[str, Callable[[int], str | None]]
    checks = {"matroska": _matroska, "ogg": _ogg, "gif": _gif, "mov": _fragmented_mp4}
    return checks[demuxer](descriptor) if demuxer in checks else None


def _lacking(end: int, descriptor: int) -> str | None:
    missing = end - os.fstat(descriptor).st_size
    return f"its last {missing} bytes are missing" if missing > 0 else None


# -- mp4: boxes of a size, a kind and a content ------------------------------------------------------------------------

_MOVIE_FRAGMENT, _MEDIA_DATA = b"moof", b"mdat"
_OTHER_BOXES = b"ftyp styp moov mfra sidx ssix emsg prft free skip wide uuid meta pdin".split()
_BOXES = (_MOVIE_FRAGMENT, _MEDIA_DATA, *_OTHER_BOXES)


def _fragmented_mp4(descriptor: int) -> str | None:
    """A file without fragments states its frames at one place, so that missing ones are seen there."""
    size, position, fragments, without_data = os.fstat(descriptor).st_size, 0, 0, False
    for _ in range(_MOST_ELEMENTS):
        head = os.pread(descriptor, 16, position)
        if fragments and 0 < len(head) < 8 and any(head):
            return "it ends inside the head of a box"
        if len(head) < 8 or (kind := head[4:8]) not in _BOXES:
            break  # something else behind the recording
        length = int.from_bytes(head[:4])
        if length == 1:
            length = int.from_bytes(head[8:])
        elif length == 0:  # up to the end of the file
            length = size - position
        fragments += kind == _MOVIE_FRAGMENT
        without_data = kind == _MOVIE_FRAGMENT or (without_data and kind != _MEDIA_DATA)
        position += max(8, length)
    if not fragments:
        return None
    return _lacking(position, descriptor) or ("the data of its last fragment are missing" if without_data else None)


# -- Matroska: elements of an identifier, a size and a content ---------------------------------------------------------

_EBML_HEADER, _SEGMENT = 0x1A45DFA3, 0x18538067
# SeekHead, Info, Tracks, Cluster, Cues, Chapters, Tags, Attachments, Void, CRC-32.
_IN_SEGMENT = (
    0x114D9B74,
    0x1549A966,
    0x1654AE6B,
    0x1F43B675,
    0x1C53BB6B,
    0x1043A770,
    0x1254C367,
    0x1941A469,
    0xEC,
    0xBF,
)
_LONGEST_HEAD = 12
_MOST_ELEMENTS = 1_000_000


def _matroska(descriptor: int) -> str | None:
    size, position, inside = os.fstat(descriptor).st_size, 0, False
    for _ in range(_MOST_ELEMENTS):
        if position >= size:
            break
        element = _element(os.pread(descriptor, _LONGEST_HEAD, position))
        if element is None or (position == 0 and element[0] != _EBML_HEADER):
            return None
        kind, head, content = element
        if inside and kind not in _IN_SEGMENT:
            return None  # something else behind the recording
        if content is None:
            if kind != _SEGMENT or inside:
                return None
            # A live recording does not state the size of the whole; its parts may state theirs.
            inside, position = True, position + head
            continue
        position += head + content
        if kind == _SEGMENT:
            break
    return _lacking(position, descriptor)


def _element(data: bytes) -> tuple[int, int, int | None] | None:
    """Identifier, bytes of identifier and size, and the size, None if unknown; None if this is no element."""
    kind_bytes = _bytes_of_number(data[:1])
    size_bytes = _bytes_of_number(data[kind_bytes : kind_bytes + 1])
    head = kind_bytes + size_bytes
    if not 0 < kind_bytes <= 4 or not size_bytes or len(data) < head:
        return None
    largest = (1 << 7 * size_bytes) - 1
    content = int.from_bytes(data[kind_bytes:head]) & largest
    return int.from_bytes(data[:kind_bytes]), head, None if content == largest else content


def _bytes_of_number(first: bytes) -> int:
    # As many zero bits are in front of the first one as bytes follow.
    return 9 - first[0].bit_length() if first and first[0] else 0


# -- Ogg: pages, of which the last one of each stream is marked --------------------------------------------------------

_PAGE_HEAD, _LAST_PAGE = 27, 0x04
_NO_POSITION = (bytes(8), b"\xff" * 8)


def _ogg(descriptor: int) -> str | None:
    size, position = os.fstat(descriptor).st_size, 0
    ended: dict[bytes, bool] = {}
    used: set[bytes] = set()
    while position < size:
        head = os.pread(descriptor, _PAGE_HEAD + 255, position)
        if not b"OggS".startswith(head[:4]):
            return None
        segments = head[_PAGE_HEAD : _PAGE_HEAD + head[26]] if len(head) >= _PAGE_HEAD else b""
        if len(head) < _PAGE_HEAD or len(segments) < head[26]:
            return "its last page is incomplete"
        stream = head[14:18]
        ended[stream] = bool(head[5] & _LAST_PAGE)
        if head[6:14] not in _NO_POSITION:
            used.add(stream)
        position += _PAGE_HEAD + len(segments) + sum(segments)
    if (lacking := _lacking(position, descriptor)) is not None:
        return lacking
    # A stream that is declared and has no packets ends with its headers.
    return (
        None
        if all(end for stream, end in ended.items() if stream in used)
        else "its end is missing: a stream in it has no last page"
    )


# -- GIF: blocks up to the trailer -------------------------------------------------------------------------------------

_EXTENSION, _IMAGE, _TRAILER = 0x21, 0x2C, 0x3B
_AT_ONCE = 1 << 20
_MOST_BLOCKS = 1_000_000


def _gif(descriptor: int) -> str | None:
    reader = _Bytes(descriptor)
    reader.skip(10)
    reader.skip(_color_table(reader.next()) + 2)
    for _ in range(_MOST_BLOCKS):
        kind = reader.next()
        if kind is None:
            return "its end is missing: it has no trailer"
        if kind == _TRAILER:
            return None
        if kind == _IMAGE:
            reader.skip(8)
            reader.skip(_color_table(reader.next()) + 1)
        elif kind == _EXTENSION:
            reader.skip(1)
        elif kind != 0:
            return None  # no block: the decoder judges
        else:
            continue
        while length := reader.next():
            reader.skip(length)
    return None


def _color_table(flags: int | None) -> int:
    return 3 << (flags & 7) + 1 if flags is not None and flags & 0x80 else 0


class _Bytes:
    """Single bytes of a file from its beginning, read in larger parts."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._start, self._data, self._position = descriptor, 0, b"", 0

    def next(self) -> int | None:
        """The next byte; None behind the end."""
        offset = self._position - self._start
        if not 0 <= offset < len(self._data):
            self._start, offset = self._position, 0
            self._data = os.pread(self._descriptor, _AT_ONCE, self._start)
        self._position += 1
        return self._data[offset] if self._data else None

    def skip(self, count: int) -> None:
        """Leave out bytes."""
        self._position += count
