import av
import numpy as np
import pytest

from wan_data.video.display.colours import Colours, over_background, rgb_of_frame
from wan_data.video.display.options import DisplayOptions

SDR = Colours(transfer=1, primaries=1)
# Luma weights of red and blue, by FFmpeg's number of the matrix.
WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593), 2: (0.299, 0.114), 7: (0.212, 0.087)}


def formula(y, u, v, matrix, full, bits):
    """ITU-R BT.601, BT.709 and BT.2020, SMPTE 240M: levels of 255."""
    red, blue = WEIGHTS[matrix]
    scale, peak = 2 ** (bits - 8), 2**bits - 1
    luma = y / peak if full else (y - 16 * scale) / (219 * scale)
    u, v = ((one - 128 * scale) / (peak if full else 224 * scale) for one in (u, v))
    r, b = luma + 2 * (1 - red) * v, luma + 2 * (1 - blue) * u
    return 255 * np.array([r, (luma - red * r - blue * b) / (1 - red - blue), b])


def flat(stored, values, matrix, full):
    frame = av.VideoFrame(32, 16, stored)
    kind = np.uint16 if "p1" in stored else np.uint8
    for plane, value in zip(frame.planes, values, strict=True):
        plane.update(np.full(plane.buffer_size // np.dtype(kind).itemsize, value, kind).tobytes())
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    return frame


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize(
    ("stored", "bits"), [("yuv420p", 8), ("yuv422p", 8), ("yuv444p", 8), ("yuv420p10le", 10), ("yuv444p12le", 12)]
)
def test_colours_are_those_of_the_formula(stored, bits, matrix, full):
    rng, scale, errors = np.random.default_rng(0), 2 ** (bits - 8), []
    while len(errors) < 400:
        values = [int(rng.integers(low * scale, high * scale)) for low, high in ((50, 200), (100, 156), (100, 156))]
        wanted = formula(*values, matrix, full, bits)
        if wanted.min() > 1 and wanted.max() < 254:
            errors.append(
                rgb_of_frame(flat(stored, values, matrix, full), SDR, DisplayOptions()).reshape(-1, 3).mean(0) - wanted
            )
    # Of single colours half a level is the rounding to integers; libswscale adds a little with more than 8 bits.
    assert np.abs(errors).max() < 0.8
    # The mean of 400 roundings is off by 0.015 (one standard deviation).
    assert np.abs(np.mean(errors, axis=0)).max() < 0.1


def test_black_and_white_stay():
    for full, black, white in ((False, 16, 235), (True, 0, 255)):
        assert (rgb_of_frame(flat("yuv420p", (black, 128, 128), 1, full), SDR, DisplayOptions()) == 0).all()
        assert (rgb_of_frame(flat("yuv420p", (white, 128, 128), 1, full), SDR, DisplayOptions()) == 255).all()


@pytest.mark.parametrize("alpha", [0, 1, 127, 128, 254, 255])
def test_blending_rounds_to_the_nearest(alpha):
    colour, behind = np.array([10, 200, 255]), np.array([255, 0, 90])
    rgba = np.array([[[*colour, alpha]]], np.uint8)
    wanted = (colour * alpha + behind * (255 - alpha)) / 255
    np.testing.assert_allclose(over_background(rgba, (255, 0, 90))[0, 0], wanted, atol=0.5)
