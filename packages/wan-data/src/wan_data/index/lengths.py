"""How long the texts of a dataset's samples are, counted, so that nothing needs to read the samples for it."""

import collections
import dataclasses
from collections.abc import Iterable

Counts = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class LengthCounts:
    """Numbers of samples by a length.

    Attributes:
        texts: pairs of a number of text tokens and the samples that have as many, ascending.
        captions: likewise of the characters of captions.
    """

    texts: Counts = ()
    captions: Counts = ()

    @classmethod
    def of_samples(cls, lengths: Iterable[tuple[int, int] | None]) -> "LengthCounts | None":
        """Of text tokens and caption characters of each sample; None if those of a sample are not known."""
        texts: collections.Counter[int] = collections.Counter()
        captions: collections.Counter[int] = collections.Counter()
        for pair in lengths:
            if pair is None:
                return None
            texts[pair[0]] += 1
            captions[pair[1]] += 1
        return cls(_pairs(texts), _pairs(captions))


@dataclasses.dataclass(frozen=True)
class SplitLengths:
    """The lengths of one split."""

    split: str
    counts: LengthCounts


def with_lengths(
    known: tuple[SplitLengths, ...] | None, changes: Iterable[tuple[str, LengthCounts | None, int]]
) -> tuple[SplitLengths, ...] | None:
    """The lengths of all splits after samples were added or removed.

    Args:
        known: of the dataset; None if they are not known.
        changes: split, lengths and 1 or -1; lengths of None, as earlier versions leave them, make all unknown.
    """
    if known is None:
        return None
    totals: dict[str, tuple[collections.Counter[int], collections.Counter[int]]] = {}
    for split, counts, by in (*((one.split, one.counts, 1) for one in known), *changes):
        if counts is None:
            return None
        kinds = totals.setdefault(split, (collections.Counter(), collections.Counter()))
        for total, pairs in zip(kinds, (counts.texts, counts.captions), strict=True):
            for length, count in pairs:
                total[length] += by * count
    summed = {split: LengthCounts(*map(_pairs, kinds)) for split, kinds in sorted(totals.items())}
    return tuple(SplitLengths(split, counts) for split, counts in summed.items() if counts.texts)


def _pairs(total: "collections.Counter[int]") -> Counts:
    return tuple(sorted((length, count) for length, count in total.items() if count))
