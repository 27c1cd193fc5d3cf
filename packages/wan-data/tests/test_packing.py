import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_data.packing import best_fit, efficiency, usable_capacity

LENGTHS = st.lists(st.integers(1, 100), max_size=60)


@given(LENGTHS, st.integers(100, 300))
def test_every_sample_once_and_no_pack_too_full(lengths, capacity):
    packs = best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= capacity for pack in packs)


@given(LENGTHS, st.integers(100, 300))
def test_within_the_known_bound_of_best_fit_decreasing(lengths, capacity):
    # No packing needs fewer than the volume or the samples above half a pack; BFD is within 11/9 of the optimum + 6/9,
    # and any two packs of it together exceed one capacity.
    packs = best_fit(lengths, capacity)
    sums = sorted(sum(lengths[index] for index in pack) for pack in packs)
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


def test_fills_what_first_fit_leaves_open():
    # First fit decreasing would put the 3 beside the 6 and leave the 7 alone.
    lengths = [6, 7, 3, 4]
    assert sorted(sorted(lengths[index] for index in pack) for pack in best_fit(lengths, 10)) == [[3, 7], [4, 6]]


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_that_fit_no_pack_are_refused(length):
    with pytest.raises(ValueError, match=f"sample 1 has {length} tokens"):
        best_fit([5, length], 10)


def test_padding_counts_to_the_capacity():
    assert usable_capacity(30, 8) == 24
    with pytest.raises(ValueError, match="holds no pack"):
        usable_capacity(7, 8)


def test_efficiency():
    found = efficiency([[3, 4], [5]], 10, multiple=4)
    assert (found.packs, found.samples, found.valid, found.total, found.capacity) == (2, 3, 12, 16, 20)
    assert found.fill == 0.6
    assert found.useful == 0.75
