"""A file that is cut off is refused, also where FFmpeg takes the cut for its end."""

import os
import re
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from wan_data.video.containers.truncation import missing_end
from wan_data.video.decode import probe
from wan_data.video.source_file import Rejected

FILES = {
    "a.mkv": ("libx264", "matroska", {}),
    "a.webm": ("libvpx-vp9", "webm", {}),
    "live.mkv": ("libx264", "matroska", {"live": "1"}),
    "a.ogv": ("libvpx", "ogg", {}),
    "a.gif": ("gif", "gif", {}),
    "a.mp4": ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov+default_base_moof"}),
}
FRAMES = 12


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    for name, (codec, form, options) in FILES.items():
        with av.open(str(folder / name), "w", format=form, options=options) as container:
            stream = container.add_stream(codec, rate=16, options={"g": "4"} if form == "mp4" else {})
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            noise = np.random.default_rng(0)
            for _ in range(FRAMES):
                picture = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return folder


def ends(path, demuxer, size=None):
    descriptor = os.open(path, os.O_RDWR)
    try:
        if size is not None:
            os.ftruncate(descriptor, size)
        return missing_end(demuxer, descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_read_and_cut_ones_refused(name, files, tmp_path):
    path = files / name
    assert probe(path, Fraction(16)).frames == FRAMES
    size = path.stat().st_size
    for left in (size // 2, size * 9 // 10, size - 1):
        cut = tmp_path / name
        cut.write_bytes(path.read_bytes()[:left])
        with pytest.raises(Rejected):
            probe(cut, Fraction(16))


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("live.mkv", "a.mp4")])
def test_every_cut_behind_the_header_is_seen(name, files, tmp_path):
    demuxer = {"webm": "matroska", "mkv": "matroska", "ogv": "ogg", "gif": "gif"}[name.partition(".")[2]]
    content = (files / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content)
    assert ends(path, demuxer) is None
    step = 11 if demuxer == "gif" else 1  # whose blocks are read one after another
    unseen = [size for size in range(len(content) - 1, 200, -step) if ends(path, demuxer, size) is None]
    assert unseen == []


def test_every_cut_inside_a_fragment_is_seen(files, tmp_path):
    """A cut between two fragments is an end like another."""
    content = (files / "a.mp4").read_bytes()
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    assert ends(path, "mov") is None
    places = [match.start() - 4 for match in re.finditer(b"moof", content)]
    assert len(places) >= 3
    boundaries = {*places[1:], content.index(b"mfra") - 4}
    unseen = {size for size in range(len(content) - 1, places[0] + 8, -1) if ends(path, "mov", size) is None}
    assert boundaries <= unseen
    assert unseen <= {place + zeros for place in boundaries for zeros in range(4)}, "the first bytes of a size"
    path.write_bytes(content + bytes(5))
    assert ends(path, "mov") is None
    path.write_bytes(content + b"a signature of somebody else")
    assert ends(path, "mov") is None


def test_a_live_recording_tells_what_its_last_part_lacks(files, tmp_path):
    # The size of the whole is unknown: a cut between two clusters is an end like another.
    content = (files / "live.mkv").read_bytes()
    path = tmp_path / "live.mkv"
    path.write_bytes(content)
    assert ends(path, "matroska") is None
    assert ends(path, "matroska", len(content) - 1) == "its last 1 bytes are missing"


@pytest.mark.parametrize("demuxer", ["matroska", "ogg", "gif"])
def test_other_content_is_left_to_the_decoder(demuxer, tmp_path):
    path = tmp_path / "noise"
    for seed in range(50):
        path.write_bytes(np.random.default_rng(seed).bytes(2000))
        missing = ends(path, demuxer)
        assert missing is None or isinstance(missing, str)


def test_joined_ogg_files_are_complete(files, tmp_path):
    path = tmp_path / "joined.ogv"
    path.write_bytes((files / "a.ogv").read_bytes() * 2)
    assert ends(path, "ogg") is None


def test_a_gif_may_have_bytes_behind_its_trailer(files, tmp_path):
    path = tmp_path / "a.gif"
    path.write_bytes((files / "a.gif").read_bytes() + b"\0\0made by a program")
    assert ends(path, "gif") is None


def test_a_recording_may_have_something_else_behind_it(files, tmp_path):
    path = tmp_path / "live.mkv"
    path.write_bytes((files / "live.mkv").read_bytes() + b"TAG" + b"made by a program" * 9)
    assert ends(path, "matroska") is None


def test_a_declared_stream_of_ogg_without_packets_needs_no_end(files, tmp_path):
    def page(serial, flags, position, number, content):
        head = struct.pack("<4sBBqIII", b"OggS", 0, flags, position, serial, number, 0)
        return head + bytes([1, len(content)]) + content

    path = tmp_path / "a.ogv"
    headers = page(9, 2, 0, 0, b"OpusHead") + page(9, 0, 0, 1, b"OpusTags")
    path.write_bytes(headers + (files / "a.ogv").read_bytes())
    assert ends(path, "ogg") is None
    path.write_bytes(headers + page(9, 0, 960, 2, b"sound") + (files / "a.ogv").read_bytes())
    assert ends(path, "ogg") == "its end is missing: a stream in it has no last page"


@pytest.mark.parametrize("demuxer", ["gif", "matroska"])
def test_endless_empty_blocks_are_left_to_the_decoder(demuxer, files, tmp_path):
    name, empty = {"gif": ("a.gif", b"\0"), "matroska": ("live.mkv", b"\xec\x80")}[demuxer]
    content = (files / name).read_bytes()
    path = tmp_path / name
    path.write_bytes((content[:-1] if demuxer == "gif" else content) + empty * 3_000_000)
    assert ends(path, demuxer) is None
