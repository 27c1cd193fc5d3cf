"""Timing side by side: every contender once a round, in turn, and ratios of the same round.

A machine's speed drifts; within one round it drifts little, so ratios are taken there and their median reported.
"""

import statistics
import time
from collections.abc import Callable, Mapping


def time_rounds(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    finish: Callable[[], object] = lambda: None,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round.

    Args:
        contenders: what to call, by name.
        rounds: how often.
        finish: waits until a call's work is done (a device's queue); called before and after each.
        warm_up: run one round before them, which is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(0 if warm_up else 1, rounds + 1):
        # Whoever comes first may find the caches in another state: the order turns with every round.
        names = list(contenders)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            finish()
            start = time.perf_counter()
            contenders[name]()
            finish()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def ratio(over: list[float], under: list[float]) -> float:
    """The median of one contender's times over another's, round by round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
