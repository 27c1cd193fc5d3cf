from fractions import Fraction

import pytest
import torch

from wan_data.video.buckets import Size
from wan_data.video.decode import probe, read_windows
from wan_data.video.source_file import Rejected
from wan_data.video.windows import Window

FPS = Fraction(16)


SIZE = Size(48, 64)


def read(path, windows, size=SIZE, fps=FPS, center_crop=True):
    return list(read_windows(path, windows, size, fps=fps, resize_mode="bilinear", center_crop=center_crop))


def test_frames_arrive_whole_and_in_order(clip, tmp_path):
    path = clip(tmp_path / "a.mkv", range(10, 23))
    assert probe(path, FPS).frames == 13
    first, second = read(path, [Window(0, 5), Window(5, 10)])
    assert first[:, 0, 0, 0].tolist() == [10, 11, 12, 13, 14]
    assert second[:, -1, -1, 2].tolist() == [15, 16, 17, 18, 19]


@pytest.mark.parametrize(("rotation", "white"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (-90, (0, 1))])
def test_display_matrix_is_applied(clip, tmp_path, rotation, white):
    path = clip(tmp_path / "a.mov", [20] * 5, size=(32, 64), rotation=rotation, mark=True)
    info = probe(path, FPS)
    assert (info.height, info.width) == ((64, 32) if rotation % 180 else (32, 64))
    size = Size(int(info.height), int(info.width))
    (frames,) = read(path, [Window(0, 5)], size)
    corners = frames[0, [0, -1]][:, [0, -1], 0]
    # Turned counter-clockwise by a quarter, what was above left is below left.
    expected = torch.full((2, 2), 20, dtype=torch.uint8)
    expected[white] = 255
    assert torch.equal(corners, expected)


def test_variable_frame_rate_follows_presentation_time(clip, tmp_path):
    # 0 s, then a frame held for half a second, then four in a burst.
    path = clip(tmp_path / "a.mkv", [1, 2, 3, 4, 5, 6], times=[0, 100, 600, 610, 620, 700])
    fps = Fraction(10)
    assert probe(path, fps).frames == 8
    (frames,) = read(path, [Window(0, 8)], fps=fps)
    assert frames[:, 0, 0, 0].tolist() == [1, 2, 2, 2, 2, 2, 3, 6]


def test_center_crop_keeps_the_middle_and_stretch_keeps_all(clip, tmp_path):
    path = clip(tmp_path / "a.mkv", [0], size=(32, 64), mark=True)
    cropped = read(path, [Window(0, 1)], Size(32, 32))[0][0, 4, :, 0]
    stretched = read(path, [Window(0, 1)], Size(32, 32), center_crop=False)[0][0, 4, :, 0]
    assert (cropped > 128).sum() == 16
    assert (stretched > 128).sum() == 16
    assert cropped[:16].min() == 255
    square = clip(tmp_path / "b.mkv", [0], size=(64, 64), mark=True)
    assert read(square, [Window(0, 1)], Size(32, 64))[0].shape == (1, 32, 64, 3)


def test_pixels_that_are_not_square_count_as_displayed(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("qtrle", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "rgb24"
        stream.sample_aspect_ratio = Fraction(2)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(32, 32, "rgb24")))
        container.mux(stream.encode())
    info = probe(tmp_path / "a.mov", FPS)
    assert (info.height, info.width) == (32, 64)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", r"it is empty \(0 bytes\)"), (b"not a video at all" * 100, "cannot be decoded")]
)
def test_what_is_no_video_is_rejected(tmp_path, content, said):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(Rejected, match=said):
        probe(path, FPS)


def test_a_cut_file_is_rejected(tmp_path):
    import av
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "whole.mp4"), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert probe(tmp_path / "whole.mp4", FPS).source_frames == 40
    # The index stands in front, so the cut file opens and promises frames that are gone.
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Rejected, match=r"only .* of the 40 frames|damaged|cannot be decoded"):
        probe(tmp_path / "cut.mp4", FPS)


def test_an_image_is_one_frame(tmp_path):
    import av
    import numpy as np

    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :, 1] = 200
    with av.open(str(tmp_path / "a.png"), "w", format="image2") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 40, 60, "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    info = probe(tmp_path / "a.png", FPS)
    assert (info.frames, info.height, info.width) == (1, 40, 60)
    (frames,) = read(tmp_path / "a.png", [Window(0, 1)], Size(32, 48))
    assert frames[0, 16, 24].tolist() == [0, 200, 0]
