"""What decoded frames show, read by plain image analysis that knows nothing of captions, latents or models.

``recognise_pattern`` and ``recognise_object`` return the value of each attribute, or None where none is seen clearly.
"""

from collections.abc import Mapping, Sequence

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
# Of a frame from the drawing that is nearest, in distances between the pattern's colour and the background's.
# Reconstructions have at most 0.2.
_LARGEST_DISTANCE = 0.3


def _nearest(colour: Float[np.ndarray, "3"], named: Mapping[str, Colour]) -> str | None:
    distances = {name: float(np.linalg.norm(np.array(one) - colour)) for name, one in named.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= _FARTHEST else None


def _classes(colours: Float[np.ndarray, "... 3"]) -> np.ndarray:
    """The number of the nearest named colour of each; backgrounds follow the colours."""
    named = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
    return np.linalg.norm(colours[..., None, :] - named, axis=-1).argmin(-1)


# -- patterns ---------------------------------------------------------------------------------------------------------

_ABSENT = ("", 0)


def _templates() -> dict[tuple[str, int], Float[np.ndarray, "P P"]]:
    """By pattern and shift how much of each pixel of a cell it covers; nothing where there is none."""
    patterns = {
        (name, shift): coverage(name, PERIOD, PERIOD, shift=float(shift))
        for name in PATTERN_NAMES
        for shift in range(0, PERIOD, 4)
    }
    return {_ABSENT: np.zeros((PERIOD, PERIOD), np.float32), **patterns}


_TEMPLATES = _templates()


def _two_colours(classes: np.ndarray) -> tuple[int, int] | None:
    """Of the pattern and of the background the colour that most pixels have; None where no pixel has one of either."""
    counts = np.bincount(classes.ravel(), minlength=len(COLOURS) + len(BACKGROUNDS))
    front, back = int(counts[: len(COLOURS)].argmax()), len(COLOURS) + int(counts[len(COLOURS) :].argmax())
    return (front, back) if counts[front] and counts[back] else None


def recognise_pattern(video: Video) -> Seen:
    """The attributes of a clip of ``scenes.PATTERNS``.

    Every cell of a frame must show the same: of all patterns and shifts, and of none, each frame shows the one that
    differs least from it, and so does each of its cells. Every frame must show what the event has at its time.

    Args:
        video: levels from 0 to 255; height and width are multiples of 16.

    Returns:
        By attribute the value that is seen, or None.
    """
    video = np.asarray(video, np.float32)
    seen: Seen = dict.fromkeys(("colour", "pattern", "event", "background"))
    classes = _classes(video)
    if (pair := _two_colours(classes)) is None:
        return seen
    front, back = pair
    front_level, back_level = (np.median(video[classes == one], axis=0) for one in pair)
    frames, height, width = video.shape[:3]
    cells = video.reshape(frames, height // PERIOD, PERIOD, width // PERIOD, PERIOD, 3).swapaxes(2, 3)
    keys, templates = list(_TEMPLATES), np.stack(list(_TEMPLATES.values()))
    drawn = back_level + templates[..., None] * (front_level - back_level)
    distances = np.stack([np.linalg.norm(cells - one, axis=-1).mean((-1, -2)) for one in drawn], axis=-1)
    distances /= np.linalg.norm(front_level - back_level)
    found, fronts, backs = [], [], []
    for frame, of_cells in zip(cells, distances, strict=True):
        best = int(of_cells.mean((0, 1)).argmin())
        template = templates[best]
        backs.append((_classes(frame[:, :, template < 0.1].mean(2)) == back).all())
        if template.any():
            fronts.append((_classes(frame[:, :, template > 0.9].mean(2)) == front).all())
        clear = (of_cells.argmin(-1) == best).all() and of_cells[..., best].mean() <= _LARGEST_DISTANCE
        found.append(keys[best] if clear else None)
    if all(backs):
        seen["background"] = [*BACKGROUNDS][back - len(COLOURS)]
    if all(fronts) and set(found) - {_ABSENT, None}:
        seen["colour"] = [*COLOURS][front]
    names = {one[0] for one in found if one not in (_ABSENT, None)}
    if len(names) == 1:
        seen["pattern"] = name = names.pop()
        for event, expected in EVENTS.items():
            if found == [(name, shift) if there else _ABSENT for there, shift in expected]:
                seen["event"] = event
    return seen


# -- objects ----------------------------------------------------------------------------------------------------------

_LEAST_DISTANCE = 40.0  # of the object from the background, in levels
_AREAS = (120, 700)  # pixels
_LEAST_TRAVEL = 6.0  # pixels from the first to the last frame
_FARTHEST_STRAY = 2.0  # pixels of a frame's object from uniform motion


def _shape_of(weights: Float[np.ndarray, "H W"], fill: float) -> str:
    """The shape from angular moments about the centroid: a disc has none, a triangle the third, a square the fourth."""
    rows, columns = np.mgrid[: weights.shape[0], : weights.shape[1]]
    weights = np.where(weights > 0.3, weights, 0)
    total = weights.sum()
    place = (columns - (columns * weights).sum() / total) + 1j * (rows - (rows * weights).sum() / total)
    weights = np.where(np.abs(place) < 17, weights, 0)

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
    if len(places) < len(video):
        return seen
    seen["colour"] = _common([_nearest(colour, COLOURS) for colour in colours], missed=1)
    if len(shapes) == len(video):
        seen["shape"] = _common(shapes, missed=2)  # a square is told from a disc by its soft corners
    times, *along = np.array(places).T
    fits = [np.polyfit(times, one, 1) for one in along]
    strays = max(float(np.abs(np.polyval(fit, times) - one).max()) for fit, one in zip(fits, along, strict=True))
    right_, down_ = (float(fit[0]) * (len(video) - 1) for fit in fits)
    straight = max(abs(right_), abs(down_)) >= max(_LEAST_TRAVEL, 2 * min(abs(right_), abs(down_)))
    if straight and strays <= _FARTHEST_STRAY:
        across_most = abs(right_) > abs(down_)
        seen["direction"] = ("right" if right_ > 0 else "left") if across_most else ("down" if down_ > 0 else "up")
    return seen


def _common(values: Sequence[str | None], missed: int) -> str | None:
    """The value of all frames but a few."""
    value = max(sorted({one for one in values if one is not None}), key=values.count, default=None)
    return value if values.count(value) >= len(values) - missed else None


def recognise(world: World, video: Video) -> Seen:
    """The attributes of a clip of a world."""
    return recognise_object(video) if world is OBJECTS else recognise_pattern(video)


def right(world: World, video: Video, scene: Scene) -> dict[str, bool]:
    """By attribute whether a clip shows what its scene has."""
    seen = recognise(world, video)
    return {name: seen[name] == value for name, value in world.values(scene).items()}
