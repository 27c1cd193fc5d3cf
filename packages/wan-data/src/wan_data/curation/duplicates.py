"""Near-duplicates among the fingerprints of a whole set, without comparing every clip with every other.

Candidates are clips of which any two hashes have the same 32 bits at one of eight places, as any two have that differ
in fewer than eight bits; sorting finds them. Candidates are then compared by all of their hashes.
"""

import dataclasses
import itertools
import mmap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt32, UInt64

from wan_data.curation.fingerprints import BITS, PARTS, unpacked

# Bits of 256 in which near-duplicates differ at most, in the mean of their parts.
DISTANCE = 48.0
# A clip of which fewer of its eight parts show anything is not compared.
LEAST_PARTS = 4
# Every second bit of a row is of a frequency that is odd from left to right, whose sign a mirror changes.
_MIRROR = 0x55
_PLACES = 8
# Entries of one key are compared with so many that follow them; see ``find_duplicates`` for larger groups.
_FOLLOWING = 32
_CHUNK = 1 << 15
# Pairs that are compared at once; each takes some 2 KB.
_PAIRS = 1 << 17
# Of the hashes and their mirror images, so many have their keys sorted at once: 256 MB, held twice for a moment.
_ENTRIES = 1 << 25

Hashes = UInt8[np.ndarray, "clips 8 32"]
Known = Bool[np.ndarray, "clips 8"]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A clip that may be a duplicate.

    Attributes:
        name: of the clip.
        hashes: see ``wan_data.curation.measures.Measures``.
        area: of a frame in pixels.
    """

    name: str
    hashes: tuple[str, ...]
    area: float


@dataclasses.dataclass(frozen=True)
class Duplicate:
    """A clip that is a near-duplicate of one that is kept.

    Attributes:
        name: of the clip.
        kept: the name of the other.
        distance: bits of 256 in which their hashes differ, in the mean.
        mirrored: whether it is the other's mirror image.
    """

    name: str
    kept: str
    distance: float
    mirrored: bool


def near_duplicates(clips: Sequence[Candidate], distance: float = DISTANCE) -> list[Duplicate]:
    """The near-duplicates of a set, each with the clip that is kept instead of it.

    The clip with the most pixels is kept, of those the one whose name comes first. Every duplicate is itself near the
    clip that is kept: a chain of clips, each near the next, does not make its ends duplicates.

    Args:
        clips: of the whole set, of different names.
        distance: bits of 256 in which duplicates differ at most, in the mean.

    Returns:
        By name. The result does not depend on the order of ``clips``.

    Raises:
        ValueError: hashes are damaged, or the distance is not from 0 to 64.
    """
    if not 0 <= distance <= BITS / 4:
        raise ValueError(f"the distance of near-duplicates is {distance}; expected 0 to {BITS // 4} of {BITS} bits")
    ordered = sorted(clips, key=lambda clip: (-clip.area, clip.name))
    hashes = np.zeros((len(ordered), PARTS, BITS // 8), np.uint8)
    known = np.zeros((len(ordered), PARTS), bool)
    for number, clip in enumerate(ordered):
        if len(clip.hashes) != PARTS:
            raise ValueError(f"{clip.name} has {len(clip.hashes)} hashes; expected {PARTS}: measure it again")
        known[number] = [bool(one) for one in clip.hashes]
        try:
            hashes[number, known[number]] = unpacked([one for one in clip.hashes if one])
        except ValueError as error:
            raise ValueError(f"{clip.name}: {error}; measure it again") from None
    near = find_duplicates(hashes, known, distance)
    found = [
        Duplicate(ordered[number].name, ordered[int(other)].name, float(bits), bool(mirrored))
        for number, (other, bits, mirrored) in enumerate(zip(near.kept, near.distances, near.mirrored, strict=True))
        if other != number
    ]
    return sorted(found, key=lambda one: one.name)


class Near(NamedTuple):
    """The result of ``find_duplicates``, of each clip.

    Attributes:
        kept: the number of the clip that is kept instead of it, or its own.
        distances: to that one.
        mirrored: whether it is that one's mirror image.
        groups: the lowest number of the clips that it is connected with by pairs that are near, or its own.
    """

    kept: Int[np.ndarray, " clips"]
    distances: Float[np.ndarray, " clips"]
    mirrored: Bool[np.ndarray, " clips"]
    groups: Int[np.ndarray, " clips"]


def find_duplicates(hashes: Hashes, known: Known, distance: float = DISTANCE) -> Near:
    """The search of ``near_duplicates`` on arrays.

    Memory: some 120 bytes a clip and at most 0.6 GB for a part of the keys, beside the 256 bytes a clip of ``hashes``,
    which may be a ``numpy.memmap``: what was read of it is given back to the system. A group of many duplicates is
    reduced in rounds, so that it costs no more than others.

    Args:
        hashes: of all clips, those that are preferred first; at most 2**27.
        known: which of them are hashes.
        distance: as there.
    """
    count = len(hashes)
    kept, groups = np.arange(count), _Groups()
    distances, mirrored = np.zeros(count), np.zeros(count, bool)
    left = np.flatnonzero(known.sum(1, dtype=np.uint8) >= LEAST_PARTS)
    while True:
        removed = 0
        # By the preference of the first clip of each pair: whether it is kept is known when its turn comes.
        for one, other, bits, flipped in _in_parts(*_near_pairs(hashes, known, left, distance)):
            groups.join(one, other)
            if kept[one] == one and kept[other] == other:
                kept[other], distances[other], mirrored[other] = one, bits, flipped
                removed += 1
        if not removed:
            return Near(kept, distances, mirrored, groups.of(count))
        left = left[kept[left] == left]


def _in_parts(*arrays: np.ndarray) -> Iterator[tuple[int, int, float, bool]]:
    """Rows of the arrays, of which few are numbers of Python at once."""
    for start in range(0, len(arrays[0]), _CHUNK):
        yield from zip(*(one[start : start + _CHUNK].tolist() for one in arrays), strict=True)


class _Groups:
    """Numbers that are joined, each group known by its lowest."""

    def __init__(self) -> None:
        self._lower: dict[int, int] = {}

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self._lowest(one), self._lowest(other)))
        self._lower[high] = low

    def _lowest(self, number: int) -> int:
        while (lower := self._lower.setdefault(number, number)) != number:
            self._lower[number] = self._lower[lower]
            number = lower
        return number

    def of(self, count: int) -> np.ndarray:
        groups = np.arange(count)
        for number in self._lower:
            groups[number] = self._lowest(number)
        return groups


def _near_pairs(
    hashes: Hashes, known: Known, chosen: np.ndarray, distance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of the chosen clips within the distance, the lower number first, in order; and whether mirrored."""
    pairs, distances = [np.zeros(0, np.uint64)], [np.zeros(0)]
    for some in _candidates(hashes, known, chosen):
        between = clip_distances(hashes, known, *_unpacked_pairs(some))
        pairs.append(some[between <= distance])
        distances.append(between[between <= distance])
    # A pair may have been found by several keys.
    found, at = np.unique(np.concatenate(pairs), return_index=True)
    between = np.concatenate(distances)[at]
    first, second, mirror = _unpacked_pairs(found)
    # The nearer of the two ways round comes first.
    order = np.lexsort((mirror, between, second, first))
    return first[order], second[order], between[order], mirror[order]


def _unpacked_pairs(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The lower number, the higher, and whether one of them is mirrored."""
    first, second = pairs >> np.uint64(33), (pairs >> np.uint64(1)) & np.uint64(2**32 - 1)
    return first.astype(np.int64), second.astype(np.int64), (pairs & np.uint64(1)).astype(bool)


def _candidates(hashes: Hashes, known: Known, chosen: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of clips that have a key in common, a few at a time; some come several times.

    In 33 bits each the lower number and the higher, of which the last is whether one of them was mirrored.
    """
    valid = known[chosen].reshape(-1)
    slices = -(-2 * int(np.count_nonzero(valid)) // _ENTRIES)
    for place in range(_PLACES if len(chosen) else 0):
        words = _words(hashes, chosen, place)
        for number in range(slices):
            # Equal parts of all keys: a hash has as many bits that are set as others.
            low, high = (2**32 * edge // slices for edge in (number, number + 1))
            new = _with_one_key(_entries(words, valid, low, high), chosen)
            for start in range(0, len(new), _PAIRS):
                yield new[start : start + _PAIRS]


def _with_one_key(entries: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The pairs of ``_candidates`` among the clips of sorted entries."""
    pairs = [np.zeros(0, np.uint64)]
    for following in range(1, _FOLLOWING + 1):
        where = _same_keys(entries, following)
        if not where.size:
            break
        one, other = (entries[at].astype(np.uint32) for at in (where, where + following))
        # Two mirrored hashes are alike where the two upright ones are.
        mirror = (one ^ other) & 1
        one, other = (chosen[entry >> 4] for entry in (one, other))
        low, high = np.minimum(one, other), np.maximum(one, other)
        packed = (low.astype(np.uint64) << np.uint64(33)) | (high.astype(np.uint64) << np.uint64(1)) | mirror
        pairs.append(np.unique(packed[low != high]))
    return np.unique(np.concatenate(pairs))


def _words(hashes: Hashes, chosen: np.ndarray, place: int) -> UInt32[np.ndarray, " hashes"]:
    """The 32 bits of one place of each hash of the chosen clips: every eighth byte."""
    words = np.empty((len(chosen), PARTS), np.uint32)
    for start in range(0, len(chosen), _CHUNK):
        some = _rows(hashes, chosen[start : start + _CHUNK])
        bytes_ = some.reshape(len(some), PARTS, 4, _PLACES)[..., place]
        words[start : start + len(some)] = np.ascontiguousarray(bytes_).view(np.uint32)[..., 0]
    return words.reshape(-1)


def _rows(hashes: Hashes, numbers: Int[np.ndarray, " rows"]) -> UInt8[np.ndarray, "rows 8 32"]:
    """The hashes of some clips. Of a mapped file a part is in memory at a time, whatever part each clip is in."""
    if not isinstance(hashes, np.memmap):
        return hashes[numbers]
    rows = np.empty((len(numbers), *hashes.shape[1:]), np.uint8)
    order = np.argsort(numbers, kind="stable")
    edges = np.searchsorted(numbers[order], np.arange(0, len(hashes) + _CHUNK, _CHUNK))
    for start, stop in itertools.pairwise(edges.tolist()):
        if start < stop:
            some = order[start:stop]
            rows[some] = hashes[numbers[some]]
            give_back(hashes)
    return rows


def _entries(words: np.ndarray, valid: np.ndarray, low: int, high: int) -> UInt64[np.ndarray, " entries"]:
    """Sorted: the key, from ``low`` to before ``high``, in 32 bits, the hash's number, and whether it was mirrored."""
    found = [np.zeros(0, np.uint64)]
    for mirrored in (0, 1):
        mirror = np.uint32(int.from_bytes(bytes([_MIRROR * mirrored] * 4), "big"))
        for start in range(0, len(words), _CHUNK << 4):
            keys = words[start : start + (_CHUNK << 4)] ^ mirror
            numbers = np.flatnonzero(valid[start : start + len(keys)] & (keys >= low) & (keys < high))
            number = (numbers + start).astype(np.uint64)
            found.append(
                (keys[numbers].astype(np.uint64) << np.uint64(32)) | (number << np.uint64(1)) | np.uint64(mirrored)
            )
    entries = np.concatenate(found)
    entries.sort()
    return entries


def _same_keys(entries: np.ndarray, following: int) -> np.ndarray:
    """The places of entries whose key is that of the one so many places later."""
    found = [np.zeros(0, np.int64)]
    # In parts, so that nothing as large as the entries is made.
    for start in range(0, len(entries) - following, _CHUNK << 5):
        part = entries[start : min(start + (_CHUNK << 5), len(entries) - following)]
        later = entries[start + following : start + following + len(part)]
        found.append(np.flatnonzero((part ^ later) >> np.uint64(32) == 0) + start)
    return np.concatenate(found)


def give_back(hashes: np.ndarray) -> None:
    """Let the system have the memory of what was read of a mapped file; nothing for other arrays."""
    if isinstance(hashes, np.memmap):
        mapped: mmap.mmap = hashes._mmap  # type: ignore[attr-defined] # numpy has no other way to it
        mapped.madvise(mmap.MADV_DONTNEED)


def clip_distances(
    hashes: Hashes,
    known: Known,
    first: Int[np.ndarray, " pairs"],
    second: Int[np.ndarray, " pairs"],
    mirrored: Bool[np.ndarray, " pairs"],
) -> Float[np.ndarray, " pairs"]:
    """Distances of pairs of clips in bits of 256.

    Each part of a clip is compared with the same part of the other, the one before and the one after, of which the
    nearest counts. The distance is the mean over the parts that are known, in the direction in which it is larger. A
    part with nothing to compare with counts as half of the bits, as one of another picture.

    Args:
        hashes, known: of all clips.
        first, second: numbers of the clips.
        mirrored: whether the second is compared as its mirror image.
    """
    one = _rows(hashes, first).view(np.uint64)
    other = (_rows(hashes, second) ^ (_MIRROR * mirrored.astype(np.uint8))[:, None, None]).view(np.uint64)
    one_known, other_known = known[first], known[second]
    nearest = np.full((2, len(first), PARTS), BITS / 2, np.float32)
    for shift in (-1, 0, 1):
        here, there = slice(max(0, -shift), PARTS - max(0, shift)), slice(max(0, shift), PARTS + min(0, shift))
        bits = np.bitwise_count(one[:, here] ^ other[:, there]).sum(2).astype(np.float32)
        bits[~(one_known[:, here] & other_known[:, there])] = BITS / 2
        nearest[0][:, here] = np.minimum(nearest[0][:, here], bits)
        nearest[1][:, there] = np.minimum(nearest[1][:, there], bits)
    means = [
        (part * valid).sum(1) / np.maximum(valid.sum(1), 1)
        for part, valid in zip(nearest, (one_known, other_known), strict=True)
    ]
    return np.maximum(*means).astype(np.float64)
