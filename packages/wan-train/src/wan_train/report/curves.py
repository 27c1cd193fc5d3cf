"""What is drawn of a run's curves: smoothed, and thinned where they have more points than a page should hold."""

import bisect
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wan_train.report.run_log import Curve

# A chart is some hundred pixels wide.
MOST_POINTS = 2000
_HALF_LIVES = (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000)
_NO_CHART = {"samples", "tokens", "tokens_padded", "flops", "save_seconds"}
CAPTION_GAP = "caption_gap"


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        title: of the chart.
        keys: curves that it draws, as ``RunLog.curves`` has them.
        unit: of the vertical axis.
        scale: values are multiplied by it.
        logarithmic: whether the vertical axis is.
        smoothed: whether the curve is drawn smoothed too.
    """

    title: str
    keys: Sequence[str]
    unit: str = ""
    scale: float = 1.0
    logarithmic: bool = False
    smoothed: bool = False


CHARTS = (
    Chart("Loss", ["loss"], smoothed=True),
    Chart("Validation loss by timestep", ["validation.loss"]),  # and those at the timesteps, see charts_of
    Chart("Caption gap", [CAPTION_GAP, f"validation.{CAPTION_GAP}", f"{CAPTION_GAP}.{CAPTION_GAP}"]),
    Chart("Gradient norm", ["grad_norm"], logarithmic=True),
    Chart("Learning rate", ["learning_rate"]),
    Chart("Tokens per second", ["tokens_per_second"], "tokens/s"),
    Chart("Model FLOPs utilisation (MFU)", ["mfu"], "%", 100),
    Chart("Throughput of a device", ["tflops_per_device"], "TFLOP/s"),
    Chart("Packing efficiency", ["packing_efficiency"], "%", 100),
    Chart("Data wait", ["data_wait"], "s"),
    Chart("Time of an entry's steps", ["seconds"], "s"),
    Chart("Peak memory", ["peak_memory"], "GB", 1e-9),
)
_AT_TIMESTEP = "validation.timesteps."


def _timestep(key: str) -> float:
    try:
        return float(key.removeprefix(_AT_TIMESTEP))
    except ValueError:
        return math.inf


def charts_of(keys: set[str]) -> tuple[list[Chart], list[str]]:
    """The charts for what the logs have, and the titles of those for which they have nothing."""
    at = sorted((key for key in keys if key.startswith(_AT_TIMESTEP)), key=lambda key: (_timestep(key), key))
    known = {key for chart in CHARTS for key in chart.keys} | set(at) | _NO_CHART | {"validation.samples"}
    charts, absent = [], []
    for chart in CHARTS:
        wanted = [*chart.keys, *at] if "validation.loss" in chart.keys else chart.keys
        found = [key for key in wanted if key in keys]
        if found:
            charts.append(Chart(chart.title, found, chart.unit, chart.scale, chart.logarithmic, chart.smoothed))
        else:
            absent.append(chart.title)
    return charts + [Chart(key, [key]) for key in sorted(keys - known)], absent


def thin(curve: Curve, most: int = MOST_POINTS) -> Curve:
    """At most about ``most`` points: first and last, and of each stretch the lowest and the highest, so peaks stay."""
    count = len(curve.steps)
    if count <= most:
        return curve
    kept = {0, count - 1}
    stretches = max(1, most // 2)
    for number in range(stretches):
        part = range(number * count // stretches, (number + 1) * count // stretches)
        finite = [i for i in part if not math.isnan(curve.values[i])]
        if finite:
            kept |= {min(finite, key=curve.values.__getitem__), max(finite, key=curve.values.__getitem__)}
        else:
            kept.add(part[0])
    chosen = sorted(kept)
    return Curve(array("q", (curve.steps[i] for i in chosen)), array("d", (curve.values[i] for i in chosen)))


def half_lives(last_step: int) -> list[int]:
    """Half-lives of smoothing that suit a run of that many steps, ascending: at most five."""
    return [steps for steps in _HALF_LIVES if steps <= last_step / 3][-5:]


def smooth(curve: Curve, half_life: float) -> Curve:
    """The mean of the values so far, in which a value's weight halves in ``half_life`` steps.

    At step ``t``: sum of ``v[i] * 2 ** (-(t - s[i]) / half_life)`` / sum of these weights; NaN is left out.
    """
    total = weight = 0.0
    before, steps, values = None, array("q"), array("d")
    for step, value in zip(curve.steps, curve.values, strict=True):
        if math.isnan(value):
            continue
        kept = 0.0 if before is None else 2.0 ** (-(step - before) / half_life)
        total, weight, before = total * kept + value, weight * kept + 1.0, step
        steps.append(step)
        values.append(total / weight)
    return Curve(steps, values)


def clock(curves: Mapping[str, Curve]) -> dict[str, list[float]]:
    """Cumulative tokens and hours of training by step, for the other horizontal axes."""
    result: dict[str, list[float]] = {"step": [0], "tokens": [0], "hours": [0.0]}
    steps = curves["loss"].steps if "loss" in curves else array("q")
    stride = -(-len(steps) // MOST_POINTS) or 1
    tokens = seconds = 0.0
    for i, step in enumerate(steps):
        tokens += _at(curves.get("tokens"), step)
        seconds += _at(curves.get("seconds"), step)
        if i % stride == stride - 1 or i == len(steps) - 1:
            for name, value in (("step", step), ("tokens", tokens), ("hours", seconds / 3600)):
                result[name].append(value)
    return result


def _at(curve: Curve | None, step: int) -> float:
    if curve is None:
        return 0.0
    place = bisect.bisect_left(curve.steps, step)
    if place == len(curve.steps) or curve.steps[place] != step or math.isnan(curve.values[place]):
        return 0.0
    return curve.values[place]


def plain(curve: Curve) -> dict[str, list[Any]]:
    """For JSON, which has no NaN: null, where a line has a gap."""
    return {"step": list(curve.steps), "value": [None if math.isnan(value) else value for value in curve.values]}


def not_finite(curve: Curve) -> list[int]:
    """The steps at which the log has a number that cannot be drawn: not finite, or beyond 1e100."""
    return [step for step, value in zip(curve.steps, curve.values, strict=True) if math.isnan(value)]
