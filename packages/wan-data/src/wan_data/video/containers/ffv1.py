"""The checksums of FFV1: FFmpeg's decoder sees a wrong one, fills the slice from the picture before, and says nothing.

RFC 9043, section 4.9 (slice footer): a slice ends with its size in 3 bytes and, where the stream has checksums, an
error status of 1 byte and a CRC of 4 bytes, with which the CRC-32 of the whole slice (polynomial 0x04C11DB7, most
significant bit first, begun with 0) is 0.
"""

import zlib
from collections.abc import Iterator

_FOOTER = 8
# zlib's CRC-32 takes the least significant bit of a byte first.
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class SliceChecksums:
    """Compares the checksums of the packets of one stream, which has none if not one of its first packet is right."""

    def __init__(self) -> None:
        self._present: bool | None = None

    def are_right(self, packet: bytes) -> bool:
        """Every slice of the packet is as it was written, as far as the stream has checksums."""
        # The CRC of zeros, such as of a hole in a file, is 0.
        checked = [end - begin > _FOOTER and _crc_is_zero(packet[begin:end]) for begin, end in _slices(packet)]
        if self._present is None:
            self._present = any(checked)
        return all(checked) or not self._present


def _slices(packet: bytes) -> Iterator[tuple[int, int]]:
    """Where the slices of a packet begin and end, last one first; what has no footer counts as one slice."""
    end = len(packet)
    while end > 0:
        size = int.from_bytes(packet[max(0, end - _FOOTER) :][:3], "big")
        begin = max(0, end - _FOOTER - size)
        yield begin, end
        end = begin


def _crc_is_zero(data: bytes) -> bool:
    # zlib inverts the CRC before and after.
    return zlib.crc32(data.translate(_MIRRORED), 0xFFFFFFFF) == 0xFFFFFFFF
