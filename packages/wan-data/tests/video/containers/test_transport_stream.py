import os

import pytest

from wan_data.video.containers import transport_stream
from wan_data.video.containers.transport_stream import CounterBreak, counter_breaks

PID, OTHER = 0x100, 0x101
BEGINS, DAMAGED = 0x40, 0x80


def packet(counter, *, flags=0, stuffing=None, adaptation=None, pid=PID):
    """188 bytes; ``stuffing`` is the length of an adaptation field without flags, ``adaptation`` its content."""
    field = b""
    if stuffing is not None:
        field = bytes([stuffing]) + (b"\0" + b"\xff" * (stuffing - 1) if stuffing else b"")
    elif adaptation is not None:
        field = bytes([len(adaptation)]) + adaptation
    head = bytes([0x47, flags | pid >> 8, pid & 255, (0x30 if field else 0x10) | counter & 15])
    return (head + field).ljust(188, b"\x55")


UNIT = [packet(14, flags=BEGINS), packet(15, pid=OTHER), packet(15), packet(0, stuffing=40)]
CLOCK = bytes([0x10]) + bytes(6)  # a program clock reference, which is no stuffing


@pytest.mark.parametrize(
    ("following", "clean"),
    [
        ([packet(1, flags=BEGINS)], None),
        ([packet(7, pid=OTHER), packet(1, flags=BEGINS)], None),
        ([packet(9, flags=BEGINS)], True),
        ([packet(0, flags=BEGINS)], True),  # FFmpeg takes no packet for a repetition
        ([packet(9)], False),
        ([packet(1, flags=BEGINS | DAMAGED)], False),
        ([packet(9, adaptation=b"\x80")], None),  # an intended discontinuity
        ([packet(1, flags=BEGINS), packet(9, flags=BEGINS)], False),  # the end of the unit is missing
        ([packet(1, flags=BEGINS, adaptation=CLOCK), packet(9, flags=BEGINS)], False),
        ([packet(1, flags=BEGINS, adaptation=CLOCK + b"\xff"), packet(9, flags=BEGINS)], True),
        ([packet(1, flags=BEGINS, stuffing=0), packet(9, flags=BEGINS)], True),
        ([packet(1, flags=BEGINS, adaptation=b"\x02\x01\x00"), packet(9, flags=BEGINS)], False),
    ],
)
@pytest.mark.parametrize("at_once", [1, 3, 65536])
@pytest.mark.parametrize(("size", "start"), [(188, 0), (192, 4), (204, 0)])
def test_a_break_is_a_join_or_a_loss(tmp_path, monkeypatch, following, clean, at_once, size, start):
    monkeypatch.setattr(transport_stream, "_PACKETS_AT_ONCE", at_once)
    packets = [*UNIT, *following, *[packet(0, pid=OTHER)] * 3]
    data = b"".join(one.rjust(188 + start, b"\0").ljust(size, b"\0") for one in packets)
    (tmp_path / "a.ts").write_bytes(data)
    descriptor = os.open(tmp_path / "a.ts", os.O_RDONLY)
    try:
        found = counter_breaks(descriptor, PID)
    finally:
        os.close(descriptor)
    place = (len(UNIT) + len(following) - 1) * size + start
    assert found == ([] if clean is None else [CounterBreak(place, clean)])


def test_bytes_between_packets_are_a_loss(tmp_path):
    (tmp_path / "a.ts").write_bytes(b"".join([*UNIT, *UNIT]) + b"\0" + b"".join(UNIT))
    with (tmp_path / "a.ts").open("rb") as file:
        assert not counter_breaks(file.fileno(), PID)[-1].clean
