"""A plot of the loss curve, and checks of the images and the video that the run writes."""

from pathlib import Path

import av
import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

from quickstart.failure import require
from quickstart.training_log import TrainingLog


def draw_losses(runs: dict[str, TrainingLog], path: Path) -> None:
    """Draw the loss of each run over its steps, and a line where a run was resumed."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, log in runs.items():
        (line,) = axes.plot([entry["step"] for entry in log.steps], log.losses, marker=".", label=name)
        step = log.resumed_from()
        if step is not None:
            axes.axvline(step + 0.5, color=line.get_color(), linestyle=":", label=f"resumed from step {step}")
    axes.set_xlabel("step")
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
        QuickstartError: it does not have the requested size, or has only one colour.
    """
    require(path.is_file(), f"there is no video at {path}")
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    shape = (len(pictures), *pictures[0].shape[:2]) if pictures else (0, 0, 0)
    require(
        shape == (frames, height, width),
        f"{path} has frames x height x width of {shape}; asked for were {(frames, height, width)}",
    )
    deviation = float(pictures[0].std())
    require(deviation > 1.0, f"the first frame of {path} is of one colour (deviation {deviation:.2f} of 255)")
    return {"frames": frames, "height": height, "width": width, "deviation": round(deviation, 1)}


def check_picture(path: Path) -> None:
    """Check that the file is a PNG image.

    Raises:
        QuickstartError: it does not exist or cannot be decoded.
    """
    require(path.is_file(), f"there is no picture at {path}")
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    require(len(pictures) == 1 and pictures[0].size > 0, f"{path} holds no picture")
