"""Pictures of what sampled clips show: adherence by attribute, and the clips themselves beside their captions."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("agg")

from matplotlib import pyplot
from PIL import Image

from small_world.adherence import Adherence, Request
from small_world.scenes import World

_GROUPS = {"trained": "combinations of training", "held-out": "combinations never trained on"}
_COLUMNS = 4
_FRAMES = 5  # of a clip
_GAP = 3  # pixels
_EXPLANATION = "* a combination never trained on; red: the clip does not show what its caption says"
_RIGHT, _WRONG = "#1a7f37", "#c4161c"


def draw_adherence(found: Mapping[str, Adherence], expected: float, path: Path) -> None:
    """Draw bars of adherence by attribute and in all of them, for scenes of training and for those held out."""
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    names = [*found["all"].by_attribute, "all at once"]
    width = 0.4
    for number, (group, label) in enumerate(_GROUPS.items()):
        one = found[group]
        shares = [*one.by_attribute.values(), one.all]
        places = np.arange(len(names)) + (number - 0.5) * width
        bars = axes.bar(places, [100 * share for share in shares], width, label=f"{label} ({one.count} clips)")
        axes.bar_label(bars, [f"{round(share * one.count)}/{one.count}" for share in shares], fontsize=8)
    axes.axhline(100 * expected, color="gray", linestyle=":", label=f"expected of both together: {expected:.0%}")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("clips that show what was asked for, %")
    axes.set_ylim(0, 109)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _strip(video: np.ndarray, height: int, width: int) -> np.ndarray:
    """Evenly chosen frames of a clip side by side, on white."""
    strip = np.full((height, _FRAMES * (width + _GAP), 3), 255, np.uint8)
    for column, time in enumerate(np.linspace(0, len(video) - 1, _FRAMES).round().astype(int)):
        frame = video[time]
        left = column * (width + _GAP)
        strip[: frame.shape[0], left : left + frame.shape[1]] = frame
    return strip


def draw_samples(
    world: World,
    asked: Sequence[Request],
    videos: Sequence[np.ndarray],
    seen: Sequence[Mapping[str, str | None]],
    path: Path,
) -> None:
    """Draw some frames of each clip below its caption: green if they show all of it, red with what they show if not.

    Args:
        world: of the scenes.
        asked: scenes, sizes and whether they are held out, which gets a star.
        videos: frames [T, H, W, 3] from 0 to 255, of each.
        seen: what was recognised in each, by attribute.
        path: a PNG.
    """
    height, width = (max(video.shape[axis] for video in videos) for axis in (1, 2))
    rows = -(-len(videos) // _COLUMNS)
    size = (_COLUMNS * (_FRAMES * (width + _GAP) + 10) / 100, (rows * (height + 24) + 20) / 100)
    figure, grid = pyplot.subplots(rows, _COLUMNS, figsize=size, squeeze=False, dpi=100)
    for axes in grid.flat:
        axes.axis("off")
    for axes, request, video, found in zip(grid.flat, asked, videos, seen, strict=False):
        values = world.values(request.scene)
        wrong = [found[name] or f"no {name}" for name in values if found[name] != values[name]]
        title = world.caption(request.scene) + " *" * request.held_out
        if wrong:
            title += f"; shows {', '.join(wrong)}"
        axes.set_title(title, fontsize=6.5, loc="left", pad=2, color=_WRONG if wrong else _RIGHT)
        axes.imshow(_strip(video, height, width), interpolation="nearest")
    figure.text(0.005, 0.995, _EXPLANATION, fontsize=7, va="top")
    figure.subplots_adjust(
        left=0.005, right=0.998, top=1 - 36 / (100 * size[1]), bottom=0.002, wspace=0.02, hspace=0.25
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    pyplot.close(figure)
    # 256 colours take a third of the bytes, and hardly differ.
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
