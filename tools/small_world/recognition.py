"""What decoded frames show, read by plain image analysis that knows nothing of captions, latents or models.

``recognise_pattern`` and ``recognise_object`` return the value of each attribute, or None where none is seen clearly.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Real

from small_world.scenes import (
    BACKGROUNDS,
    COLOURS,
    EVENTS,
    OBJECTS,
    PATTERN_NAMES,
    PERIOD,
    Colour,
    Scene,
    World,
    coverage,
)

Video = Real[np.ndarray, "T H W 3"]  # levels from 0 to 255
Seen = dict[str, str | None]

_FARTHEST = 100.0  # from a named colour, Euclidean, in levels
_SHIFTS = range(0, PERIOD, 4)
# Cells of a pattern beside their mean: mean absolute difference of coverage. White noise has 0.3 and more.
_LARGEST_SPREAD = 0.2
_LEAST_DEVIATION = 0.1  # of a pattern's coverage
_LEAST_CORRELATION = 0.75
_LEAST_CONTRAST = 0.4  # of a pattern: difference of coverage between where it is and where it is not


def _nearest(colour: Float[np.ndarray, "3"], named: Mapping[str, Colour]) -> str | None:
    distances = {name: float(np.linalg.norm(np.array(one) - colour)) for name, one in named.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= _FARTHEST else None


def _classes(video: Video) -> np.ndarray:
    """The nearest named colour of each pixel; backgrounds follow the colours."""
    named = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
    return np.linalg.norm(video[..., None, :] - named, axis=-1).argmin(-1)


# -- patterns ---------------------------------------------------------------------------------------------------------


def _templates() -> dict[tuple[str, int], Float[np.ndarray, "P P"]]:
    return {
        (name, shift): coverage(name, PERIOD, PERIOD, shift=float(shift)) for name in PATTERN_NAMES for shift in _SHIFTS
    }


_TEMPLATES = _templates()


def _pattern_of(covered: Float[np.ndarray, "H W"]) -> tuple[str, int] | None:
    """The pattern of a frame and its shift, from how much of each pixel has the colour; None if there is none."""
    height, width = covered.shape
    cells = covered.reshape(height // PERIOD, PERIOD, width // PERIOD, PERIOD)
    cell = cells.mean((0, 2))
    if np.abs(cells - cell[None, :, None, :]).mean() > _LARGEST_SPREAD or cell.std() < _LEAST_DEVIATION:
        return None
    correlations = {key: float(np.corrcoef(cell.ravel(), one.ravel())[0, 1]) for key, one in _TEMPLATES.items()}
    best = max(correlations, key=correlations.__getitem__)
    template = _TEMPLATES[best]
    contrast = cell[template > 0.9].mean() - cell[template < 0.1].mean()
    return best if correlations[best] >= _LEAST_CORRELATION and contrast >= _LEAST_CONTRAST else None


def recognise_pattern(video: Video) -> Seen:
    """The attributes of a clip of ``scenes.PATTERNS``.

    Args:
        video: levels from 0 to 255; height and width are multiples of 16.

    Returns:
        By attribute the value that is seen, or None.
    """
    video = np.asarray(video, np.float32)
    seen: Seen = dict.fromkeys(("colour", "pattern", "event", "background"))
    classes = _classes(video)
    counts = np.bincount(classes.ravel(), minlength=len(COLOURS) + len(BACKGROUNDS))
    fronts, backs = counts[: len(COLOURS)], counts[len(COLOURS) :]
    back_colour = np.median(video[classes == len(COLOURS) + backs.argmax()], axis=0) if backs.any() else None
    if back_colour is None or backs.max() < 0.1 * counts.sum():
        return seen
    seen["background"] = _nearest(back_colour, BACKGROUNDS)
    if fronts.max() < max(0.03 * counts.sum(), 0.8 * fronts.sum()):
        return seen
    front_colour = np.median(video[classes == fronts.argmax()], axis=0)
    seen["colour"] = _nearest(front_colour, COLOURS)
    axis = front_colour - back_colour
    covered = ((video - back_colour) @ axis / (axis @ axis)).clip(-0.5, 1.5)
    found = [_pattern_of(frame) for frame in covered]
    names = [one[0] for one in found if one is not None]
    if not names:
        return seen
    name = max(sorted(set(names)), key=names.count)
    if names.count(name) < 0.8 * len(names):
        return seen
    seen["pattern"] = name
    for event, frames in EVENTS.items():
        # A frame may be missed where a pattern comes or goes.
        if len(frames) == len(found):
            right = [
                one == ((name, shift) if there else None) for (there, shift), one in zip(frames, found, strict=True)
            ]
            if sum(right) >= len(frames) - 1:
                seen["event"] = event
    return seen


# -- objects ----------------------------------------------------------------------------------------------------------

_LEAST_DISTANCE = 40.0  # of the object from the background, in levels
_AREAS = (120, 700)  # pixels
_LEAST_TRAVEL = 6.0  # pixels from the first to the last frame


def _shape_of(weights: Float[np.ndarray, "H W"], fill: float) -> str:
    """The shape from angular moments about the centroid: a disc has none, a triangle the third, a square the fourth."""
    rows, columns = np.mgrid[: weights.shape[0], : weights.shape[1]]
    total = weights.sum()
    place = (columns - (columns * weights).sum() / total) + 1j * (rows - (rows * weights).sum() / total)
    weights = np.where((weights > 0.3) & (np.abs(place) < 17), weights, 0)

    def moment(order: int) -> complex:
        return complex((weights * place**order).sum() / (weights * np.abs(place) ** order).sum())

    if abs(moment(3)) > 0.13:
        return "triangle"
    return "square" if fill - moment(4).real > 0.97 else "circle"


def recognise_object(video: Video) -> Seen:
    """The attributes of a clip of ``scenes.OBJECTS``; see ``recognise_pattern``."""
    video = np.asarray(video, np.float32)
    seen: Seen = dict.fromkeys(("colour", "shape", "direction", "background"))
    border = np.concatenate(
        [video[:, rows, columns].reshape(-1, 3) for rows, columns in (
            (slice(2), slice(None)), (slice(-2, None), slice(None)), (slice(None), slice(2)),
            (slice(None), slice(-2, None)),
        )]
    )  # fmt: skip
    back = np.median(border, axis=0)
    seen["background"] = _nearest(back, BACKGROUNDS)
    distance = np.linalg.norm(video - back, axis=-1)
    places, colours, shapes = [], [], []
    for time, frame in enumerate(distance):
        strength = float(np.sort(frame.ravel())[-40])
        if strength < _LEAST_DISTANCE:
            continue
        weights = np.clip(frame / strength, 0, 1)
        mask = weights > 0.5
        rows, columns = np.where(mask.sum(1) >= 2)[0], np.where(mask.sum(0) >= 2)[0]
        if len(rows) < 4 or len(columns) < 4:
            continue
        colours.append(np.median(video[time][weights > 0.8], axis=0))
        inside = weights * mask
        across, down = np.arange(frame.shape[1]), np.arange(frame.shape[0])
        places.append((time, (inside.sum(0) @ across) / inside.sum(), (inside.sum(1) @ down) / inside.sum()))
        if _AREAS[0] <= mask.sum() <= _AREAS[1]:
            box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            shapes.append(_shape_of(weights, mask.sum() / box))
    if len(places) < 0.7 * len(video):
        return seen
    seen["colour"] = _nearest(np.median(colours, axis=0), COLOURS)
    if len(shapes) >= 0.7 * len(video):
        seen["shape"] = max(sorted(set(shapes)), key=shapes.count)
    times, x, y = np.array(places).T
    right, down_ = (float(np.polyfit(times, along, 1)[0]) * (len(video) - 1) for along in (x, y))
    if max(abs(right), abs(down_)) >= max(_LEAST_TRAVEL, 2 * min(abs(right), abs(down_))):
        across_most = abs(right) > abs(down_)
        seen["direction"] = ("right" if right > 0 else "left") if across_most else ("down" if down_ > 0 else "up")
    return seen


def recognise(world: World, video: Video) -> Seen:
    """The attributes of a clip of a world."""
    return recognise_object(video) if world is OBJECTS else recognise_pattern(video)


def right(world: World, video: Video, scene: Scene) -> dict[str, bool]:
    """By attribute whether a clip shows what its scene has."""
    seen = recognise(world, video)
    return {name: seen[name] == value for name, value in world.values(scene).items()}
