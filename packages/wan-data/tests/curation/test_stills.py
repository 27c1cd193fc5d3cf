"""Sharpness and black borders against pictures that are known."""

import itertools

import cv2
import numpy as np
import pytest
from made_scenes import Scene, texture, write_frames

from wan_data.curation.stills import Stills


def stills_of(*lumas):
    stills = Stills()
    for luma in lumas:
        stills.add(luma)
    return stills


def photograph(height=480, width=832, slope=1.2):
    return (texture(np.random.default_rng(4), height, width, slope) * 35 + 128).clip(0, 255).astype(np.uint8)


# -- sharpness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [6, 8, 16])
def test_sharpness_of_waves_is_that_of_the_formula(period):
    # A wave of the angular frequency w keeps exp(-w^2 / 2) of its amplitude when it is smoothed by 1 pixel; its
    # Laplacian is 2 cos w - 2 times itself; the variance of a wave is half the square of its amplitude.
    angle = 2 * np.pi / period
    waves = np.tile((128 + 100 * np.sin(angle * np.arange(960))).round().astype(np.uint8), (416, 1))
    amplitude = 100 * np.exp(-(angle**2) / 2) * (2 - 2 * np.cos(angle))
    assert stills_of(waves).sharpness == pytest.approx(amplitude**2 / 2, rel=0.03)


def test_a_plain_picture_has_no_sharpness():
    assert stills_of(np.full((480, 832), 77, np.uint8)).sharpness == 0


def test_blur_lowers_sharpness_step_by_step():
    blurred = [cv2.GaussianBlur(photograph(), (0, 0), sigma) for sigma in (0.5, 0.8, 1.2, 2, 3, 5)]
    values = [stills_of(luma).sharpness for luma in (photograph(), *blurred)]
    assert all(later < 0.9 * earlier for earlier, later in itertools.pairwise(values))


def test_sharpness_does_not_depend_on_the_size_of_a_larger_picture():
    large = photograph(1440, 2496)
    values = [
        stills_of(cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA)).sharpness
        for height, width in ((1440, 2496), (960, 1664), (720, 1248))
    ]
    assert max(values) < 1.25 * min(values)
    small = cv2.resize(large, (416, 240), interpolation=cv2.INTER_AREA)
    assert stills_of(small).sharpness < 0.8 * min(values), "what was lost by making it small"


def test_sharpness_is_the_mean_of_the_frames():
    one, other = photograph(), cv2.GaussianBlur(photograph(), (0, 0), 2)
    mean = (stills_of(one).sharpness + stills_of(other).sharpness) / 2
    assert stills_of(one, other).sharpness == pytest.approx(mean)


def test_borders_are_no_sharpness():
    picture = photograph(360, 832)
    boxed = np.zeros((480, 832), np.uint8)
    boxed[60:420] = picture
    alone = cv2.Laplacian(cv2.GaussianBlur(picture.astype(np.float64), (0, 0), 1), cv2.CV_64F).var()
    assert stills_of(boxed).sharpness == pytest.approx(alone, rel=1e-3)


# -- borders ----------------------------------------------------------------------------------------------------------


def boxed(rows=(0, 0), columns=(0, 0), size=(240, 416), frames=4, black=0):
    clip = []
    inner = size[0] - sum(rows), size[1] - sum(columns)
    for frame in Scene(6, *inner).frames(frames):
        image = np.full((*size, 3), black, np.uint8)
        image[rows[0] : size[0] - rows[1], columns[0] : size[1] - columns[1]] = frame
        clip.append(image)
    return clip


def lumas(frames):
    return [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]


@pytest.mark.parametrize("black", [0, 16])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ((0, 0), (0, 0)),
        ((31, 31), (0, 0)),
        ((0, 0), (53, 53)),
        ((20, 20), (40, 40)),
        ((1, 0), (0, 0)),
        ((0, 17), (9, 0)),
    ],
)
def test_borders_are_exact(rows, columns, black):
    found = stills_of(*lumas(boxed(rows, columns, black=black)))
    area = (240 - sum(rows)) * (416 - sum(columns))
    assert found.black_borders == pytest.approx(1 - area / (240 * 416))
    assert (found.box.top, 240 - found.box.bottom) == rows
    assert (found.box.left, 416 - found.box.right) == columns


@pytest.mark.parametrize("crf", [18, 35])
def test_borders_are_found_through_a_codec(tmp_path, decoded, crf):
    frames = decoded(write_frames(tmp_path / "clip.mp4", boxed((32, 32), (0, 0), frames=8), crf=crf))
    found = stills_of(*lumas(frames))
    assert abs(found.box.top - 32) <= 2
    assert abs(240 - found.box.bottom - 32) <= 2
    assert found.black_borders == pytest.approx(64 / 240, abs=4 / 240)


def test_a_subtitle_in_a_border_ends_it():
    frames = boxed((40, 40), (0, 0))
    for frame in frames[2:]:
        frame[215:225, 100:300] = 255
    found = stills_of(*lumas(frames))
    assert (found.box.top, found.box.bottom) == (40, 225)


def night(seed=0):
    """A night sky over lit houses of uneven height, with a moon; the sky is black, with some noise."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 9, (240, 416)).astype(np.uint8)
    for column in range(0, 416, 26):
        top = int(rng.integers(110, 200))
        image[top:, column : column + 26] = rng.integers(30, 120)
    image[30:44, 300:314] = 220
    return image


def test_a_dark_scene_has_no_borders():
    assert stills_of(night()).black_borders == 0
    without_moon = night()
    without_moon[:60] = 4
    assert stills_of(without_moon, without_moon).black_borders == 0
    vignette = photograph(240, 416) * np.hypot(*np.meshgrid(np.linspace(-1, 1, 416), np.linspace(-1, 1, 240)))
    assert (
        stills_of((photograph(240, 416) * (1.2 - np.clip(vignette / 128, 0, 1.2))).astype(np.uint8)).black_borders == 0
    )


def test_a_night_scene_in_a_letterbox_has_its_borders():
    boxed_night = np.zeros((300, 416), np.uint8)
    houses = night()
    houses[:6] = 40  # a lit edge
    boxed_night[30:270] = houses
    assert stills_of(boxed_night).box.top == 30


def test_a_black_clip_has_no_borders_around_its_picture():
    assert stills_of(np.zeros((48, 64), np.uint8)).black_borders == 0


def test_a_fade_from_black_is_no_border():
    assert stills_of(np.zeros((240, 416), np.uint8), *lumas(boxed())).black_borders == 0
