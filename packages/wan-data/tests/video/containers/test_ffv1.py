"""The checksums of FFV1's slices, beside those that FFmpeg's encoder writes and a CRC bit by bit."""

import av
import numpy as np
import pytest
from media_files import HEIGHT, WIDTH, write_video

from wan_data.video.containers.ffv1 import SliceChecksums, _crc_is_zero

IMAGES = np.random.default_rng(0).integers(64, 192, (3, HEIGHT, WIDTH, 3)).astype(np.uint8)


def packets(path, **options):
    write_video(path, "ffv1", stored="yuv444p", images=IMAGES, options=options)
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def crc(data):
    value = 0
    for byte in data:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 1 << 31 else value << 1) & 0xFFFFFFFF
    return value


def test_the_crc_is_that_of_the_polynomial():
    data = np.random.default_rng(1).integers(0, 256, 50).astype(np.uint8).tobytes()
    assert crc(data) != 0
    assert not _crc_is_zero(data)
    assert _crc_is_zero(data + crc(data).to_bytes(4, "big"))


@pytest.mark.parametrize("slices", ["4", "9"])
def test_every_changed_byte_is_found(tmp_path, slices):
    first, second, third = packets(tmp_path / "a.mkv", level="3", slicecrc="1", slices=slices)
    rng = np.random.default_rng(2)
    for place in [*range(40), *rng.integers(0, len(second), 200), *range(len(second) - 40, len(second))]:
        checksums = SliceChecksums()
        assert checksums.are_right(first)
        damaged = bytearray(second)
        damaged[place] ^= int(rng.integers(1, 256))
        assert not checksums.are_right(bytes(damaged)), place
        assert checksums.are_right(third)
    checksums = SliceChecksums()
    assert checksums.are_right(first)
    assert not checksums.are_right(bytes(len(second)))
    assert not checksums.are_right(second[:-1])


@pytest.mark.parametrize("options", [{"level": "3", "slicecrc": "0"}, {"level": "1"}, {"level": "0"}])
def test_a_stream_without_checksums_is_not_refused(tmp_path, options):
    checksums = SliceChecksums()
    assert all(checksums.are_right(packet) for packet in packets(tmp_path / "a.mkv", **options))
