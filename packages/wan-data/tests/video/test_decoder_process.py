import os
import signal
import time
from fractions import Fraction

import pytest

from wan_data.video.buckets import Size
from wan_data.video.decode import Rejected, probe, read_windows
from wan_data.video.decoder_process import Decoder, Job
from wan_data.video.limits import Caps
from wan_data.video.windows import Window

FPS = Fraction(16)
CAPS = Caps(1000, 10**6, 10**7)
SIZE = Size(32, 48)


@pytest.fixture
def decoder():
    with Decoder() as decoder:
        yield decoder


def windows_of(path, *windows):
    return Job(path, FPS, CAPS, tuple(Window(*pair) for pair in windows), SIZE, "bilinear", True)


def test_answers_are_those_of_this_process(decoder, clip, tmp_path):
    first = clip(tmp_path / "a b.ü.mkv", range(20))
    second = clip(tmp_path / "b.mkv", range(50, 60))
    jobs = [Job(first, FPS, CAPS), windows_of(first, (0, 9), (11, 16)), Job(second, FPS, CAPS)]
    answers = list(decoder.decode(jobs))
    assert [job for job, _ in answers] == [jobs[0], jobs[1], jobs[1], jobs[2]]
    assert answers[0][1] == probe(first, FPS)
    assert answers[3][1] == probe(second, FPS)
    wanted = list(read_windows(first, jobs[1].windows, SIZE, fps=FPS, resize_mode="bilinear", center_crop=True))
    assert all(got.equal(want) for (_, got), want in zip(answers[1:3], wanted, strict=True))


def test_a_rejection_is_an_answer_and_the_next_job_goes_on(decoder, clip, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    good = clip(tmp_path / "a.mkv", range(5))
    broken, whole = decoder.decode([Job(tmp_path / "broken.mp4", FPS, CAPS), windows_of(good, (0, 5))])
    assert "cannot be decoded" in str(broken[1])
    assert whole[1].shape == (5, 32, 48, 3)
    ((_, absent),) = decoder.decode([Job(tmp_path / "absent.mp4", FPS, CAPS)])
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
    assert all(str(result) == "the decoder died of it (SIGSEGV)" for result in died)
    if not isinstance(rest[1], Rejected):
        assert rest[1][:, 0, 0, 0].tolist() == [20, 21, 22, 23, 24]


def test_a_decoder_that_dies_at_once_is_named(clip, tmp_path, monkeypatch):
    # The child's address space ends where its libraries do.
    path = clip(tmp_path / "a.mkv", range(5), size=(1024, 1024))
    with Decoder(memory=1) as decoder:
        ((_, result),) = decoder.decode([Job(path, FPS, Caps(1000, 10**7, 10**9))])
    assert isinstance(result, Rejected)
    assert any(words in str(result) for words in ("memory", "the decoder died", "cannot be decoded"))


def test_a_decoder_that_stands_still_is_ended(clip, tmp_path):
    path = clip(tmp_path / "a.mkv", range(5))
    with Decoder(standstill=20) as still:
        ((_, info),) = still.decode([Job(path, FPS, CAPS)])
        assert info.frames == 5
        still._standstill = 1
        os.kill(still._child.pid, signal.SIGSTOP)
        start = time.monotonic()
        ((_, result),) = still.decode([Job(path, FPS, CAPS)])
        assert str(result) == "its decoding stood still for 1 s and was ended"
        assert time.monotonic() - start < 20
        still._standstill = 20
        ((_, info),) = still.decode([Job(path, FPS, CAPS)])
        assert info.frames == 5


def test_leaving_early_leaves_no_answers_behind(decoder, clip, tmp_path):
    first, second = clip(tmp_path / "a.mkv", range(20)), clip(tmp_path / "b.mkv", range(100, 110))
    answers = decoder.decode([windows_of(first, (0, 5), (5, 10), (10, 15)), windows_of(first, (0, 5))])
    next(answers)
    answers.close()
    ((_, frames),) = decoder.decode([windows_of(second, (0, 9))])
    assert frames[0, 0, 0, 0] == 100


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        (Caps(frames=9), r"more than the 9 frames .*--max-source-frames"),
        (Caps(pixels=48 * 64 - 1), r"64 x 48 pixels; at most 3071 .*--max-source-pixels"),
        (Caps(bytes=100), r"bytes; at most 100 .*--max-source-bytes"),
    ],
)
def test_caps(clip, tmp_path, caps, message):
    path = clip(tmp_path / "a.mkv", range(10))
    with pytest.raises(Rejected, match=message):
        probe(path, FPS, caps=caps)
    assert probe(path, FPS, caps=Caps(10, 48 * 64, path.stat().st_size)).frames == 10


def test_a_long_job_can_be_lined_up_behind_a_busy_one(decoder, clip, tmp_path):
    # More bytes than the connection holds, sent while the child itself stands sending frames that nobody takes yet.
    path = clip(tmp_path / "a.mkv", range(200), size=(160, 160))
    first = Job(path, FPS, CAPS, tuple(Window(i, i + 5) for i in range(0, 200, 5)), Size(160, 160), "bilinear", True)
    decoder.begin(first)
    decoder.begin(windows_of(path, *((i, i + 1) for i in range(50_000))))
    assert sum(1 for _ in decoder.results()) == 40
    last = list(decoder.results())
    assert len(last) == 201
    assert "it had 201 frames when it was examined" in str(last[-1])
