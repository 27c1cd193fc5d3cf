"""Which samples share a pack: bin packing by tokens, as a pure function of lengths."""

import dataclasses
from collections.abc import Sequence

from wan_model.config import PatchSize

# A pack that is this full is given out at once.
_FULL = 0.95


def latent_tokens(shape: Sequence[int], patch_size: PatchSize = (1, 2, 2)) -> int:
    """Tokens of a latent of shape [C, F, H, W]; the model's patches are of 1 x 2 x 2 positions."""
    (_, frames, rows, columns), (pf, ph, pw) = shape, patch_size
    return (frames // pf) * (rows // ph) * (columns // pw)


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


def full_packs(lengths: Sequence[int], capacity: int, carried: int) -> tuple[list[list[int]], list[int]]:
    """``best_fit``, but for the emptiest packs, whose samples are better looked at again with the next ones.

    At least half of the packs are given out, and a sample is kept back at most once: it comes at most one buffer late.

    Args:
        lengths: tokens of each sample; those that were kept back before stand first.
        capacity: tokens of a pack.
        carried: how many those are.

    Returns:
        The packs as indices, fullest first, and the indices that are kept back.

    Raises:
        ValueError: see ``best_fit``.
    """
    fullest_first = sorted(best_fit(lengths, capacity), key=lambda pack: (-sum(lengths[i] for i in pack), pack))
    packs: list[list[int]] = []
    rest: list[int] = []
    for number, pack in enumerate(fullest_first):
        full = sum(lengths[index] for index in pack) >= _FULL * capacity
        if full or min(pack) < carried or 2 * number < len(fullest_first):
            packs.append(pack)
        else:
            rest += pack
    return packs, sorted(rest)


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
