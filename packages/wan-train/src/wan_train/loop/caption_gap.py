"""Which other sample's caption a validation sample is also predicted with, for the caption gap.

The caption gap is the error of the predicted clean latents with other samples' captions divided by the error with their
own. At a sigma near 1 hardly anything but the caption says what the sample is, so a model that follows captions has a
gap well above 1, and one that ignores them has 1, whatever its loss. As the clean latents are the input minus sigma
times the velocity, the quotient is that of the velocity's errors.
"""

import hashlib
import itertools
from collections.abc import Sequence

from wan_model.flow import TIMESTEPS
from wan_model.pack import PackedText

TIMESTEP = 0.95 * TIMESTEPS
# Every rank reads the texts of this many samples, the first of the split; two evaluations of each are enough.
SAMPLES = 64


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def caption_id(text: PackedText) -> bytes:
    """A digest of a sample's embedding, which is equal for equal captions."""
    return hashlib.sha256(text.rows_RD.float().contiguous().numpy().tobytes()).digest()


def partners(keys: Sequence[str], captions: Sequence[bytes], seed: int) -> list[int | None]:
    """For each sample the one whose caption it gets, which differs from its own; it depends on keys and seed alone.

    Args:
        keys: of the samples; they differ.
        captions: see ``caption_id``.
        seed: another one pairs other samples.

    Returns:
        Indices, each at most once. None for samples to which no different caption is left: the most frequent caption
        belongs to more than half of the samples.
    """
    first: dict[bytes, str] = {}
    for key, caption in sorted(zip(keys, captions, strict=True)):
        first.setdefault(caption, key)
    # Samples of equal captions stand together. Moved on by as many as have the most frequent one, none keeps its own.
    order = sorted(
        range(len(keys)),
        key=lambda i: (_digest(seed, first[captions[i]]), first[captions[i]], _digest(seed, keys[i]), keys[i]),
    )
    groups = [len(list(group)) for _, group in itertools.groupby(order, key=lambda i: captions[i])]
    found: list[int | None] = [None] * len(keys)
    for place, sample in enumerate(order):
        other = order[(place + max(groups)) % len(order)]
        if captions[other] != captions[sample]:
            found[sample] = other
    return found
