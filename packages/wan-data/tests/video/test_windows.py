import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_data.video.windows import TOLERANCE, Lengths, TimedFrame, Window, plan_windows, resample
from wan_model.video_shape import trim_frames


def timed(times, duration=0):
    return [TimedFrame(Fraction(time), Fraction(duration), index) for index, time in enumerate(times)]


def test_equal_rates_change_nothing():
    frames = timed([Fraction(i, 16) for i in range(7)], Fraction(1, 16))
    assert list(resample(frames, Fraction(16))) == [0, 1, 2, 3, 4, 5, 6]


def test_half_rate_takes_every_other_frame():
    assert list(resample(timed([Fraction(i, 32) for i in range(8)], Fraction(1, 32)), Fraction(16))) == [0, 2, 4, 6]


def test_lower_rates_repeat_frames():
    assert list(resample(timed([0, Fraction(1, 8)], Fraction(1, 8)), Fraction(16))) == [0, 0, 1, 1]


def test_times_rounded_to_milliseconds_skip_and_repeat_nothing():
    times = [Fraction(round(Fraction(1000 * i, 16)), 1000) for i in range(50)]
    assert list(resample(timed(times, Fraction(63, 1000)), Fraction(16))) == list(range(50))


def test_time_starts_at_the_first_frame():
    assert list(resample(timed([5, 6], 1), Fraction(1))) == [0, 1]


@pytest.mark.parametrize(("times", "message"), [([0, 1, Fraction(1, 2)], "backwards"), ([0, 1e6], "stays for")])
def test_broken_times_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        list(resample(timed(times), Fraction(16)))


@given(st.lists(st.fractions(0, 5), min_size=1, max_size=20), st.integers(1, 60))
def test_every_tick_shows_the_latest_frame(times, fps):
    times = sorted(set(times))
    shown = list(resample(timed(times), Fraction(fps)))
    for tick, index in enumerate(shown):
        now = times[0] + Fraction(tick, fps)
        assert times[index] <= now + TOLERANCE
        assert index + 1 == len(times) or times[index + 1] > now + TOLERANCE


@given(
    st.integers(0, 400),
    st.sampled_from(["whole", "first", "consecutive"]),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_windows_are_4n_plus_1_inside_and_without_overlap(total, kind, longest, shortest):
    longest, shortest = 4 * max(longest, shortest) + 1, 4 * min(longest, shortest) + 1
    try:
        windows = plan_windows(total, kind, Lengths(shortest, longest))
    except ValueError:
        assert trim_frames(total) < shortest or (kind == "whole" and trim_frames(total) > longest)
        return
    assert windows
    assert all(window.length % 4 == 1 and shortest <= window.length <= longest for window in windows)
    assert windows[-1].stop <= total
    assert all(before.stop == after.start for before, after in itertools.pairwise(windows))
    if kind == "consecutive":
        assert trim_frames(total - windows[-1].stop) < shortest


def test_rest_of_a_clip_makes_a_shorter_window():
    assert plan_windows(26, "consecutive", Lengths(5, 9)) == [Window(0, 9), Window(9, 18), Window(18, 23)]


def test_whole_clips_are_never_cut_in_silence():
    with pytest.raises(ValueError, match=r"26 frames.*longest window of 9.*--windows first"):
        plan_windows(26, "whole", Lengths(5, 9))


def test_length_buckets():
    lengths = Lengths(9, 33, (9, 17, 33))
    assert plan_windows(70, "consecutive", lengths) == [Window(0, 33), Window(33, 66)]
    assert plan_windows(61, "consecutive", lengths) == [Window(0, 33), Window(33, 50), Window(50, 59)]
    assert plan_windows(32, "whole", lengths) == [Window(0, 17)]
    with pytest.raises(ValueError, match="8 frames at the target rate; the shortest window is 9"):
        plan_windows(8, "first", lengths)
