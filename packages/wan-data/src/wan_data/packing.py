"""Which samples share a pack: bin packing by tokens, as a pure function of lengths."""

import dataclasses
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sample first, each into the fullest pack that still takes it.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a pack.

    Returns:
        Indices into ``lengths``, a list a pack; every index exactly once.

    Raises:
        ValueError: a length that is not positive or exceeds the capacity.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"sample {index} has {length} tokens; a pack takes 1 to {capacity}")
    packs: list[list[int]] = []
    room: list[int] = []
    # Equal lengths stay in their order, so that the result depends on nothing but the arguments.
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = [(space, pack) for pack, space in enumerate(room) if space >= length]
        if fitting:
            _, pack = min(fitting)
            packs[pack].append(index)
            room[pack] -= length
        else:
            packs.append([index])
            room.append(capacity - length)
    return packs


def usable_capacity(capacity: int, multiple: int) -> int:
    """Tokens that samples may fill so that the pack, padded to a multiple, stays within the capacity.

    Raises:
        ValueError: no padded pack fits.
    """
    if multiple < 1:
        raise ValueError(f"packs cannot be padded to a multiple of {multiple}; it must be at least 1")
    usable = capacity - capacity % multiple
    if usable < 1:
        raise ValueError(f"a capacity of {capacity} tokens holds no pack padded to a multiple of {multiple} tokens")
    return usable


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """How full packs are.

    Attributes:
        packs: how many were counted.
        samples: samples in them.
        valid: tokens of samples.
        total: tokens computed, padding included.
        capacity: tokens that as many full packs hold.
    """

    packs: int
    samples: int
    valid: int
    total: int
    capacity: int

    @property
    def fill(self) -> float:
        """Share of the capacity that samples fill, 0 to 1."""
        return self.valid / self.capacity if self.capacity else 0.0

    @property
    def useful(self) -> float:
        """Share of the computed tokens that belong to samples, 0 to 1."""
        return self.valid / self.total if self.total else 0.0


def efficiency(packs: Sequence[Sequence[int]], capacity: int, multiple: int = 1) -> Efficiency:
    """How full packs are.

    Args:
        packs: tokens of the samples of each pack.
        capacity: tokens of a pack, padding included.
        multiple: what packs are padded to.
    """
    sums = [sum(pack) for pack in packs]
    return Efficiency(
        packs=len(packs),
        samples=sum(map(len, packs)),
        valid=sum(sums),
        total=sum(total + -total % multiple for total in sums),
        capacity=len(packs) * capacity,
    )
