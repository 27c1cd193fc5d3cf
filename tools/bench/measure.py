"""Comparative timing: every implementation runs once per round, and ratios are computed within a round.

A machine's speed drifts, but little within one round, so the median of the rounds' ratios is reported.
"""

import statistics
import time
from collections.abc import Callable, Mapping


def time_rounds(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    finish: Callable[[], object] = lambda: None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each function in each round.

    Args:
        candidates: the functions to time, by name.
        rounds: number of rounds.
        finish: waits for the device to finish its work; called before and after each call.
        warm_up: run one round first, which is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(0 if warm_up else 1, rounds + 1):
        # The first function may find the caches in another state, so the order rotates with every round.
        names = list(candidates)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            finish()
            start = time.perf_counter()
            candidates[name]()
            finish()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def ratio(over: list[float], under: list[float]) -> float:
    """The median over the rounds of the ratio of two functions' times."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
