"""Bin packing of samples by tokens, as pure functions of lengths."""

import dataclasses
from collections.abc import Sequence

from wan_model.config import PatchSize

# A pack with this share of the capacity is emitted at once.
_FULL = 0.95


def latent_tokens(shape: Sequence[int], patch_size: PatchSize = (1, 2, 2)) -> int:
    """Tokens of a latent of shape [C, F, H, W]; the model's patches are of 1 x 2 x 2 positions."""
    (_, frames, rows, columns), (pf, ph, pw) = shape, patch_size
    return (frames // pf) * (rows // ph) * (columns // pw)


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sample first, each into the fullest pack in which it fits.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a pack.

    Returns:
        Indices into ``lengths``, one list per pack; every index exactly once.

    Raises:
        ValueError: a length is not positive or exceeds the capacity.
    """
    for index, length in enumerate(lengths):
        if not 0 < length <= capacity:
            raise ValueError(f"sample {index} has {length} tokens; a pack takes 1 to {capacity}")
    packs: list[list[int]] = []
    free: list[int] = []
    # Equal lengths keep their order, so that the result depends on the arguments only.
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = [(space, pack) for pack, space in enumerate(free) if space >= length]
        if fitting:
            _, pack = min(fitting)
            packs[pack].append(index)
            free[pack] -= length
        else:
            packs.append([index])
            free.append(capacity - length)
    return packs


def full_packs(lengths: Sequence[int], capacity: int, carried: int) -> tuple[list[list[int]], list[int]]:
    """The fullest packs of ``best_fit``; the samples of the emptiest packs are carried over to the next buffer.

    At least half of the packs are emitted. A sample is carried over at most once, so it is at most one buffer late.

    Args:
        lengths: tokens of each sample; samples that were carried over come first.
        capacity: tokens of a pack.
        carried: number of samples that were carried over.

    Returns:
        The packs as indices, fullest first, and the indices of the samples to carry over.

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
    """The tokens that samples may fill so that the padded pack does not exceed the capacity.

    Raises:
        ValueError: no padded pack fits the capacity.
    """
    if multiple < 1:
        raise ValueError(f"packs cannot be padded to a multiple of {multiple}; it must be at least 1")
    usable = capacity - capacity % multiple
    if usable < 1:
        raise ValueError(f"a capacity of {capacity} tokens holds no pack padded to a multiple of {multiple} tokens")
    return usable


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Packing efficiency.

    Attributes:
        packs: number of packs.
        samples: number of samples.
        valid: tokens of samples.
        total: tokens including padding.
        capacity: tokens of as many full packs.
    """

    packs: int
    samples: int
    valid: int
    total: int
    capacity: int

    @property
    def fill(self) -> float:
        """Valid tokens as a share of the capacity, 0 to 1."""
        return self.valid / self.capacity if self.capacity else 0.0

    @property
    def useful(self) -> float:
        """Valid tokens as a share of the total, 0 to 1."""
        return self.valid / self.total if self.total else 0.0


def efficiency(packs: Sequence[Sequence[int]], capacity: int, multiple: int = 1) -> Efficiency:
    """Compute the packing efficiency.

    Args:
        packs: tokens of the samples of each pack.
        capacity: tokens of a pack, padding included.
        multiple: packs are padded to a multiple of this many tokens.
    """
    sums = [sum(pack) for pack in packs]
    return Efficiency(
        packs=len(packs),
        samples=sum(map(len, packs)),
        valid=sum(sums),
        total=sum(total + -total % multiple for total in sums),
        capacity=len(packs) * capacity,
    )
