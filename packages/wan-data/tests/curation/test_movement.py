"""Motion and stillness against movement that is known."""

from fractions import Fraction

import numpy as np
import pytest
from made_scenes import Scene, joined_scenes, texture, write_frames

from wan_data.curation.measuring_pass import MeasuringOptions, MeasuringPass
from wan_data.curation.movement import reduced


def measured(frames, fps=16, scenes="off"):
    measuring = MeasuringPass(Fraction(fps), MeasuringOptions(scenes))
    for number, frame in enumerate(frames):
        measuring.add(frame, number)
    return measuring.result()


def slide(pixels, frames, height=480, width=832):
    """A camera that moves over a picture by so many pixels a frame, to the right and half as many down."""
    rows = round(abs(pixels) * frames / 2)
    picture = texture(np.random.default_rng(1), height + rows, width + round(abs(pixels) * frames)) * 40 + 128
    picture = np.repeat(picture.clip(0, 255).astype(np.uint8)[..., None], 3, 2)
    starts = [(round(pixels * number / 2), round(pixels * number)) for number in range(frames)]
    return [np.ascontiguousarray(picture[top : top + height, left : left + width]) for top, left in starts]


@pytest.mark.parametrize("pixels", [2, 4, 10, 24, 60])
def test_motion_of_a_slide_is_its_speed(pixels):
    speed = np.hypot(pixels, pixels / 2) * 16 / np.hypot(480, 832)
    assert measured(slide(pixels, 5)).motion == pytest.approx(speed, rel=0.06)


@pytest.mark.parametrize("size", [(96, 168), (240, 416), (720, 1248), (832, 480)])
def test_motion_does_not_depend_on_the_size(size):
    height, width = size
    pixels = 0.03 * width
    speed = np.hypot(pixels, pixels / 2) * 16 / np.hypot(height, width)
    assert measured(slide(pixels, 4, height, width)).motion == pytest.approx(speed, rel=0.08)


def test_motion_does_not_depend_on_the_rate():
    every, second = slide(4, 9), slide(4, 9)[::2]
    assert measured(second, fps=8).motion == pytest.approx(measured(every, fps=16).motion, rel=0.08)
    repeated = [frame for frame in second for _ in range(2)]
    # The last picture of the repetition stands still for one frame longer.
    assert measured(repeated, fps=16).motion == pytest.approx(measured(every, fps=16).motion * 8 / 9, rel=0.08)


def test_what_does_not_move_has_no_motion_and_is_still():
    frames = [Scene(0).frames(1)[0].copy() for _ in range(5)]
    assert measured(frames).motion == 0
    assert measured(frames).stillness == 1


def test_brightness_is_not_motion():
    frame = slide(0, 1)[0]
    flicker = [(frame * factor).astype(np.uint8) for factor in (0.9, 0.92, 0.9, 0.92)]
    assert measured(flicker).motion < 0.02


def test_one_frame_has_no_motion():
    found = measured(Scene(0).frames(1))
    assert found.motion is None
    assert found.stillness is None


def test_stillness_is_the_share_of_equal_frames():
    moving = Scene(3, 240, 416).frames(7, speed=6)
    frames = [*moving, *(moving[-1].copy() for _ in range(4))]
    assert measured(frames).stillness == pytest.approx(4 / 10)


def test_a_small_thing_that_moves_is_not_still():
    frames = [np.full((480, 832, 3), 90, np.uint8) for _ in range(6)]
    for number, frame in enumerate(frames):
        frame[100:130, 30 * number : 30 * number + 30] = 200
    assert measured(frames).stillness == 0


@pytest.mark.parametrize("crf", [23, 35])
def test_noise_of_codecs_is_still(tmp_path, decoded, crf):
    frames = decoded(write_frames(tmp_path / "clip.mp4", Scene(2, 240, 416).frames(1) * 40, crf=crf))
    assert measured(frames).stillness >= 0.95
    moving = decoded(write_frames(tmp_path / "moving.mp4", Scene(2, 240, 416).frames(40, speed=2), crf=crf))
    assert measured(moving).stillness <= 0.05


@pytest.mark.parametrize("scenes", ["content", "adaptive"])
def test_cuts_are_not_motion(scenes):
    frames = [frame for scene in range(4) for frame in [Scene(scene).frames(1)[0]] * 6]
    frames = [frame.copy() for frame in frames]
    assert measured(frames, scenes=scenes).motion == 0
    assert measured(frames, scenes=scenes).cuts == (6, 12, 18)
    assert measured(frames).motion > 0.05, "the control"
    within = joined_scenes((12, 12), speed=2)
    alone = np.mean([measured(Scene(scene).frames(12, speed=2)).motion for scene in range(2)])
    assert measured(within, scenes=scenes).motion == pytest.approx(alone, rel=0.01)


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (40, 16), (31, 33), (16, 2000), (1000, 9)])
def test_pictures_of_any_size_are_measured(size):
    frames = [np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8) for seed in range(3)]
    found = measured(frames)
    assert measured(frames, scenes="adaptive").motion is None or size == (1, 1), "noise is all cuts"
    assert np.isfinite([found.motion, found.sharpness, found.black_borders, found.stillness]).all()


def test_reduced_pictures_are_means_of_blocks():
    luma = np.random.default_rng(0).integers(0, 256, (480, 833), dtype=np.uint8)
    expected = luma[:, :832].reshape(120, 4, 208, 4).mean((1, 3))
    assert np.abs(reduced(luma) - expected).max() <= 0.51
