"""Near-duplicates: the rates at which copies are found and others are not, which one is kept, and what is refused."""

import collections
import itertools
import subprocess
import sys

import numpy as np
import pytest
from copied_clips import candidate, clip, copies, other_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from made_scenes import Scene

from wan_data.curation import duplicates
from wan_data.curation.duplicates import DISTANCE, Candidate, clip_distances, find_duplicates, near_duplicates
from wan_data.curation.fingerprints import unpacked

KINDS = ("mirrored", "recompressed", "rescaled", "trimmed", "brightened", "letterboxed")


def test_copies_are_found_and_others_are_not(tmp_path, length):
    # 200 clips and 10000 others in `nox -s soak-reliability`; BENCHMARKS.md has the rates.
    count, others = length((200, 10_000), (8, 200))
    clips, copied = [], collections.defaultdict(list)
    for seed in range(count):
        frames = clip(tmp_path / "clip.mp4", seed)
        clips.append(candidate(f"clip {seed}", frames))
        for kind, copy in copies(tmp_path / "copy.mp4", frames):
            copied[kind].append(candidate(f"copy {seed}", copy))
    clips += [other_clip(number) for number in range(others)]
    assert near_duplicates(clips) == []
    rates = {}
    for kind in KINDS:
        found = near_duplicates([*clips, *copied[kind]])
        for one in found:
            assert {one.name.split()[0], one.kept.split()[0]} == {"clip", "copy"}
            assert one.name.split()[1] == one.kept.split()[1], "no clip is taken for another"
            assert one.mirrored == (kind == "mirrored")
        rates[kind] = len(found) / count
    print(f"found of {count} among {others} others: {rates}")
    assert min(rates.values()) >= 0.95


def distances_of(clips, pairs, mirrored=False):
    hashes = np.stack([unpacked(clip.hashes) for clip in clips])
    first, second = (np.array(numbers) for numbers in zip(*pairs, strict=True))
    return clip_distances(hashes, np.ones(hashes.shape[:2], bool), first, second, np.full(len(first), mirrored))


def test_the_distance_of_others_is_far_from_the_threshold():
    clips = [other_clip(number) for number in range(120)]
    pairs = list(itertools.combinations(range(120), 2))
    assert distances_of(clips, pairs).min() > 1.7 * DISTANCE
    assert distances_of(clips, pairs, mirrored=True).min() > 1.7 * DISTANCE


# -- which is kept ----------------------------------------------------------------------------------------------------


def random_hashes(seed, parts=8):
    return tuple(np.random.default_rng((seed, part)).bytes(32).hex() for part in range(parts))


def changed(hashes, bits, seed=0):
    """The hashes with so many bits of each changed."""
    out = []
    for number, one in enumerate(hashes):
        flat = np.unpackbits(np.frombuffer(bytes.fromhex(one), np.uint8))
        flat[np.random.default_rng((seed, number)).permutation(256)[:bits]] ^= 1
        out.append(np.packbits(flat).tobytes().hex())
    return tuple(out)


def test_the_largest_is_kept_then_the_first_by_name():
    hashes = random_hashes(0)
    clips = [
        Candidate("d", hashes, 100.0),
        Candidate("c", changed(hashes, 3), 400.0),
        Candidate("b", changed(hashes, 4), 400.0),
        Candidate("a", changed(hashes, 5), 100.0),
        Candidate("e", random_hashes(1), 100.0),
    ]
    for order in itertools.permutations(clips):
        found = near_duplicates(order)
        assert [(one.name, one.kept) for one in found] == [("a", "b"), ("c", "b"), ("d", "b")]
        assert next(one for one in found if one.name == "d").distance == 4


def test_a_chain_of_near_clips_does_not_make_its_ends_duplicates():
    one = random_hashes(0)
    two, far = changed(one, 40, 1), changed(changed(one, 40, 1), 40, 2)
    clips = [Candidate("a", one, 9.0), Candidate("b", two, 9.0), Candidate("c", far, 9.0)]
    assert distances_of(clips, [(0, 2)])[0] > DISTANCE
    # The pair of keys that makes them candidates is of a part that is the same in all.
    clips = [Candidate(clip.name, (*clip.hashes[:7], one[7]), clip.area) for clip in clips]
    found = near_duplicates(clips)
    assert [(duplicate.name, duplicate.kept) for duplicate in found] == [("b", "a")]


@pytest.mark.parametrize("bits", [0, 1, 5, 7])
def test_hashes_that_differ_in_less_than_eight_bits_are_always_candidates(bits):
    clips = []
    for seed in range(60):
        hashes = random_hashes(seed)
        mirrored = tuple((int(one, 16) ^ int("55" * 32, 16)).to_bytes(32, "big").hex() for one in hashes)
        clips.append(Candidate(f"clip {seed}", hashes, 9.0))
        clips.append(Candidate(f"copy {seed}", changed(mirrored if seed % 2 else hashes, bits, seed), 4.0))
    found = near_duplicates(clips)
    assert [(one.name, one.kept) for one in found] == sorted((f"copy {n}", f"clip {n}") for n in range(60))
    assert all(one.mirrored == bool(int(one.name.split()[1]) % 2) and one.distance == bits for one in found)


def test_a_thousand_copies_leave_one():
    hashes = random_hashes(0)
    clips = [Candidate(f"{number:05}", changed(hashes, number % 5, number), 9.0) for number in range(1000)]
    found = near_duplicates(clips)
    assert len(found) == 999
    assert {one.kept for one in found} == {"00000"} or max(one.distance for one in found) <= DISTANCE


def by_all_pairs(hashes, known, distance):
    count = len(hashes)
    kept = np.arange(count)
    first, second = np.triu_indices(count, 1)
    near = np.zeros(len(first), bool)
    for flipped in (False, True):
        near |= clip_distances(hashes, known, first, second, np.full(len(first), flipped)) <= distance
    for one, other in zip(first[near], second[near], strict=True):
        if kept[one] == one and kept[other] == other and min(known[[one, other]].sum(1)) >= 4:
            kept[other] = one
    return kept


def some_near(seed):
    """Forty clips of six scenes, and which of their hashes are known."""
    rng = np.random.default_rng(seed)
    roots = rng.integers(0, 256, (6, 8, 32), dtype=np.uint8)
    hashes = roots[rng.integers(0, 6, 40)]
    noise = np.packbits(rng.random((40, 8, 256)) < rng.choice([0.0, 0.008, 0.015], (40, 1, 1)), axis=2)
    hashes = hashes ^ noise ^ (0x55 * rng.integers(0, 2, (40, 1, 1))).astype(np.uint8)
    return hashes, rng.random((40, 8)) < 0.9


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_the_search_finds_what_a_comparison_of_all_pairs_finds(seed):
    hashes, known = some_near(seed)
    kept = find_duplicates(hashes, known).kept
    assert kept.tolist() == by_all_pairs(hashes, known, DISTANCE).tolist()


def test_nothing_depends_on_how_many_keys_are_sorted_at_once_or_where_the_hashes_are(monkeypatch, tmp_path):
    for seed in range(6):
        hashes, known = some_near(seed)
        at_once = find_duplicates(hashes, known)
        mapped = np.memmap(tmp_path / f"{seed}", np.uint8, "w+", shape=hashes.shape)
        mapped[:] = hashes
        with monkeypatch.context() as patch:
            for name, small in (("_ENTRIES", 50), ("_CHUNK", 7), ("_PAIRS", 3)):
                patch.setattr(duplicates, name, small)
            in_parts = find_duplicates(mapped, known)
        for one, other in zip(at_once, in_parts, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(mapped, hashes)


def test_memory_is_not_that_of_the_hashes():
    # In a process of its own, because the most memory of this one is of other tests.
    done = subprocess.run([sys.executable, "-c", MOST_MEMORY], capture_output=True, text=True, check=True)
    clips, before, most = map(int, done.stdout.split())
    assert most - before < 250 * clips, "256 bytes a clip are in the file alone"


MOST_MEMORY = """
import tempfile
import numpy as np
from wan_data.curation import duplicates
from wan_model.system.memory import peak_resident

CLIPS = 600_000
duplicates._ENTRIES, duplicates._PAIRS = 1 << 20, 1 << 13
rng = np.random.default_rng(0)
with tempfile.TemporaryFile() as file:
    for _ in range(CLIPS // 10_000):
        file.write(rng.bytes(10_000 * 256))
    file.flush()
    hashes = np.memmap(file, np.uint8, "r", shape=(CLIPS, 8, 32))
    before = peak_resident()
    near = duplicates.find_duplicates(hashes, np.ones((CLIPS, 8), bool))
    assert (near.kept == np.arange(CLIPS)).all()
    print(CLIPS, before, peak_resident())
"""


# -- what is not compared ---------------------------------------------------------------------------------------------


def test_clips_that_show_too_little_are_not_compared():
    black = Candidate("black", ("",) * 8, 9.0)
    assert near_duplicates([black, Candidate("black too", ("",) * 8, 9.0)]) == []
    hashes = random_hashes(0)
    three, four = ((*hashes[:shown], *("",) * (8 - shown)) for shown in (3, 4))
    assert near_duplicates([Candidate("a", three, 9.0), Candidate("b", three, 9.0)]) == []
    found = near_duplicates([Candidate("a", four, 9.0), Candidate("b", four, 9.0)])
    assert [(one.name, one.kept, one.distance) for one in found] == [("b", "a", 0.0)]
    plain = [np.full((96, 160, 3), level, np.uint8) for level in range(100, 116)]
    assert candidate("plain", plain).hashes == ("",) * 8


def test_a_copy_with_a_dark_beginning_is_found():
    frames = Scene(0).frames(32, speed=1)
    dark = [(frame * min(1, number / 12)).astype(np.uint8) for number, frame in enumerate(frames)]
    dark[:4] = [np.zeros_like(dark[0])] * 4
    copy = candidate("b", dark)
    assert copy.hashes[0] == ""
    assert [(one.name, one.kept) for one in near_duplicates([candidate("a", frames), copy])] == [("b", "a")]


def test_bad_values_are_refused_in_one_sentence():
    good = Candidate("good", random_hashes(0), 9.0)
    with pytest.raises(ValueError, match="bad has 3 hashes; expected 8: measure it again"):
        near_duplicates([good, Candidate("bad", random_hashes(0)[:3], 9.0)])
    with pytest.raises(
        ValueError, match=r"bad: of the hashes .* one is not of 64 hexadecimal digits; measure it again"
    ):
        near_duplicates([good, Candidate("bad", ("xyz",) * 8, 9.0)])
    with pytest.raises(ValueError, match=r"distance of near-duplicates is 65\.0; expected 0 to 64 of 256 bits"):
        near_duplicates([good], 65.0)
    assert near_duplicates([]) == []
