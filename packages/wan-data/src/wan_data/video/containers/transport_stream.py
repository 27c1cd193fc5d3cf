"""Joined MPEG transport streams: is a break of the packet counters a join, or are packets missing?

FFmpeg marks data as corrupt where the counter of a stream's packets breaks, which it does where two recordings were
concatenated (``cat a.ts b.ts``). There no data are missing: the access unit before the break ends with stuffing bytes,
which only the last packet of a unit has, and the packet after the break begins a unit. That no unit is missing either
shows in the time stamps (``wan_data.video.containers.timing``).
"""

import dataclasses
import os

import numpy as np
from jaxtyping import UInt8

_SYNC = 0x47
# With the time stamps of Blu-ray and AVCHD in front of each packet, and with error correction behind it.
_PACKET_BYTES = (188, 192, 204)
_PACKETS_AT_ONCE = 65536

Packet = UInt8[np.ndarray, "bytes"]
Packets = UInt8[np.ndarray, "packets bytes"]


@dataclasses.dataclass(frozen=True)
class CounterBreak:
    """A break of the counter of one stream's packets.

    Attributes:
        position: byte position of the packet after it.
        clean: no packet of an access unit is missing.
    """

    position: int
    clean: bool


def counter_breaks(descriptor: int, pid: int) -> list[CounterBreak]:
    """The breaks of a stream's packet counter, in order.

    Args:
        descriptor: of the open file, whose position is not changed.
        pid: the identifier of the stream's packets.
    """
    size, start = _layout(os.pread(descriptor, 8 * max(_PACKET_BYTES), 0))
    found: list[CounterBreak] = []
    before: Packet | None = None
    position = start
    while data := os.pread(descriptor, size * _PACKETS_AT_ONCE, position):
        packets = np.frombuffer(data, np.uint8)[: len(data) // size * size].reshape(-1, size)[:, :188]
        if not len(packets):
            break
        if (packets[:, 0] != _SYNC).any():
            return [*found, CounterBreak(position, clean=False)]
        pids = (packets[:, 1] & 0x1F).astype(int) << 8 | packets[:, 2]
        rows = np.flatnonzero((pids == pid) & (packets[:, 3] & 0x10 > 0))
        for row in _suspects(packets[rows], before):
            last = packets[rows[row - 1]] if row else before
            clean = last is not None and _clean(last, packets[rows[row]])
            found.append(CounterBreak(position + int(rows[row]) * size, clean))
        if len(rows):
            before = packets[rows[-1]]
        position += len(packets) * size
    return found


def _layout(head: bytes) -> tuple[int, int]:
    """Bytes of a packet, and the position of the first; those of the plain form if the file is in none."""
    for size in _PACKET_BYTES:
        for start in (0, 4):
            if len(head) >= start + 5 * size and all(head[start + size * number] == _SYNC for number in range(5)):
                return size, start
    return _PACKET_BYTES[0], 0


def _suspects(packets: Packets, before: Packet | None) -> list[int]:
    # Packets whose counter does not follow that of the packet before, without a note that this is intended.
    if not len(packets):
        return []
    counters = (packets[:, 3] & 15).astype(int)
    previous = np.roll(counters, 1)
    previous[0] = counters[0] - 1 if before is None else before[3] & 15
    damaged = packets[:, 1] & 0x80 > 0
    intended = (packets[:, 3] & 0x20 > 0) & (packets[:, 4] > 0) & (packets[:, 5] & 0x80 > 0)
    return [int(row) for row in np.flatnonzero(((counters - previous) % 16 != 1) & ~intended | damaged)]


def _clean(last: Packet, first: Packet) -> bool:
    begins_unit, damaged = bool(first[1] & 0x40), bool((last[1] | first[1]) & 0x80)
    return begins_unit and not damaged and _has_stuffing(last)


def _has_stuffing(packet: Packet) -> bool:
    if not packet[3] & 0x20:
        return False
    length, flags = int(packet[4]), int(packet[5])
    if length == 0:
        return True
    if flags & 0x03:  # private data and extensions are of any length
        return False
    needed = 1 + 6 * bool(flags & 0x10) + 6 * bool(flags & 0x08) + bool(flags & 0x04)
    return length > needed or flags == 0
