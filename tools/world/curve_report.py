"""The curve of adherence over the time of training as a table and as a picture."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

from common.markdown_table import markdown_table


def percent(share: float) -> str:
    """A share as a cell."""
    return f"{100 * share:.0f} %"


def uncertainty(count: int) -> str:
    """How far a share of so many videos may be off."""
    return f"A share of {count} videos has a standard error of up to {50 / count**0.5:.0f} percentage points."


def gap(value: float | None) -> str:
    """A caption gap as a cell."""
    return "-" if value is None else f"{value:.2f}"


def markdown(result: Mapping[str, Any]) -> str:
    """The table, a row for each checkpoint, below what was run.

    Args:
        result: see ``world.curve.run``.
    """
    points = result["points"]
    attributes = list(points[0]["adherence"]["all"]["by_attribute"])
    columns = ["step", "seconds of training", "validation loss", "caption gap", *attributes, "all", "held-out, all"]
    rows = []
    for one in points:
        every, held_out = one["adherence"]["all"], one["adherence"]["held-out"]
        rows.append(
            [
                f"{one['step']:,}", f"{one['seconds']:,.0f}", f"{one['loss']:.4f}", gap(one["caption_gap"]),
                *(percent(every["by_attribute"][name]) for name in attributes),
                percent(every["all"]), percent(held_out["all"]),
            ]
        )  # fmt: skip
    count, held_out = (points[-1]["adherence"][name]["count"] for name in ("all", "held-out"))
    return (
        f"# The world of {result['world']}: adherence over the time of training\n\n"
        f"Shares of {count} sampled videos that show what their captions say, by attribute and in all of them at "
        f"once. {held_out} are of combinations that training never saw. {uncertainty(count)}\n\n"
        f"{markdown_table(columns, rows, aligned=True)}\n\n"
        f"```sh\n{shlex.join(result['train'])}\n{shlex.join(points[-1]['sample'])}\n```\n"
    )


def draw_curve(result: Mapping[str, Any], path: Path) -> None:
    """Draw a line for each attribute, and for all at once of all and of held-out videos, over minutes of training."""
    points = result["points"]
    minutes = [one["seconds"] / 60 for one in points]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in points[0]["adherence"]["all"]["by_attribute"]:
        shares = [100 * one["adherence"]["all"]["by_attribute"][name] for one in points]
        axes.plot(minutes, shares, marker=".", label=name)
    for group, style in (("all", "-"), ("held-out", ":")):
        shares = [100 * one["adherence"][group]["all"] for one in points]
        label = "all at once" if group == "all" else "all at once, combinations never trained on"
        axes.plot(minutes, shares, style, color="black", marker=".", linewidth=2, label=label)
    axes.set_xlabel("training, minutes")
    axes.set_ylabel("videos that show what was asked for, %")
    axes.set_xlim(left=0)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
