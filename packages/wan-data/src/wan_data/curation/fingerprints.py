"""A perceptual fingerprint of a clip, by which near-duplicates are found.

A hash is the pHash of ``imagehash.phash(image, hash_size=16)``: which of the 16 x 16 lowest frequencies of the discrete
cosine transform of the luma at 64 x 64 are above their median; 256 bits. Whoever has ImageHash computes the same.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from wan_data.curation.libraries import opencv

# Pictures of a clip that are hashed, each the mean of a quarter of its time: those of half a quarter are less alike in
# a copy that was trimmed, by a third in fast motion.
PARTS = 8
# To each side of its middle, as a share of the clip.
_REACH = 1 / 8
BITS = 256
# Pictures are kept at this size, from which borders can be cut off, and hashed at the other.
KEPT, _HASHED, _LOW = 96, 64, 16
# So many means of successive frames are kept; twice that before they are halved.
_KEPT_MEANS = 4 * PARTS
# A picture whose luma deviates less, in levels, shows too little.
_LEAST_DEVIATION = 4.0

Picture = Float[np.ndarray, "rows columns"]


class Fingerprinter:
    """Accumulates the fingerprint of a clip, in constant memory.

    Each hash is of the mean of the pictures of a quarter of the clip, around the middle of one of its eighths (at the
    ends of what there is of it). Of a copy that was trimmed a little, a single frame may show what was never hashed of
    the other; the means overlap by most of their length. Black borders are cut off before, so that a copy with other
    borders has the same fingerprint.
    """

    def __init__(self) -> None:
        # Sums of the pictures of ``_span`` frames each.
        self._sums: list[np.ndarray] = []
        self._span = 1
        self._count = 0

    def add(self, picture: UInt8[np.ndarray, "96 96"], frames: int = 1) -> None:
        """Add the luma of a picture, at 96 x 96 whatever its shape, that is shown for a number of frames."""
        whole = picture.astype(np.float32)
        while frames:
            filled = self._count % self._span
            if filled == 0:
                self._sums.append(np.zeros_like(whole))
            part = min(frames, self._span - filled)
            self._sums[-1] += part * whole
            self._count += part
            frames -= part
            if len(self._sums) == 2 * _KEPT_MEANS and self._count == self._span * len(self._sums):
                self._sums = [one + other for one, other in zip(self._sums[::2], self._sums[1::2], strict=True)]
                self._span *= 2

    def hashes(self, top: float = 0.0, bottom: float = 1.0, left: float = 0.0, right: float = 1.0) -> tuple[str, ...]:
        """The hashes of the eight parts, in order, as 64 hexadecimal digits; "" for one that shows too little.

        Args:
            top, bottom, left, right: where the picture is within its borders, as shares of height and width.
        """
        assert self._count, "add a picture first"
        return tuple(perceptual_hash(part) for part in self._parts(top, bottom, left, right))

    def _parts(self, top: float, bottom: float, left: float, right: float) -> list[Picture]:
        cv2 = opencv()
        sums = np.stack(self._sums)
        starts = self._span * np.arange(len(sums))
        stops = np.minimum(starts + self._span, self._count)
        sums /= (stops - starts)[:, None, None]
        centres = (np.arange(PARTS)[:, None] + 0.5) / PARTS
        # Frames that each mean shares with each part of the clip.
        last, first = self._count * (centres + _REACH), self._count * (centres - _REACH)
        shared = np.maximum(np.minimum(stops, last) - np.maximum(starts, first), 0)
        means = np.tensordot(shared / shared.sum(1, keepdims=True), sums, 1)
        rows = slice(*_inside(top, bottom))
        columns = slice(*_inside(left, right))
        return [
            cv2.resize(np.ascontiguousarray(mean[rows, columns]), (_HASHED, _HASHED), interpolation=cv2.INTER_AREA)
            for mean in means
        ]


def _inside(first: float, last: float) -> tuple[int, int]:
    """A range of the kept picture that has nothing of the borders; all of it if that is hardly anything."""
    start, stop = int(np.ceil(first * KEPT - 1e-6)), int(np.floor(last * KEPT + 1e-6))
    return (start, stop) if stop - start >= _LOW else (0, KEPT)


@functools.cache
def _cosines() -> np.ndarray:
    # As scipy.fftpack.dct without normalization, of which ImageHash takes the first frequencies.
    frequency, place = np.arange(_LOW)[:, None], np.arange(_HASHED)
    return 2 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * _HASHED))


def perceptual_hash(picture: Picture) -> str:
    """The hash of a picture [64, 64] of luma, as 64 hexadecimal digits; "" if it shows too little.

    Brightness and contrast do not change it. A picture shows too little if its luma deviates by less than 4 levels.
    """
    assert picture.shape == (_HASHED, _HASHED), f"got {picture.shape}"
    if picture.std() < _LEAST_DEVIATION:
        return ""
    low = _cosines() @ picture.astype(np.float64) @ _cosines().T
    return np.packbits(low > np.median(low)).tobytes().hex()


def unpacked(hashes: Sequence[str]) -> UInt8[np.ndarray, "hashes 32"]:
    """Hashes as bytes.

    Raises:
        ValueError: one is not of 64 hexadecimal digits.
    """
    try:
        rows = [bytes.fromhex(one) for one in hashes]
    except ValueError:
        rows = [b""]
    if any(len(row) != BITS // 8 for row in rows):
        raise ValueError(f"of the hashes {', '.join(map(repr, hashes))[:200]} one is not of 64 hexadecimal digits")
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(hashes), BITS // 8)


def packed_fingerprint(hashes: Sequence[str]) -> str:
    """A fingerprint of eight hashes as one text: 514 hexadecimal digits, which parts have a hash, then their bits."""
    parts = [int(bool(one)) << number for number, one in enumerate(hashes)]
    return f"{sum(parts):02x}" + "".join(one or "0" * (BITS // 4) for one in hashes)


def unpacked_fingerprint(text: str) -> tuple[str, ...]:
    """Inverse of ``packed_fingerprint``.

    Raises:
        ValueError: it is none.
    """
    size = BITS // 4
    if len(text) != 2 + PARTS * size or text.strip("0123456789abcdef"):
        raise ValueError(f"a fingerprint is {text[:20]!r}...; expected {2 + PARTS * size} hexadecimal digits")
    mask, bits = int(text[:2], 16), text[2:]
    return tuple(bits[size * number : size * (number + 1)] * (mask >> number & 1) for number in range(PARTS))
