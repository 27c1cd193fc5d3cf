"""This process among those that torchrun, or our launcher, has started; and its share of the processors."""

import os


def _number(name: str, otherwise: int, least: int) -> int:
    value = os.environ.get(name, "")
    if not value:
        return otherwise
    if not value.isdecimal() or int(value) < least:
        raise ValueError(
            f"the environment variable {name} is {value!r}; expected a number of at least {least}, as torchrun sets it"
        )
    return int(value)


def world_size() -> int:
    """The number of processes of the run: WORLD_SIZE, or 1.

    Raises:
        ValueError: the variable is no such number; likewise below.
    """
    return _number("WORLD_SIZE", 1, 1)


def rank() -> int:
    """The number of this process in the run: RANK, or 0."""
    return _number("RANK", 0, 0)


def local_rank(otherwise: int = 0) -> int:
    """The number of this process on its machine: LOCAL_RANK, or ``otherwise``."""
    return _number("LOCAL_RANK", otherwise, 0)


def local_world_size() -> int:
    """The number of processes of the run on this machine: LOCAL_WORLD_SIZE, or 1."""
    return _number("LOCAL_WORLD_SIZE", 1, 1)


def processors() -> int:
    """The processors that this process may use, which a container or Slurm restricts; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1
