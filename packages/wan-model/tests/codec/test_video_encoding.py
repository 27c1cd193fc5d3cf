"""What an independent reader finds in encoded files; how wan-infer writes and reads them is for its own tests."""

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wan_model.codec.video_encoding import encode_mp4_beside, encode_png, to_frames


def colours() -> np.ndarray:
    """Five frames [T, H, W, 3] of a colour each."""
    return np.stack([np.full((32, 48, 3), colour, np.uint8) for colour in ((200, 30, 30), *[(20, 40, 220)] * 4)])


@pytest.mark.parametrize("fps", [8, 16])
def test_an_mp4_has_the_frames_the_rate_and_the_metadata(fps: int, tmp_path: Path) -> None:
    path, frames = tmp_path / "video.mp4", colours()
    with path.open("wb") as file:
        encode_mp4_beside(file, iter([frames[:1], frames[1:]]), fps, {"seed": 3})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == fps
        assert json.loads(container.metadata["comment"]) == {"seed": 3}
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert found.shape == frames.shape
    assert abs(found.astype(int) - frames).max() <= 6


def test_a_png_is_exact() -> None:
    frame = colours()[0]
    with Image.open(io.BytesIO(encode_png(frame, {"seed": 3}))) as picture:
        assert np.array_equal(np.asarray(picture), frame)
        assert json.loads(picture.info["wan-infer"]) == {"seed": 3}


def test_extremes_become_black_and_white() -> None:
    video = torch.tensor([-1.0, 1.0, 0.0, -7.0, 7.0]).reshape(1, 5, 1, 1).expand(3, 5, 1, 1)
    assert to_frames(video)[:, 0, 0, 0].tolist() == [0, 255, 128, 0, 255]
