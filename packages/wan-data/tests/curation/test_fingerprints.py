"""Hashes are those of ImageHash, and a fingerprint is of means of parts of a clip."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_scenes import Scene

from wan_data.curation.fingerprints import Fingerprinter, perceptual_hash, unpacked


def waves(down, across, both):
    rows, columns = np.mgrid[:64, :64]
    image = 128 + 60 * np.sin(down * rows + across * columns) + 40 * np.cos(both * rows * columns / 8) + rows * 0.3
    return image.clip(0, 255).astype(np.uint8)


def pictures(count, seed=0, speed=3):
    return [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in Scene(seed, 96, 96).frames(count, speed=speed)]


def fingerprinter_of(shown, frames=1):
    fingerprinter = Fingerprinter()
    for picture in shown:
        fingerprinter.add(picture, frames)
    return fingerprinter


def bits(one, other):
    return sum(int(np.bitwise_count(a ^ b).sum()) for a, b in zip(unpacked(one), unpacked(other), strict=True))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        # str(imagehash.phash(image, hash_size=16)) of ImageHash 4.3.2.
        (waves(0.11, 0.23, 0.05), "ff806c55e900c22a9daa935594aaa955aabf512a2ad551aa62d751ab62df51af"),
        (waves(0.31, 0.07, 0.2), "ffff7ff8de007801c00f683fc07891f023c38787a71e87388e318c638ce69ccc"),
        (waves(0.02, 0.5, 0.13), "ffe27f48f801f01fe0f8c1c1c38fc71cce318ce688cc99999b36936c9249b692"),
    ],
)
def test_hashes_are_those_of_imagehash(image, expected):
    assert perceptual_hash(image.astype(np.float32)) == expected


def test_brightness_and_contrast_change_no_bit():
    image = waves(0.11, 0.23, 0.05).astype(np.float32)
    assert perceptual_hash(image * 0.6 + 30) == perceptual_hash(image)


def test_what_shows_too_little_has_no_hash():
    image = np.full((64, 64), 20, np.float32)
    assert perceptual_hash(image) == ""
    image[::2] += 6
    assert perceptual_hash(image) == ""
    image[::2] += 6
    assert perceptual_hash(image) != ""


def test_parts_are_the_means_of_quarters():
    shown = pictures(32)
    expected = []
    for middle in range(2, 32, 4):
        mean = np.mean(shown[max(0, middle - 4) : middle + 4], axis=0, dtype=np.float32)
        expected.append(perceptual_hash(cv2.resize(mean, (64, 64), interpolation=cv2.INTER_AREA)))
    assert bits(fingerprinter_of(shown).hashes(), expected) <= 8


@pytest.mark.parametrize("count", [1, 3, 8, 63, 64, 65, 127, 128, 200, 1000])
def test_a_clip_of_any_length_is_told_in_constant_memory(count):
    shown = pictures(8)
    fingerprinter = Fingerprinter()
    for number in range(count):
        fingerprinter.add(shown[number * 8 // count])
        assert len(fingerprinter._sums) <= 64
    if count >= 8 and count % 8 == 0:
        expected = fingerprinter_of(shown).hashes()
        assert bits(fingerprinter.hashes(), expected) <= 8 * 2
    assert len(fingerprinter.hashes()) == 8


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_a_picture_that_is_shown_for_long_counts_so_many_times(lengths):
    shown = pictures(len(lengths))
    at_once, one_by_one = Fingerprinter(), Fingerprinter()
    for picture, frames in zip(shown, lengths, strict=True):
        at_once.add(picture, frames)
        for _ in range(frames):
            one_by_one.add(picture)
    assert bits(at_once.hashes(), one_by_one.hashes()) <= 8


def test_borders_are_cut_off():
    whole = pictures(8)
    boxed = []
    for picture in whole:
        image = np.zeros((96, 96), np.uint8)
        image[12:84] = cv2.resize(picture, (96, 72), interpolation=cv2.INTER_AREA)
        boxed.append(image)
    assert bits(fingerprinter_of(boxed).hashes(12 / 96, 84 / 96), fingerprinter_of(whole).hashes()) <= 8 * 8
    assert bits(fingerprinter_of(boxed).hashes(), fingerprinter_of(whole).hashes()) > 8 * 40, "the control"


@pytest.mark.parametrize("text", ["zz" * 32, "00" * 31, "0" * 63, ""])
def test_damaged_hashes_are_refused(text):
    with pytest.raises(ValueError, match="one is not of 64 hexadecimal digits"):
        unpacked(["00" * 32, text])
