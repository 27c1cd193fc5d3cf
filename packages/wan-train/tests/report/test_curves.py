"""What is drawn is what was logged: thinned, smoothed, on other axes."""

import math
from array import array
from pathlib import Path

import numpy as np
import pytest
from report_runs import entry, validation, write_run

from wan_train.report.curves import charts_of, clock, half_lives, smooth, thin
from wan_train.report.run_log import Curve, RunLog


def curve_of(steps: list[int], values: list[float]) -> Curve:
    return Curve(array("q", steps), array("d", values))


def test_smoothing_is_the_weighted_mean_of_what_came_before() -> None:
    generator = np.random.default_rng(0)
    steps = np.cumsum(generator.integers(1, 9, 60))
    values = generator.normal(size=60)
    smoothed = smooth(curve_of(steps.tolist(), values.tolist()), 10.0)
    for i, step in enumerate(steps):
        weights = 0.5 ** ((step - steps[: i + 1]) / 10.0)
        assert smoothed.values[i] == pytest.approx(np.average(values[: i + 1], weights=weights), rel=1e-12)
    assert list(smoothed.steps) == steps.tolist()


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    with_gap = smooth(curve_of([1, 2, 3], [4.0, math.nan, 2.0]), 2.0)
    assert (list(with_gap.steps), list(with_gap.values)) == ([1, 3], [4.0, pytest.approx((4 * 0.5 + 2) / 1.5)])


def test_half_lives_suit_the_length_of_the_run() -> None:
    assert half_lives(5) == []
    assert half_lives(60) == [2, 5, 10, 20]
    assert half_lives(30_000) == [500, 1000, 2000, 5000, 10_000]


def test_a_thinned_curve_keeps_its_ends_and_its_peaks() -> None:
    count = 100_000
    values = np.sin(np.arange(count) / 7000)
    values[31_415], values[27_182], values[500] = 9.0, -9.0, math.nan
    curve = curve_of(list(range(count)), values.tolist())
    thinned = thin(curve, 1000)
    assert 500 < len(thinned.steps) <= 1002
    assert (thinned.steps[0], thinned.steps[-1]) == (0, count - 1)
    found = dict(zip(thinned.steps, thinned.values, strict=True))
    assert (found[31_415], found[27_182]) == (9.0, -9.0)
    assert all(value == values[step] for step, value in found.items())
    assert list(found) == sorted(found)
    assert thin(curve_of([1, 2], [1.0, 2.0]), 2).steps == array("q", [1, 2])
    hole = thin(curve_of(list(range(10)), [math.nan] * 10), 4)
    assert hole.steps[0] == 0
    assert all(map(math.isnan, hole.values))


def test_every_key_has_a_chart_and_what_is_absent_is_said(tmp_path: Path) -> None:
    more = validation(1, {"900": 1.0, "50": 1.0, "odd": 1.0})
    log = RunLog(write_run(tmp_path, [entry(1, sampling_seconds=3.0), more]))
    charts, absent = charts_of(set(log.curves))
    by_title = {chart.title: chart for chart in charts}
    at = [f"validation.timesteps.{key}" for key in ("50", "900", "odd")]
    assert by_title["Validation loss by timestep"].keys == ["validation.loss", *at]
    assert by_title["sampling_seconds"].keys == ["sampling_seconds"]
    assert absent == ["Caption gap"]
    for title in ("Loss", "Gradient norm", "Learning rate", "Tokens per second", "Packing efficiency", "Data wait"):
        assert len(by_title[title].keys) == 1, title
    assert by_title["Peak memory"].scale == 1e-9
    assert charts_of(set()) == ([], ["Loss", "Validation loss by timestep", *absent, *(
        "Gradient norm", "Learning rate", "Tokens per second", "Model FLOPs utilisation (MFU)",
        "Throughput of a device", "Packing efficiency", "Data wait", "Time of an entry's steps", "Peak memory",
    )])  # fmt: skip


@pytest.mark.parametrize(
    "gap", [{"step": 2, "caption_gap": 2.0}, {"event": "caption_gap", "step": 2, "caption_gap": 2.0}]
)
def test_a_caption_gap_is_drawn_wherever_it_is_logged(gap: dict[str, float], tmp_path: Path) -> None:
    log = RunLog(write_run(tmp_path, [entry(1), gap]))
    charts, _ = charts_of(set(log.curves))
    (key,) = next(chart.keys for chart in charts if chart.title == "Caption gap")
    assert list(log.curves[key].values) == [2.0]


def test_the_other_axes_are_sums_over_the_log(tmp_path: Path) -> None:
    entries = [entry(step, tokens=10 * step, seconds=float(step)) for step in (5, 10, 15)]
    time = clock(RunLog(write_run(tmp_path, entries)).curves)
    assert time == {"step": [0, 5, 10, 15], "tokens": [0, 50, 150, 300], "hours": [0, *(s / 3600 for s in (5, 15, 30))]}
    many = [entry(step, tokens=1) for step in range(1, 5002)]
    long = clock(RunLog(write_run(tmp_path / "long", many)).curves)
    assert len(long["step"]) < 2002
    assert (long["step"][-1], long["tokens"][-1]) == (5001, 5001)
    assert all(step == tokens for step, tokens in zip(long["step"], long["tokens"], strict=True))
