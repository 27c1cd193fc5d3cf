"""Only the bytes of the file itself are read, whatever its name or content names."""

import os
import socket
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from media_files import picture, write_image, write_video
from PIL import Image

from wan_data.video.decode import probe
from wan_data.video.display.options import DisplayOptions
from wan_data.video.images import read_image
from wan_data.video.limits import Limits
from wan_data.video.source_file import Rejected, open_source

FPS = Fraction(16)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder: FFmpeg takes relative names for URLs."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "other.mp4", "mpeg4", frames=12)
    return tmp_path


@pytest.fixture
def visits():
    """A server on this machine, and the connections that were made to it."""
    found = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)

        def accept():
            try:
                while True:
                    server.accept()[0].close()
                    found.append(1)
            except OSError:
                pass

        thread = threading.Thread(target=accept)
        thread.start()
        yield server.getsockname()[1], found
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "name",
    [
        "12:30.mp4",
        "concat:other.mp4",
        "file:other.mp4",
        "http:a.mp4",
        "pipe:0.mp4",
        "data:video.mp4",
        "subfile,,start,0,end,0,,:other.mp4",
        "crypto:other.mp4",
        "%d.mp4",
        "a%03d.mp4",
        "*.mp4",
        "-i.mp4",
        "async:cache:other.mp4",
        "con\ncat.mp4",
    ],
)
def test_a_name_is_a_name(here, name):
    write_video(here / "five.mp4", "mpeg4", frames=5)
    (here / "five.mp4").rename(here / name)
    assert probe(Path(name), FPS).source_frames == 5


def test_a_name_makes_no_request(here, visits):
    port, found = visits
    folder = here / "http:" / f"127.0.0.1:{port}"
    folder.mkdir(parents=True)
    write_video(here / "five.mp4", "mpeg4", frames=5)
    (here / "five.mp4").rename(folder / "x.mp4")
    assert probe(Path(f"http:/127.0.0.1:{port}/x.mp4"), FPS).source_frames == 5
    assert not found


def test_a_folder_of_a_protocol_is_a_folder(here):
    (here / "file:").mkdir()
    write_video(here / "five.mp4", "mpeg4", frames=5)
    (here / "five.mp4").rename(here / "file:" / "other.mp4")
    assert probe(Path("file:/other.mp4"), FPS).source_frames == 5


@pytest.mark.parametrize("name", ["%d.png", "0%d.png", "*.png"])
def test_a_pattern_of_pictures_is_one_picture(here, name):
    write_image(here / "0.png", "PNG", image=Image.new("RGB", (16, 16), (1, 2, 3)))
    write_image(here / "00.png", "PNG", image=Image.new("RGB", (16, 16), (1, 2, 3)))
    write_image(here / "a.png", "PNG").rename(here / name)
    with open_source(Path(name), Limits()) as file:
        assert (read_image(file, Limits(), DisplayOptions()).rgb() == picture(0)).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ffconcat version 1.0\nfile other.mp4\n", "a list of files"),
        ("\ufeffffconcat version 1.0\nfile other.mp4\n", "a list of files"),
        ("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n", "a playlist"),
        ("[playlist]\nFile1=other.mp4\n", "a playlist"),
        ("[Reference]\nRef1=http://127.0.0.1/\n", "a playlist"),
        ("<ASX version='3'><entry><ref href='other.mp4'/></entry></ASX>", "a playlist"),
        (
            "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
            "a ses",
        ),
        ("<?xml version='1.0'?><MPD><Period/></MPD>", "an XML text"),
        ("<MPD profiles='urn:mpeg:dash:profile:isoff-live:2011'/>", "a manifest"),
        ("# concat\nfile 'other.mp4'\n", "cannot be decoded"),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "ts", "mkv"])
def test_lists_of_other_files_are_refused_by_name(here, content, message, suffix):
    path = here / f"a.{suffix}"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(Rejected, match=message):
        probe(path, FPS)


@pytest.mark.parametrize(("name", "content"), [("a.mp4", "png"), ("b.mkv", "wav"), ("c.ts", "rawvideo")])
def test_content_of_another_kind_is_refused(here, name, content):
    path = here / name
    if content == "png":
        write_image(path, "PNG")
    elif content == "wav":
        path.write_bytes(
            b"RIFF\x24\x10\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\0\x10\0\0" + bytes(4096)
        )
    else:
        path.write_bytes(b"YUV4MPEG2 W16 H16 F16:1 Ip A1:1 C420jpeg\n" + (b"FRAME\n" + bytes(384)) * 5)
    with pytest.raises(Rejected, match="of no container that is read"):
        probe(path, FPS)


def test_a_movie_whose_data_are_in_another_file_is_refused(here):
    data = (here / "other.mp4").read_bytes()
    place = data.index(b"url ") + 4
    assert data[place : place + 4] == b"\0\0\0\1"  # "in this file"
    outside = data[:place] + b"\0\0\0\0" + data[place + 4 :]
    moov = data.index(b"moov") - 4
    (here / "a.mp4").write_bytes(outside[:32] + bytes(moov - 32) + outside[moov:])
    with pytest.raises(Rejected):
        probe(here / "a.mp4", FPS)


def test_what_is_no_regular_file_is_refused_at_once(here):
    os.mkfifo(here / "a.mp4")
    (here / "b.mp4").symlink_to("/dev/zero")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(Rejected, match="no regular file"):
            probe(here / name, FPS)
    os.mkfifo(here / "a.png")
    with pytest.raises(Rejected, match="no regular file"):
        probe(here / "a.png", FPS)
