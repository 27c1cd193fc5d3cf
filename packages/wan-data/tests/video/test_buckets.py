import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wan_data.prepare.settings import PrepareSettings
from wan_data.video.buckets import Size, buckets_of_area, choose_bucket, enlargement


def test_the_released_size_is_a_bucket():
    buckets = buckets_of_area(480 * 832)
    assert Size(480, 832) in buckets
    assert Size(832, 480) in buckets
    assert choose_bucket((buckets,), 1080.0, 1920.0) == Size(480, 832)
    assert choose_bucket((buckets,), 1920.0, 1080.0) == Size(832, 480)
    assert choose_bucket((buckets,), 500.0, 500.0) == Size(624, 624)


def test_the_largest_resolution_that_invents_no_pixels():
    resolutions = PrepareSettings(areas=(720 * 1280, 480 * 832, 240 * 416)).resolutions()
    assert choose_bucket(resolutions, 1080.0, 1920.0) == Size(720, 1280)
    assert choose_bucket(resolutions, 719.0, 1278.0) == Size(480, 832)
    assert choose_bucket(resolutions, 1279.0, 720.0) == Size(832, 480)
    assert choose_bucket(resolutions, 100.0, 100.0) == Size(304, 304)


@settings(max_examples=10)
@given(st.integers(1024, 400_000))
def test_sides_are_divisible_and_areas_fit(area):
    buckets = buckets_of_area(area)
    assert all(size.height % 16 == 0 and size.width % 16 == 0 for size in buckets)
    assert all(size.height * size.width <= area for size in buckets)
    assert {Size(size.width, size.height) for size in buckets} == set(buckets)


def test_enlargement_is_that_of_the_side_that_must_grow_most():
    assert enlargement(Size(64, 64), 32.0, 128.0) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"frames": 80}, "frames is 80; .*nearest are 77 and 81"),
        ({"height": 470, "width": 832}, "height is 470 pixels; .*464 and 480"),
        ({"height": 480}, "go together"),
        ({"validation_fraction": 1.0}, "below 1"),
        ({"areas": (100,)}, "too small"),
        ({"areas": ()}, "areas holds none"),
        ({"lengths": ()}, "lengths holds none"),
        ({"lengths": (17, 32)}, "length is 32; .*nearest are 29 and 33"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_source_bytes": 0}, "max_source_bytes is 0"),
        ({"frames": 9, "min_frames": 17}, "more than the longest window"),
    ],
)
def test_settings_are_refused_in_sentences(wrong, message):
    with pytest.raises(ValueError, match=message):
        PrepareSettings(**wrong)
