import ctypes
import io
import itertools
import json
import os
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wan_infer.output.contact_sheet import draw_contact_sheet, save_contact_sheet
from wan_infer.output.output_names import check_writable, output_file, output_name
from wan_infer.output.video_file import read_video, save_video, write_video
from wan_model.codec import video_encoding
from wan_model.codec.video_encoding import to_frames
from wan_model.testing.permissions import permissions_apply


def waves(frames: int = 9, height: int = 48, width: int = 64, end: float = 3.0) -> torch.Tensor:
    """A smooth colour video in [-1, 1], [3, T, H, W]; the phase runs from 0 to ``end`` in each direction."""
    t, y, x = (torch.linspace(0, end, size) for size in (frames, height, width))
    phase = t[:, None, None] + y[:, None] + x
    return torch.stack([phase.sin(), (phase * 0.7).cos(), (phase * 0.5 + 1).sin()])


def test_mp4_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "waves.mp4"
    save_video(waves(), path, fps=12, metadata={"prompt": '兔子 "quoted"\nline', "seed": 3})
    frames, fps, metadata = read_video(path)
    assert frames.shape == (9, 48, 64, 3)
    assert fps == 12
    assert metadata == {"prompt": '兔子 "quoted"\nline', "seed": 3}
    error = frames.astype(float) - to_frames(waves())
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 40
    assert abs(error.mean(axis=(0, 1, 2))).max() < 1, "a colour is off everywhere: the wrong matrix or range"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt, codec.colorspace, codec.color_range) == ("h264", "yuv420p", 1, 1)
    assert [file.name for file in path.parent.iterdir()] == ["waves.mp4"]


_M_PERTURB = -6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_equal_frames_give_equal_bytes_whatever_was_in_memory(tmp_path: Path) -> None:
    # x264's defaults read memory that nothing has written to; glibc can be told what that holds.
    noise = torch.randn(3, 9, 112, 160, generator=torch.Generator().manual_seed(0))
    video, contents = waves(9, 112, 160, end=10.0) * 0.7 + 0.1 * noise, set()
    try:
        for byte in (0x00, 0x55, 0xAA, 0xFF):
            ctypes.CDLL(None).mallopt(_M_PERTURB, byte)
            save_video(video, tmp_path / "video.mp4", metadata={"seed": 1})
            contents.add((tmp_path / "video.mp4").read_bytes())
    finally:
        ctypes.CDLL(None).mallopt(_M_PERTURB, 0)
    assert len(contents) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="chooses processors as Linux does")
def test_equal_frames_give_equal_bytes_on_any_number_of_processors(tmp_path: Path) -> None:
    available = os.sched_getaffinity(0)
    try:
        for name, processors in (("all", available), ("one", {min(available)})):
            os.sched_setaffinity(0, processors)
            save_video(waves(9, 112, 160), tmp_path / f"{name}.mp4")
    finally:
        os.sched_setaffinity(0, available)
    assert (tmp_path / "all.mp4").read_bytes() == (tmp_path / "one.mp4").read_bytes()


def test_png_reads_back(tmp_path: Path) -> None:
    save_video(waves(1), tmp_path / "wave.png", metadata={"prompt": "兔子"})
    with Image.open(tmp_path / "wave.png") as picture:
        assert np.array_equal(np.asarray(picture), to_frames(waves(1))[0])
        assert json.loads(picture.info["wan-infer"]) == {"prompt": "兔子"}
    frames, fps, metadata = read_video(tmp_path / "wave.png")
    assert np.array_equal(frames, to_frames(waves(1)))
    assert (fps, metadata) == (0, {"prompt": "兔子"})


def test_endings_must_say_what_is_inside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"9 frames are saved as a video, so the name must end in \.mp4"):
        save_video(waves(), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"one frame is saved as a picture, so the name must end in \.png"):
        save_video(waves(1), tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def _save_mp4(path: Path) -> None:
    save_video(waves(), path.with_suffix(".mp4"))


def _save_png(path: Path) -> None:
    save_video(waves(1), path.with_suffix(".png"))


def _save_sheet(path: Path) -> None:
    save_contact_sheet([to_frames(waves())], path.with_suffix(".png"))


@pytest.mark.parametrize("save", [_save_mp4, _save_png, _save_sheet])
def test_a_file_is_on_the_disk_before_it_gets_its_name(
    save: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}  # size at the last fsync, by inode
    renamed: list[Path] = []
    fsync, rename = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size

    def checking_replace(source: Path, target: Path) -> None:
        status = Path(source).stat()
        assert synced.get(status.st_ino) == status.st_size, "renamed before all of it was flushed"
        rename(source, target)
        synced.pop(tmp_path.stat().st_ino, None)
        renamed.append(Path(target))

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", checking_replace)
    save(tmp_path / "out")
    assert renamed == list(tmp_path.iterdir())
    assert tmp_path.stat().st_ino in synced, "the folder was not flushed after the rename"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        refused = pytest.raises(ValueError, match=r"cannot write .*file: File too large \(errno 27\)")
        with refused, output_file(path) as file:
            file.write(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_while_a_video_comes_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "waves.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), dtype=np.uint8)
    drawn = 0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal drawn
        for start in range(0, 40, 4):
            drawn = start + 4
            yield noise[start : start + 4]

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot write .*waves\.mp4: .*\(errno 27\)"):
            write_video(pieces(), 40, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    write_video(pieces(), 40, path)
    assert drawn == 40
    assert len(read_video(path)[0]) == 40


def test_frames_are_encoded_while_the_next_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second_came = threading.Event()
    encode = video_encoding.encode_mp4

    def wait_and_encode(file: IO[bytes], pieces: Iterator[np.ndarray], *rest: Any) -> None:
        first = next(pieces)
        assert second_came.wait(60), "the next frames wait for the encoder"
        encode(file, itertools.chain([first], pieces), *rest)

    def pieces() -> Iterator[np.ndarray]:
        yield np.zeros((1, 32, 32, 3), np.uint8)
        second_came.set()
        yield np.zeros((4, 32, 32, 3), np.uint8)

    monkeypatch.setattr(video_encoding, "encode_mp4", wait_and_encode)
    write_video(pieces(), 5, tmp_path / "a.mp4")
    assert len(read_video(tmp_path / "a.mp4")[0]) == 5


def test_only_a_few_frames_wait_for_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead: list[int] = []
    drawn = 0

    def encode(file: IO[bytes], pieces: Iterator[np.ndarray], *rest: Any) -> None:
        for taken, _ in enumerate(pieces, start=1):
            ahead.append(drawn - taken)

    def pieces() -> Iterator[np.ndarray]:
        nonlocal drawn
        for _ in range(50):
            drawn += 1
            yield np.zeros((4, 32, 32, 3), np.uint8)

    monkeypatch.setattr(video_encoding, "encode_mp4", encode)
    write_video(pieces(), 200, tmp_path / "a.mp4")
    assert len(ahead) == 50
    assert max(ahead) <= 4


def test_frames_that_cannot_be_computed_leave_no_file_and_no_thread(tmp_path: Path) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield np.zeros((4, 32, 32, 3), np.uint8)
        raise RuntimeError("out of memory")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        write_video(pieces(), 8, tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before


def test_places_that_cannot_be_written_are_named_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "deeper" / "a.mp4")
    with pytest.raises(ValueError, match="it is a folder"):
        check_writable(tmp_path / "folder.mp4")
    check_writable(tmp_path / "new" / "newer" / "a.mp4")
    assert not (tmp_path / "new").exists()
    (tmp_path / "folder.mp4").chmod(0o555)
    with (
        permissions_apply(),
        pytest.raises(ValueError, match=r"cannot write .*a\.mp4: .*folder\.mp4 may not be written"),
    ):
        check_writable(tmp_path / "folder.mp4" / "new" / "a.mp4")


@pytest.mark.parametrize("prompt", ["../../etc/passwd", "a/b", "\0", "兔子", "x" * 5000, "$(reboot)", "\ud800"])
def test_names_owe_nothing_to_the_prompt(prompt: str) -> None:
    assert re.fullmatch(r"0007-[0-9a-f]{12}\.mp4", output_name(7, {"prompt": prompt}, 9))


def test_names_tell_videos_apart() -> None:
    names = {output_name(0, {"prompt": prompt, "seed": seed}, 9) for prompt in "ab" for seed in (1, 2)}
    assert len(names) == 4


def test_reading_what_is_no_video_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    save_video(waves(1), tmp_path / "cut.png")
    os.truncate(tmp_path / "cut.png", 100)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(ValueError, match=r"pipe\.mp4 as a video: .*is a named pipe; expected a file"):
        read_video(tmp_path / "pipe.mp4")
    for name in ("a.mp4", "absent.mp4", "cut.png"):
        with pytest.raises(ValueError, match=f"cannot read .*{name} as a video"):
            read_video(tmp_path / name)


LISTS = {
    "a.mp4": "ffconcat version 1.0\nfile other.ts\n",
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_other_files_that_a_file_names_are_not_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with av.open("other.ts", "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25, width=64, height=48)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(64, 48, "yuv420p")))
        container.mux(stream.encode(None))
    Path(name).write_text(LISTS[name])
    with av.open(name, "r") as container:
        assert next(container.decode(video=0)).width == 64, "FFmpeg does not follow it, so the test shows nothing"
    with pytest.raises(ValueError, match=f"cannot read {name} as a video: Invalid data"):
        read_video(name)


def test_contact_sheet_shows_first_and_last_frames(tmp_path: Path) -> None:
    video = np.zeros((30, 20, 10, 3), np.uint8)
    video[0], video[-1] = 50, 200
    tall = np.full((2, 640, 320, 3), 99, np.uint8)
    sheet = draw_contact_sheet([video, tall], columns=3, most=6)
    # Rows of three frames of 10x20, two of them, then one of two frames scaled from 320x640 to 160x320.
    assert sheet.shape == (4 + 2 * 24 + 324, 4 + 2 * 164, 3)
    assert sheet[4 + 5, 4 + 5].tolist() == [50] * 3
    assert sheet[28 + 5, 4 + 2 * 14 + 5].tolist() == [200] * 3
    assert sheet[52 + 160, 4 + 80].tolist() == [99] * 3
    save_contact_sheet([video], tmp_path / "sheet.png")
    assert Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())).size == (4 + 4 * 14, 4 + 3 * 24)
    with pytest.raises(ValueError, match="nothing to show"):
        draw_contact_sheet([])
