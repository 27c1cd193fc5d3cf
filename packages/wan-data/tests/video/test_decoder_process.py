import os
import signal
import socket
import subprocess
import sys
from fractions import Fraction

import pytest
from media_files import write_image
from PIL import Image
from reused_decoder import ReusedDecoder

from wan_data.video.buckets import Size
from wan_data.video.decode import probe, read_windows
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.display.options import DisplayOptions
from wan_data.video.limits import Limits
from wan_data.video.source_file import Rejected
from wan_data.video.windows import Window

FPS = Fraction(16)
LIMITS = Limits(1000, 10**6, 10**7)
SIZE = Size(32, 48)


@pytest.fixture
def decoder():
    # Its process is one that another test has left idle, if there is one: starting a process takes seconds.
    with ReusedDecoder() as decoder:
        yield decoder


def windows_of(path, *windows):
    return Job(path, FPS, LIMITS, tuple(Window(*pair) for pair in windows), SIZE, "bilinear", True)


def test_answers_are_those_of_this_process(decoder, clip, tmp_path):
    first = clip(tmp_path / "a b.ü.mkv", range(20))
    second = clip(tmp_path / "b.mkv", range(50, 60))
    jobs = [Job(first, FPS, LIMITS), windows_of(first, (0, 9), (11, 16)), Job(second, FPS, LIMITS)]
    answers = list(decoder.decode(jobs))
    assert [job for job, _ in answers] == [jobs[0], jobs[1], jobs[1], jobs[2]]
    assert answers[0][1] == probe(first, FPS)
    assert answers[3][1] == probe(second, FPS)
    wanted = list(read_windows(first, jobs[1].windows, SIZE, fps=FPS, resize_mode="bilinear", center_crop=True))
    assert all(got.equal(want) for (_, got), want in zip(answers[1:3], wanted, strict=True))


def test_frames_arrive_whole_whatever_timeout_a_library_has_set_for_sockets(clip, tmp_path):
    path = clip(tmp_path / "a.mkv", range(20))
    # More than the buffers of a socket hold. Threads change no bit.
    job = Job(path, FPS, LIMITS, (Window(0, 9), Window(9, 18)), Size(480, 832), "bicubic", True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        with Decoder(threads=3) as decoder:
            answers = [frames for _, frames in decoder.decode([job])]
    finally:
        socket.setdefaulttimeout(before)
    wanted = list(read_windows(path, job.windows, job.size, fps=FPS, resize_mode="bicubic", center_crop=True))
    assert all(got.equal(want) for got, want in zip(answers, wanted, strict=True))


def test_a_job_arrives_whole(decoder, tmp_path):
    path = write_image(tmp_path / "a.png", "PNG", image=Image.new("RGBA", (48, 32)))
    job = Job(
        path,
        FPS,
        Limits(1, 2000, 3000, 4),
        (Window(0, 1),),
        SIZE,
        "nearest",
        False,
        DisplayOptions("#0a0b0c", "tone-map"),
    )
    assert Job.from_json(job.to_json()) == job
    ((_, frames),) = decoder.decode([job])
    assert frames[0, 0, 0].tolist() == [10, 11, 12]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is one of Linux")
def test_a_limit_that_the_system_has_set_is_not_raised(clip, tmp_path):
    """A scheduler's limit of the address space (``ulimit -v``) is below that of a decoder."""
    path = clip(tmp_path / "a.mkv", range(5))
    program = (
        "import resource, sys; from pathlib import Path; from fractions import Fraction\n"
        "resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)\n"
        "from wan_data.video.decoder_process import Decoder, Job; from wan_data.video.limits import Limits\n"
        "with Decoder(memory=1 << 50) as decoder:\n"
        "    ((_, found),) = decoder.decode([Job(Path(sys.argv[1]), Fraction(16), Limits())])\n"
        "print(found.frames)"
    )
    command = [sys.executable, "-c", program, str(path), str(32 << 30)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("5\n", "")


def test_a_rejection_is_an_answer_and_the_next_job_goes_on(decoder, clip, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    good = clip(tmp_path / "a.mkv", range(5))
    broken, whole = decoder.decode([Job(tmp_path / "broken.mp4", FPS, LIMITS), windows_of(good, (0, 5))])
    assert "cannot be decoded" in str(broken[1])
    assert whole[1].shape == (5, 32, 48, 3)
    ((_, absent),) = decoder.decode([Job(tmp_path / "absent.mp4", FPS, LIMITS)])
    assert isinstance(absent, Rejected)


def test_a_decoder_that_dies_costs_one_source(decoder, clip, tmp_path):
    paths = [clip(tmp_path / f"{i}.mkv", range(10 * i, 10 * i + 5)) for i in range(3)]
    answers = decoder.decode([windows_of(path, (0, 5)) for path in paths])
    first = next(answers)[1]
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    os.kill(decoder._child.pid, signal.SIGSEGV)
    decoder._child.wait()
    rest = [result for _, result in answers]
    # What the child had sent before it died may have arrived.
    died = [result for result in rest if isinstance(result, Rejected)]
    assert len(rest) == 2
    assert len(died) <= 1
    assert all(str(result) == "its decoder crashed (SIGSEGV)" for result in died)
    if not isinstance(rest[1], Rejected):
        assert rest[1][:, 0, 0, 0].tolist() == [20, 21, 22, 23, 24]


def test_a_decoder_that_dies_at_once_is_named(clip, tmp_path, monkeypatch):
    # The child's address space ends where its libraries do.
    path = clip(tmp_path / "a.mkv", range(5), size=(1024, 1024))
    with Decoder(memory=1) as decoder:
        ((_, result),) = decoder.decode([Job(path, FPS, Limits(1000, 10**7, 10**9))])
    assert isinstance(result, Rejected)
    assert any(words in str(result) for words in ("memory", "its decoder crashed", "cannot be decoded"))


def test_a_decoder_that_makes_no_progress_is_killed(decoder, clip, tmp_path):
    path = clip(tmp_path / "a.mkv", range(5))
    ((_, info),) = decoder.decode([Job(path, FPS, LIMITS)])
    assert info.frames == 5
    # Stopped, it sends nothing, however fast the machine is.
    os.kill(decoder._child.pid, signal.SIGSTOP)
    decoder._timeout = 0.1
    ((_, result),) = decoder.decode([Job(path, FPS, LIMITS)])
    assert str(result) == "its decoder made no progress for 0.1 s and was killed"
    decoder._timeout = 60
    ((_, info),) = decoder.decode([Job(path, FPS, LIMITS)])
    assert info.frames == 5


def test_a_decoder_that_does_not_start_is_killed(clip, tmp_path):
    with Decoder(start_timeout=0) as decoder:
        ((_, result),) = decoder.decode([Job(clip(tmp_path / "a.mkv", range(5)), FPS, LIMITS)])
    assert str(result) == "its decoder made no progress for 0 s and was killed"


def test_leaving_early_leaves_no_answers_behind(decoder, clip, tmp_path):
    first, second = clip(tmp_path / "a.mkv", range(20)), clip(tmp_path / "b.mkv", range(100, 110))
    answers = decoder.decode([windows_of(first, (0, 5), (5, 10), (10, 15)), windows_of(first, (0, 5))])
    next(answers)
    answers.close()
    ((_, frames),) = decoder.decode([windows_of(second, (0, 9))])
    assert frames[0, 0, 0, 0] == 100


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(frames=9), r"more than the 9 frames .*--max-source-frames"),
        (Limits(pixels=48 * 64 - 1), r"64 x 48 pixels; at most 3071 .*--max-source-pixels"),
        (Limits(bytes=100), r"bytes; at most 100 .*--max-source-bytes"),
    ],
)
def test_limits(clip, tmp_path, limits, message):
    path = clip(tmp_path / "a.mkv", range(10))
    with pytest.raises(Rejected, match=message):
        probe(path, FPS, limits=limits)
    assert probe(path, FPS, limits=Limits(10, 48 * 64, path.stat().st_size)).frames == 10


def test_a_long_job_can_be_lined_up_behind_a_busy_one(decoder, clip, tmp_path):
    # More bytes than the connection holds, sent while the child itself stands sending frames that nobody takes yet.
    path = clip(tmp_path / "a.mkv", range(200), size=(160, 160))
    first = Job(path, FPS, LIMITS, tuple(Window(i, i + 5) for i in range(0, 200, 5)), Size(160, 160), "bilinear", True)
    decoder.submit(first)
    decoder.submit(windows_of(path, *((i, i + 1) for i in range(50_000))))
    assert sum(1 for _ in decoder.results()) == 40
    last = list(decoder.results())
    assert len(last) == 201
    assert "it had 201 frames when it was probed" in str(last[-1])


def test_nothing_of_the_working_folder_is_imported(clip, tmp_path, monkeypatch):
    first = clip(tmp_path / "a.mkv", range(5))
    (tmp_path / "socket.py").write_text("from pathlib import Path\nPath('imported').touch()\nraise SystemExit\n")
    monkeypatch.chdir(tmp_path)
    with Decoder() as decoder:
        ((_, info),) = decoder.decode([Job(first, FPS, LIMITS)])
    assert info == probe(first, FPS)
    assert not (tmp_path / "imported").exists()
