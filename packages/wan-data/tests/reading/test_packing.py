import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wan_data.inspect.statistics import simulate_packing
from wan_data.reading.packing import best_fit, efficiency, full_packs, usable_capacity

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


# A 480p dataset as one finds it: a third images, clips of all lengths, mostly landscape.
FRAMES = {1: 30, 17: 10, 33: 15, 49: 15, 65: 10, 81: 20}
ASPECTS = {(480, 832): 55, (832, 480): 20, (624, 624): 10, (544, 720): 8, (416, 960): 7}
CAPACITY = 65_520  # two clips of 81 frames


def realistic_mix(count):
    rng = random.Random(0)
    frames = rng.choices(list(FRAMES), list(FRAMES.values()), k=count)
    sizes = rng.choices(list(ASPECTS), list(ASPECTS.values()), k=count)
    return [((f - 1) // 4 + 1) * (h // 16) * (w // 16) for f, (h, w) in zip(frames, sizes, strict=True)]


def first_fit(lengths, capacity):
    """The recipe's: each sample into the first pack that takes it."""
    packs = []
    for length in lengths:
        for pack in packs:
            if sum(pack) + length <= capacity:
                pack.append(length)
                break
        else:
            packs.append([length])
    return packs


def test_a_realistic_mix_fills_its_packs():
    tokens = realistic_mix(5000)
    ours = simulate_packing(tokens, CAPACITY, pad_multiple=8)
    theirs = [pack for start in range(0, len(tokens), 64) for pack in first_fit(tokens[start : start + 64], CAPACITY)]
    fill = efficiency(theirs, CAPACITY).fill
    print(f"{ours.fill:.4f} of the capacity filled; first-fit {fill:.4f}")
    assert ours.samples == len(tokens)
    assert ours.fill >= 0.97
    assert ours.fill > fill + 0.04


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.integers(0, 80))
def test_what_is_kept_back_is_kept_back_once(lengths, carried):
    packs, rest = full_packs(lengths, 100, min(carried, len(lengths)))
    assert sorted([*(index for pack in packs for index in pack), *rest]) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 100 for pack in packs)
    assert all(index >= carried for index in rest)
    assert full_packs(lengths, 100, len(lengths))[1] == []
    assert packs
