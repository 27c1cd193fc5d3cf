"""A plot of the loss curve, and checks of the images and the video that the run writes."""

from pathlib import Path

import av
import matplotlib
import numpy as np

matplotlib.use("agg")

from matplotlib import pyplot
from PIL import Image

from common.failure import ToolFailure, require
from quickstart.training_log import TrainingLog

_SMOOTHED = 200  # steps; the loss of longer runs is drawn as a running mean too
_WINDOW = 25


def _running_mean(values: list[float]) -> list[float]:
    """The mean of each value and those before it, of at most ``_WINDOW``."""
    parts = [values[max(0, end - _WINDOW) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def draw_losses(runs: dict[str, TrainingLog], path: Path, *, one_after_another: bool = False) -> None:
    """Draw the loss of each run over its steps, a line where a run was resumed, and caption gaps if there are any.

    Args:
        runs: by name.
        path: a PNG.
        one_after_another: each run starts from the weights of the one before, and its steps are drawn after its.
    """
    gaps = any("caption_gap" in entry for log in runs.values() for entry in log.validations)
    figure, grid = pyplot.subplots(
        1 + gaps, figsize=(8, 4.5 + 1.5 * gaps), layout="constrained", sharex=True, squeeze=False,
        height_ratios=[3, 1][: 1 + gaps],
    )  # fmt: skip
    axes, *below = grid[:, 0]
    long = max(len(log.steps) for log in runs.values()) > _SMOOTHED
    before = 0
    for name, log in runs.items():
        steps = [before + entry["step"] for entry in log.steps]
        (line,) = axes.plot(steps, log.losses, marker=".", markersize=3, linestyle="" if long else "-",
                            alpha=0.25 if long else 1, label=None if long else name)  # fmt: skip
        if long:
            axes.plot(steps, _running_mean(log.losses), color=line.get_color(), label=f"{name} (mean of {_WINDOW})")
        step = log.resumed_from()
        if step is not None:
            axes.axvline(before + step + 0.5, color=line.get_color(), linestyle=":", label=f"resumed from step {step}")
        points = [entry for entry in log.validations if "caption_gap" in entry]
        for axis in below:
            places, values = [before + entry["step"] for entry in points], [entry["caption_gap"] for entry in points]
            axis.plot(places, values, marker="o", color=line.get_color())
            axis.set_ylabel("caption gap")
            axis.grid(alpha=0.3)
        before += len(steps) if one_after_another else 0
    (below or [axes])[-1].set_xlabel("step, of all runs together" if one_after_another else "step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check_video(path: Path, frames: int, height: int, width: int) -> dict[str, float | int]:
    """Decode the whole video and check it.

    Returns:
        Its frames, height and width, and the deviation of its pixel values (0 would be one flat colour).

    Raises:
        ToolFailure: it cannot be decoded, does not have the requested size, or has only one colour.
    """
    require(path.is_file(), f"there is no video at {path}")
    try:
        with av.open(str(path)) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise ToolFailure(f"{path} is no whole video: {error}") from None
    shape = (len(pictures), *pictures[0].shape[:2]) if pictures else (0, 0, 0)
    require(
        shape == (frames, height, width),
        f"{path} has frames x height x width of {shape}; asked for were {(frames, height, width)}",
    )
    deviation = float(pictures[0].std())
    require(deviation > 1.0, f"the first frame of {path} is of one colour (deviation {deviation:.2f} of 255)")
    return {"frames": frames, "height": height, "width": width, "deviation": round(deviation, 1)}


def check_picture(path: Path) -> None:
    """Check that the file is a whole PNG image of more than one colour.

    Raises:
        ToolFailure: it does not exist, cannot be decoded, or has only one colour.
    """
    require(path.is_file(), f"there is no picture at {path}")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # a broken PNG is a SyntaxError of Pillow
        raise ToolFailure(f"{path} is no whole PNG image: {error}") from None
    require(bool((pixels != pixels[0, 0]).any()), f"{path} is of one colour; expected a picture")
