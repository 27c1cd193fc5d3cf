"""Comparative timing: every implementation runs once per round, and ratios are computed within a round.

A machine's speed drifts, but little within one round, so the median of the rounds' ratios is reported.
"""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence


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


def run_process(command: Sequence[object], threads: int, **variables: str) -> tuple[float, str]:
    """Run a program.

    Args:
        command: with its arguments.
        threads: of its computations.
        variables: of the environment, besides those of this process.

    Returns:
        Seconds from its start to its end, and its standard output.

    Raises:
        RuntimeError: it failed; the message has the end of its errors.
    """
    arguments = list(map(str, command))
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **variables}
    start = time.perf_counter()
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    took = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:4])} failed: {done.stderr[-2000:]}")
    return took, done.stdout


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def ratio(over: list[float], under: list[float]) -> float:
    """The median over the rounds of the ratio of two functions' times."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))
