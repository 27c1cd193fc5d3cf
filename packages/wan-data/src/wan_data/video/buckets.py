"""Aspect buckets: the sizes that clips are resized to, a few aspect ratios of one area."""

import dataclasses
import math

from wan_model.video_shape import SIDE_MULTIPLE

# Width over height. Portrait sizes are those of their inverses.
_LANDSCAPE = (1.0, 4 / 3, 3 / 2, 16 / 9, 21 / 9)


@dataclasses.dataclass(frozen=True, order=True)
class Size:
    """Pixels of a frame."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def _size_of_ratio(area: int, ratio: float) -> Size:
    # Of all pairs of multiples of 16 within the area, the smallest sum of aspect error and unused area.
    sides = range(SIDE_MULTIPLE, 3 * math.isqrt(area) + 1, SIDE_MULTIPLE)
    _, height, width = min(
        (round(abs(math.log(width / height / ratio)) + 1 - height * width / area, 9), height, width)
        for height in sides
        for width in sides
        if height * width <= area
    )
    return Size(height, width)


def buckets_of_area(area: int) -> tuple[Size, ...]:
    """The sizes, one per aspect ratio, of about the given area and never more.

    Args:
        area: pixels of a frame, at least 32 x 32.

    Raises:
        ValueError: the area is below 32 x 32 pixels.
    """
    if area < 4 * SIDE_MULTIPLE**2:
        raise ValueError(f"an area of {area} pixels is too small; it must be at least {4 * SIDE_MULTIPLE**2} (32x32)")
    ratios = [*_LANDSCAPE, *(1 / ratio for ratio in _LANDSCAPE[1:])]
    return tuple(sorted({_size_of_ratio(area, ratio) for ratio in ratios}))


def nearest_aspect(buckets: tuple[Size, ...], height: float, width: float) -> Size:
    """The bucket with the aspect ratio nearest to that of a frame as it is displayed."""

    def distance(bucket: Size) -> tuple[float, Size]:
        return round(abs(math.log(bucket.width / bucket.height / (width / height))), 9), bucket

    return min(buckets, key=distance)


def choose_bucket(resolutions: tuple[tuple[Size, ...], ...], height: float, width: float) -> Size:
    """The bucket for a frame: the nearest aspect ratio of the largest resolution that needs no upscaling.

    Args:
        resolutions: the buckets of each resolution, smallest first.
        height, width: of the frame as it is displayed.

    Returns:
        A bucket; one of the smallest resolution if all of them need upscaling.
    """
    chosen = nearest_aspect(resolutions[0], height, width)
    for buckets in resolutions[1:]:
        larger = nearest_aspect(buckets, height, width)
        if enlargement(larger, height, width) <= 1:
            chosen = larger
    return chosen


def enlargement(bucket: Size, height: float, width: float) -> float:
    """The factor by which a frame is scaled to cover the bucket; above 1 it is upscaled."""
    return max(bucket.height / height, bucket.width / width)
