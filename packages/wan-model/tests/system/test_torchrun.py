"""What this process is told of the others, and of the processors."""

import os

import pytest

from wan_model.system import torchrun
from wan_model.system.launcher import environment

FUNCTIONS = {
    "WORLD_SIZE": torchrun.world_size,
    "RANK": torchrun.rank,
    "LOCAL_RANK": torchrun.local_rank,
    "LOCAL_WORLD_SIZE": torchrun.local_world_size,
}


def test_a_process_that_nobody_started_is_alone(monkeypatch):
    for name in FUNCTIONS:
        monkeypatch.delenv(name, raising=False)
    assert [function() for function in FUNCTIONS.values()] == [1, 0, 0, 1]
    assert torchrun.local_rank(3) == 3
    monkeypatch.setenv("WORLD_SIZE", "")  # as some job scripts leave it
    assert torchrun.world_size() == 1


def test_a_rank_of_the_launcher_is_what_it_was_started_as(monkeypatch):
    for name, value in environment(2, 5, 29500, {}).items():
        monkeypatch.setenv(name, value)
    assert [function() for function in FUNCTIONS.values()] == [5, 2, 2, 5]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("value", ["abc", "-1", "1.5", " 2"])
def test_what_is_no_number_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"the environment variable {name} is {value!r}; expected a number"):
        FUNCTIONS[name]()


def test_processors_are_those_that_the_process_may_use():
    allowed = os.sched_getaffinity(0)
    one = {min(allowed)}
    os.sched_setaffinity(0, one)
    try:
        assert torchrun.processors() == 1
        assert environment(0, 1, 29500, {})["OMP_NUM_THREADS"] == "1"
    finally:
        os.sched_setaffinity(0, allowed)
    assert torchrun.processors() == len(allowed)
