"""Frames of files as the package reads them."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from wan_data.video.decode import _Source
from wan_data.video.display.options import DisplayOptions
from wan_data.video.limits import Limits


def decoded_frames(path: Path, fps: int = 16) -> list[np.ndarray]:
    """The frames at a rate; one that is repeated is the same object."""
    last, pixels, out = None, None, []
    for picture in _Source(path, Limits(), DisplayOptions(), lambda _: None).resampled(Fraction(fps)):
        if picture is not last or pixels is None:
            last, pixels = picture, picture.rgb()
        out.append(pixels)
    return out


@pytest.fixture(scope="session")
def decoded() -> Callable[..., list[np.ndarray]]:
    return decoded_frames
