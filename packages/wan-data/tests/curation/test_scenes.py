"""Cuts at known frames, what is no cut, and windows that cross none."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_scenes import Scene, joined_scenes, write_frames

from wan_data.curation.scenes import CutDetector, plan_scene_windows, scenes_of
from wan_data.video.decode import _Source
from wan_data.video.display.options import DisplayOptions
from wan_data.video.limits import Limits
from wan_data.video.windows import Lengths, Window, plan_windows

FPS = Fraction(16)


def cuts_of(frames, kind, fps=FPS):
    detector = CutDetector(kind, fps)
    for number, frame in enumerate(frames):
        detector.add(frame, number)
    return detector.cuts()


@pytest.mark.parametrize("kind", ["content", "adaptive"])
@pytest.mark.parametrize(
    "lengths", [(40,), (20, 20), (1, 30), (2, 30), (30, 1), (30, 2), (12, 5, 30, 9), (25, 4, 25), (1, 25, 25, 1)]
)
def test_hard_cuts_are_found_at_their_frames(kind, lengths):
    frames = joined_scenes(lengths, speed=2)
    assert cuts_of(frames, kind) == tuple(itertools.accumulate(lengths))[:-1]


def test_fast_motion_is_no_adaptive_cut():
    fast = Scene(1).frames(40, speed=24)
    assert cuts_of(fast, "adaptive") == ()
    assert len(cuts_of(fast, "content")) > 20, "the control: motion that a fixed threshold takes for cuts"
    assert cuts_of(joined_scenes((30, 30), speed=8), "adaptive") == (30,)


@pytest.mark.parametrize("kind", ["content", "adaptive"])
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("start", [1, 12, 36])
def test_a_flash_is_no_cut(kind, length, start):
    frames = joined_scenes((40,), speed=1)
    for number in range(start, start + length):
        frames[number] = (frames[number] // 4 + 190).astype(np.uint8)
    assert cuts_of(frames, kind) == ()


@pytest.mark.parametrize("kind", ["content", "adaptive"])
def test_a_scene_that_is_longer_than_a_flash_is_one(kind):
    first, other = joined_scenes((40,), speed=1), Scene(9).frames(6, speed=1)
    assert cuts_of(first[:20] + other + first[20:], kind) == (20, 26)


@pytest.mark.parametrize("kind", ["content", "adaptive"])
def test_a_flash_beside_a_cut_hides_it_not(kind):
    frames = joined_scenes((20, 20), speed=1)
    frames[19] = np.full_like(frames[19], 250)
    cuts = cuts_of(frames, kind)
    assert cuts
    assert set(cuts) <= {19, 20}, "the flash belongs to either scene, or to none"


@pytest.mark.parametrize("kind", ["content", "adaptive"])
def test_fades_are_no_hard_cuts(kind):
    first, other = Scene(0).frames(64, speed=1), Scene(1).frames(64, speed=1)
    share = np.clip((np.arange(64) - 16) / 32, 0, 1)
    dissolve = [((1 - t) * a + t * b).astype(np.uint8) for t, a, b in zip(share, first, other, strict=True)]
    assert cuts_of(dissolve, kind) == ()
    # Through black: what may be a cut is where the colours of the last dark frame vanish, and where they come back.
    light = np.clip(np.abs(np.arange(64) - 32) / 16, 0, 1)
    pictures = [*first[:32], *other[32:]]
    through_black = [(t * picture).astype(np.uint8) for t, picture in zip(light, pictures, strict=True)]
    assert not set(cuts_of(through_black, kind)) - {31, 32, 33}


def resampled(path, fps):
    last, pixels = None, None
    for picture in _Source(path, Limits(), DisplayOptions(), lambda _: None).resampled(fps):
        if picture is not last:
            last, pixels = picture, picture.rgb()
        yield pixels


@pytest.mark.parametrize("kind", ["content", "adaptive"])
def test_cuts_of_a_variable_rate_are_numbered_at_the_target_rate(tmp_path, kind):
    frames = joined_scenes((20, 20, 20), speed=3)
    steps = [125] * 10 + [250] * 4 + [1000] * 2 + [62] * 44
    times = [0, *itertools.accumulate(steps[:-1])]
    path = write_frames(tmp_path / "clip.mkv", frames, times=times)
    expected = tuple(-(-(times[cut] - 1) * 16 // 1000) for cut in (20, 40))
    assert cuts_of(resampled(path, FPS), kind) == expected


@pytest.mark.parametrize("rate", [5, 8, 12])
def test_motion_of_a_source_of_a_lower_rate_is_no_adaptive_cut(tmp_path, rate):
    frames = joined_scenes((3 * rate, 3 * rate), speed=8)
    times = [number * 1000 // rate for number in range(len(frames))]
    path = write_frames(tmp_path / "clip.mkv", frames, times=times)
    assert cuts_of(resampled(path, FPS), "adaptive") == (48,)


@pytest.mark.parametrize("kind", ["content", "adaptive"])
def test_pictures_that_stand_still_are_scenes(tmp_path, kind):
    pictures = [Scene(seed).frames(1)[0] for seed in range(4)]
    once = write_frames(tmp_path / "once.mkv", pictures, times=[0, 1000, 2000, 3000])
    assert cuts_of(resampled(once, FPS), kind) == (16, 32, 48)
    again = [picture.copy() for picture in pictures for _ in range(16)]
    assert cuts_of(again, kind) == (16, 32, 48)


def test_what_is_settled_does_not_change():
    frames = joined_scenes((9, 9, 4, 9, 15), speed=4)
    cuts = set(cuts_of(frames, "adaptive"))
    detector = CutDetector("adaptive", FPS)
    for number, frame in enumerate(frames):
        detector.add(frame, number)
        assert number - 8 <= detector.settled <= number
        assert {n for n in range(detector.settled) if detector.is_cut(n)} == {n for n in cuts if n < detector.settled}


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="found by 'fast'; expected one of content, adaptive"):
        CutDetector("fast", FPS)


def test_a_clip_without_frames_and_one_of_one_frame_have_no_cuts():
    assert CutDetector("adaptive", FPS).cuts() == ()
    assert cuts_of(Scene(0).frames(1), "adaptive") == cuts_of(Scene(0).frames(1), "content") == ()


# -- windows ----------------------------------------------------------------------------------------------------------


def test_windows_per_scene():
    lengths = Lengths(5, 9)
    assert plan_scene_windows(30, (12, 16), "consecutive", lengths) == [Window(0, 9), Window(16, 25), Window(25, 30)]
    assert plan_scene_windows(30, (12, 16), "first", lengths) == [Window(0, 9), Window(16, 25)]
    assert plan_scene_windows(20, (6, 9), "whole", lengths) == [Window(0, 5), Window(9, 18)]
    assert plan_scene_windows(26, (), "consecutive", lengths) == plan_windows(26, "consecutive", lengths)


def test_windows_that_do_not_fit_are_refused_by_scene():
    with pytest.raises(ValueError, match="longest of its 3 scenes has 4 frames at the target rate; the shortest win"):
        plan_scene_windows(9, (4, 8), "first", Lengths(5, 9))
    with pytest.raises(ValueError, match=r"of its scene from frame 4 to 30: it has 26 frames.*--windows first"):
        plan_scene_windows(30, (4,), "whole", Lengths(5, 9))
    for cuts in ((0,), (5, 5), (7, 3), (30,)):
        with pytest.raises(ValueError, match="of 30 frames; expected rising numbers within"):
            scenes_of(30, cuts)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.sampled_from(["whole", "first", "consecutive"]))
def test_no_window_crosses_a_cut(scenes, kind):
    *cuts, total = itertools.accumulate(scenes)
    lengths = Lengths(5, 61 if kind == "whole" else 17)
    try:
        windows = plan_scene_windows(total, cuts, kind, lengths)
    except ValueError:
        assert max(scenes) < 5
        return
    assert windows
    assert all(before.stop <= after.start for before, after in itertools.pairwise(windows))
    assert not any(window.start < cut < window.stop for window in windows for cut in cuts)
    used = [any(scene.start <= window.start < scene.stop for window in windows) for scene in scenes_of(total, cuts)]
    assert used == [length >= 5 for length in scenes]
