"""How many sampled videos show what their captions say, by attribute.

``requests`` chooses captions, sizes and seeds, as lines of a file of prompts for ``wan-infer``; ``measure`` reads the
videos. A third of the captions are of scenes that training never saw.
"""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from small_world.clips import read_video
from small_world.recognition import right
from small_world.scenes import FRAMES, Scene, World

COUNT = 48


@dataclasses.dataclass(frozen=True)
class Request:
    """A video to sample.

    Attributes:
        scene: what the prompt describes.
        held_out: whether training never saw the scene.
        size: height and width.
        seed: of the noise.
    """

    scene: Scene
    held_out: bool
    size: tuple[int, int]
    seed: int

    def line(self, world: World) -> dict[str, Any]:
        """The object of a line of ``wan-infer --prompts-file``."""
        height, width = self.size
        return {
            "prompt": world.caption(self.scene),
            "size": f"{width}*{height}",
            "frames": FRAMES,
            "seed": self.seed,
        }


@dataclasses.dataclass(frozen=True)
class Adherence:
    """A table of shares, each from 0 to 1.

    Attributes:
        count: of videos.
        by_attribute: share of videos that show the attribute's value.
        all: share of videos that show all of them.
    """

    count: int
    by_attribute: dict[str, float]
    all: float


def requests(world: World, count: int = COUNT, seed: int = 1000) -> list[Request]:
    """Requests, a third of them of held-out scenes, each scene as often as the others."""
    generator = random.Random(seed)

    def some(scenes: Sequence[Scene], wanted: int) -> list[Scene]:
        rows: list[Scene] = []
        while len(rows) < wanted:
            rows += generator.sample(scenes, len(scenes))
        return rows[:wanted]

    held_out = some(world.held_out(), count // 3)
    chosen = [(scene, True) for scene in held_out]
    chosen += [(scene, False) for scene in some(world.trained(), count - len(held_out))]
    return [
        Request(scene, never_seen, world.sizes[number % len(world.sizes)], seed + number)
        for number, (scene, never_seen) in enumerate(chosen)
    ]


def table(world: World, asked: Sequence[Request], videos: Sequence[np.ndarray]) -> dict[str, Adherence]:
    """Adherence of ``all`` videos, and of those of ``trained`` and of ``held-out`` scenes."""
    rows = [right(world, video, request.scene) for request, video in zip(asked, videos, strict=True)]

    def of(chosen: list[dict[str, bool]]) -> Adherence:
        by_attribute = {name: sum(row[name] for row in chosen) / len(chosen) for name in world.attributes}
        return Adherence(len(chosen), by_attribute, sum(all(row.values()) for row in chosen) / len(chosen))

    groups = {
        "all": rows,
        "trained": [row for request, row in zip(asked, rows, strict=True) if not request.held_out],
        "held-out": [row for request, row in zip(asked, rows, strict=True) if request.held_out],
    }
    return {name: of(chosen) for name, chosen in groups.items() if chosen}


def measure(world: World, asked: Sequence[Request], files: Sequence[Path]) -> dict[str, Adherence]:
    """See ``table``; the videos are files, in the order of the requests."""
    return table(world, asked, [read_video(path) for path in files])
