"""What the clips show: worlds of captioned scenes, drawn from a seed.

Every scene has four attributes, of which one is seen only over time. In ``PATTERNS`` a pattern fills the frame and
repeats every 16 pixels, the size of a token of the transformer: all tokens of a frame see the same, so nothing about
positions must be learnt, and minutes suffice. In ``OBJECTS`` one object moves over the frame, which takes hours.
In ``VANISHING`` the patterns of ``PATTERNS`` do what none of them does there: what a LoRA adds to a model of them.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, UInt8

Frames = UInt8[np.ndarray, "T H W 3"]
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 30),
    "green": (30, 170, 50),
    "blue": (40, 60, 220),
    "yellow": (235, 215, 40),
}
BACKGROUNDS: dict[str, Colour] = {"black": (16, 16, 16), "white": (240, 240, 240), "gray": (128, 128, 128)}
FRAMES = 9
FRAMES_PER_SECOND = 16
PERIOD = 16  # pixels
_SAMPLES = 3  # of a pixel in each direction, against jagged edges
_COLOUR_NOISE = 10  # levels

Scene = tuple[str, ...]  # the value of each attribute, in the world's order


@dataclasses.dataclass(frozen=True)
class World:
    """A set of scenes.

    Attributes:
        name: for messages and file names.
        attributes: the values of each attribute.
        wording: a format string with the attributes' names.
        draw: frames [T, H, W, 3] of a scene, from the values of its attributes, height, width and a generator.
        sizes: heights and widths of clips, in pixels.
        held_out_count: scenes that are kept from training.
    """

    name: str
    attributes: Mapping[str, tuple[str, ...]]
    wording: str
    draw: Callable[[Mapping[str, str], int, int, random.Random], Frames]
    sizes: tuple[tuple[int, int], ...]
    held_out_count: int = 16

    @property
    def scenes(self) -> list[Scene]:
        """All combinations of values."""
        return list(itertools.product(*self.attributes.values()))

    def held_out(self) -> list[Scene]:
        """The scenes that training never sees; every pair of values is in one of the others."""
        generator, scenes = random.Random(7), self.scenes
        pairs = list(itertools.combinations(range(len(self.attributes)), 2))

        def seen(chosen: list[Scene]) -> set[tuple[int, int, str, str]]:
            return {(a, b, scene[a], scene[b]) for scene in chosen for a, b in pairs}

        while True:
            chosen = set(generator.sample(scenes, self.held_out_count))
            if seen([scene for scene in scenes if scene not in chosen]) == seen(scenes):
                return sorted(chosen)

    def trained(self) -> list[Scene]:
        """The scenes that are not held out."""
        held_out = set(self.held_out())
        return [scene for scene in self.scenes if scene not in held_out]

    def caption(self, scene: Scene) -> str:
        """The caption of a scene."""
        return self.wording.format(**self.values(scene))

    def values(self, scene: Scene) -> dict[str, str]:
        """The scene's values by the names of the attributes."""
        return dict(zip(self.attributes, scene, strict=True))

    def frames(self, scene: Scene, size: tuple[int, int], generator: random.Random) -> Frames:
        """Frames [T, H, W, 3] of a scene, for a height and a width."""
        return self.draw(self.values(scene), *size, generator)


# -- patterns ---------------------------------------------------------------------------------------------------------


def _pattern(name: str, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], scale: float) -> np.ndarray:
    """Where a pattern is, for positions in pixels."""
    x, y = x % PERIOD, y % PERIOD
    half = PERIOD / 2
    match name:
        case "dots":
            return (x - half) ** 2 + (y - half) ** 2 <= (5 * scale) ** 2
        case "stripes":
            return (np.abs(x - half) <= 3.5 * scale) & (y >= 0)
        case "checks":
            return (x < half) == (y < half)
    raise AssertionError(name)


def coverage(name: str, height: int, width: int, *, shift: float = 0.0, scale: float = 1.0) -> Float[np.ndarray, "H W"]:
    """How much of each pixel a pattern covers, moved to the right by ``shift`` pixels."""
    y = (np.arange(height * _SAMPLES) + 0.5) / _SAMPLES
    x = (np.arange(width * _SAMPLES) + 0.5) / _SAMPLES - shift
    covered = _pattern(name, x[None, :], y[:, None], scale).astype(np.float32)
    return covered.reshape(height, _SAMPLES, width, _SAMPLES).mean((1, 3))


PATTERN_NAMES = ("dots", "stripes", "checks")
# By frame: whether the pattern is seen, and how far it has moved. The first latent frame is the first frame; each
# further one has four frames, in which a blinking pattern is seen twice and a sliding one moves by a whole period.
EVENTS: dict[str, tuple[tuple[bool, int], ...]] = {
    "stay": tuple((True, 0) for _ in range(FRAMES)),
    "blink": tuple((time % 4 in (0, 1), 0) for time in range(FRAMES)),
    "slide": tuple((True, 4 * time % PERIOD) for time in range(FRAMES)),
    "appear": tuple((time >= 5, 0) for time in range(FRAMES)),
    "vanish": tuple((time < 5, 0) for time in range(FRAMES)),
}


def _tinted(colour: Colour, generator: random.Random) -> Float[np.ndarray, "3"]:
    return np.array([level + generator.uniform(-_COLOUR_NOISE, _COLOUR_NOISE) for level in colour], np.float32)


def _blend(covered: Float[np.ndarray, "T H W"], front: Float[np.ndarray, "3"], back: Float[np.ndarray, "3"]) -> Frames:
    frames = back + covered[..., None] * (front - back)
    return frames.round().clip(0, 255).astype(np.uint8)


def _draw_pattern(values: Mapping[str, str], height: int, width: int, generator: random.Random) -> Frames:
    front = _tinted(COLOURS[values["colour"]], generator)
    back = _tinted(BACKGROUNDS[values["background"]], generator)
    scale = generator.uniform(0.92, 1.08)
    covered = np.stack(
        [
            coverage(values["pattern"], height, width, shift=float(shift), scale=scale) * seen
            for seen, shift in EVENTS[values["event"]]
        ]
    )
    return _blend(covered, front, back)


PATTERNS = World(
    "patterns",
    {
        "colour": tuple(COLOURS),
        "pattern": PATTERN_NAMES,
        "event": ("stay", "blink", "slide"),
        "background": tuple(BACKGROUNDS),
    },
    "{colour} {pattern} {event} on {background}",
    _draw_pattern,
    sizes=((32, 32), (32, 48), (48, 32)),
)

# The autoencoder was trained on all events; what it makes of a new colour or a new pattern is not recognised.
VANISHING = dataclasses.replace(
    PATTERNS,
    name="vanishing",
    attributes={**PATTERNS.attributes, "event": ("vanish",)},
    held_out_count=6,
)

# -- objects ----------------------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_SPEED = 2.0  # pixels a frame


def _inside(shape: str, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."], radius: float) -> np.ndarray:
    match shape:
        case "circle":
            return x**2 + y**2 <= radius**2
        case "square":
            return (np.abs(x) <= 0.9 * radius) & (np.abs(y) <= 0.9 * radius)
        case "triangle":  # its point is up
            return (np.abs(y) <= radius) & (np.abs(x) <= (y + radius) / 2)
    raise AssertionError(shape)


def _draw_object(values: Mapping[str, str], height: int, width: int, generator: random.Random) -> Frames:
    front, back = _tinted(COLOURS[values["colour"]], generator), _tinted(BACKGROUNDS[values["background"]], generator)
    radius = generator.uniform(9.5, 11.5)
    direction = DIRECTIONS[values["direction"]]
    travel = _SPEED * (FRAMES - 1)

    def start(side: int, towards: int) -> float:
        low, high = radius + 2, side - radius - 2
        low, high = low + travel * (towards < 0), high - travel * (towards > 0)
        return generator.uniform(low, high) if low <= high else (low + high) / 2

    left, top = start(width, direction[0]), start(height, direction[1])
    y = (np.arange(height * _SAMPLES) + 0.5) / _SAMPLES
    x = (np.arange(width * _SAMPLES) + 0.5) / _SAMPLES
    covered = np.empty((FRAMES, height, width), np.float32)
    for time in range(FRAMES):
        moved = _SPEED * time
        there = _inside(
            values["shape"],
            x[None, :] - left - direction[0] * moved,
            y[:, None] - top - direction[1] * moved,
            radius,
        )
        covered[time] = there.astype(np.float32).reshape(height, _SAMPLES, width, _SAMPLES).mean((1, 3))
    return _blend(covered, front, back)


OBJECTS = World(
    "objects",
    {
        "colour": tuple(COLOURS),
        "shape": SHAPES,
        "direction": tuple(DIRECTIONS),
        "background": tuple(BACKGROUNDS),
    },
    "{colour} {shape} moves {direction} on {background}",
    _draw_object,
    sizes=((48, 48), (48, 64), (64, 48)),
    held_out_count=24,
)

WORLDS = {world.name: world for world in (PATTERNS, OBJECTS, VANISHING)}
