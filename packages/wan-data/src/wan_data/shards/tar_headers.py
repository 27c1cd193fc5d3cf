"""The members of a tar file, header by header: only plain files of a bounded size, within bounded memory.

``tarfile`` is not used for reading. It expands sparse members, follows the sizes that extended headers claim, steps
back on negative ones, and reads headers of any size: a damaged or malicious shard costs gigabytes, or has no end.

Source: POSIX.1-2001 (ustar and pax); the GNU tar manual for long names and numbers in base 256.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from wan_data.shards.serialization import LARGEST_MEMBER

BLOCK = 512
# Bytes of a header that gives the next member a long name, or times with fractions.
_LARGEST_EXTENSION = 1 << 16
_FILES = (b"0", b"\0")
_FOLDER, _PAX, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK = b"5", b"x", b"g", b"L", b"K"
_KINDS = {
    b"1": "a link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}


class Member(NamedTuple):
    """A plain file in a tar file.

    Attributes:
        name: its name.
        offset: of its first header, in bytes.
        content: offset of its content.
        size: of its content, in bytes.
    """

    name: str
    offset: int
    content: int
    size: int

    @property
    def end(self) -> int:
        """Offset of what follows it."""
        return self.content + _padded(self.size)

    @property
    def key(self) -> str:
        """The key of its sample: its name up to the first dot, as webdataset and Energon read it; may be empty."""
        folder, slash, name = self.name.rpartition("/")
        key = name.partition(".")[0]
        return folder + slash + key if key else ""

    @property
    def kind(self) -> str:
        """What follows the first dot of its name, such as ``json``."""
        return self.name.rpartition("/")[2].partition(".")[2]


def tar_members(file: BinaryIO, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The plain files of a tar file, in order; folders, and names without a key such as ``._x``, are left out.

    Args:
        file: open for reading; its position is used between two members.
        start: offset of the first header.
        end: offset of the end of the last member; None for the end of the archive.

    Raises:
        ValueError: there is no header where one must be, the file ends before a member does, or a member is no plain
            file or is larger than ``LARGEST_MEMBER``; the message begins with ``it`` and names the member.
    """
    size = file.seek(0, os.SEEK_END)
    offset = first = start  # of the next header, and of the first one of the next member
    name = flaw = ""  # by headers before the member's own
    while end is None or offset < end:
        header = _read(file, offset, BLOCK)
        if end is None and offset == first and size and (not header or header == bytes(BLOCK)):
            return
        if len(header) < BLOCK:
            raise ValueError(f"it is no complete tar file: it ends at byte {size} within a header")
        _check_sum(header, offset)
        kind, length = header[156:157], _number(header[124:136], offset)
        if kind in (_PAX, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK):
            if length > _LARGEST_EXTENSION:
                raise ValueError(f"its header at byte {offset} has {length} bytes; expected at most 65536")
            content = _read(file, offset + BLOCK, length)
            if len(content) < length:
                raise ValueError(f"it is no complete tar file: it ends at byte {size} within a header")
            if kind == _LONG_NAME:
                name = _text(content)
            elif kind in (_PAX, _PAX_OF_ALL):
                renamed, found = _parse_pax(content, offset)
                name, flaw = renamed or name, found or flaw
            offset += BLOCK + _padded(length)
            continue
        member = Member(name or _own_name(header), first, offset + BLOCK, length)
        what = "a folder" if kind == b"\0" and member.name.endswith("/") else _KINDS.get(kind, f"of the type {kind!r}")
        is_file = kind in _FILES and what != "a folder"
        if is_file and not flaw:
            if length > LARGEST_MEMBER:
                raise ValueError(f"its member {member.name!r:.200} has {length} bytes; expected at most 1073741824")
            if member.content + length > size:
                raise ValueError(f"it is no complete tar file: it ends at byte {size} within {member.name!r:.200}")
            if member.key:
                yield member
        elif flaw or not (kind == _FOLDER or what == "a folder"):
            raise ValueError(f"its member {member.name!r:.200} {flaw or f'is {what}'}; expected plain files")
        offset = first = member.end if is_file else member.content
        name = flaw = ""
    if offset != end:
        raise ValueError(f"it has no member that ends at byte {end}")


def read_member(file: BinaryIO, member: Member) -> bytes:
    """The content of a member."""
    return _read(file, member.content, member.size)


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _check_sum(header: bytes, offset: int) -> None:
    # Of all bytes, with blanks in place of the sum itself.
    if _number(header[148:156], offset) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise ValueError(f"it is no complete tar file: there is no header at byte {offset}")


def _number(field: bytes, offset: int) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):  # of a negative number, too, whose first byte is 255
        raise ValueError(f"it is no complete tar file: its header at byte {offset} has the number {field!r}")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _own_name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _parse_pax(content: bytes, offset: int) -> tuple[str, str]:
    """The name that an extended header gives its member, and why the member is no plain file; empty if neither.

    A size is refused: it is needed from 8 GiB on, and contradicts the member's own header below.
    """
    name, flaw, place = "", "", 0
    while place < len(content):
        digits = content[place : place + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = content[place : place + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if not equals or not record.endswith(b"\n") or len(record) != length:
            raise ValueError(f"its extended header at byte {offset} is not of POSIX's form")
        if key.startswith(b"GNU.sparse"):
            flaw = "is a sparse file"
        elif key == b"size":
            flaw = f"has the size {_text(value)[:40]} by an extended header"
        elif key == b"path":
            name = _text(value)
        place += length
    return name, flaw
