"""One pack is drawn ahead, and nobody but the clock can tell."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import RUN_OPTIONS, read_log, run, steps_of, trajectory
from warm_ranks import Call

from wan_model import LatentPack
from wan_model.tiny import TINY_CONFIG
from wan_train.data.mock_data import MockConfig, MockLoader
from wan_train.data.pack_iterator import PackIterator

SHAPES = MockConfig(shapes=[[1, 4, 4]], context_length=3)


class Numbers:
    """A loader that notes what it is asked for; its packs are named after their numbers.

    Args:
        bad: the pack in whose place there is an error.
        gate: what every pack but the first waits for.
    """

    def __init__(self, bad: int = -1, gate: threading.Event | None = None) -> None:
        self.bad, self.gate = bad, gate
        self.drawn, self.threads = 0, []
        self.loader = MockLoader(SHAPES, TINY_CONFIG, rank=0, ranks=1, multiple=1, seed=7)

    def __iter__(self) -> Iterator[LatentPack]:
        for pack in self.loader:
            self.threads.append(threading.current_thread())
            if self.gate is not None and len(self.threads) > 1:
                assert self.gate.wait(30)
            if len(self.threads) == self.bad + 1:
                raise ValueError(f"shard-{self.bad}.tar is damaged")
            yield pack

    def position(self) -> Callable[[], dict[str, Any]]:
        return self.loader.position()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "next pack"]


def test_the_next_pack_is_drawn_before_it_is_asked_for_and_the_first_in_the_main_thread() -> None:
    loader = Numbers()
    packs = PackIterator(loader, 0, 1)
    assert loader.threads == [], "nothing before a possible resume"
    for number in range(3):
        assert next(packs).number == number
        packs.settle()
        assert len(loader.threads) == number + 2
        assert running() == [], "a process that forks now has no other thread"
    assert loader.threads[0] is threading.main_thread()
    assert threading.main_thread() not in loader.threads[1:]


def test_a_step_does_not_wait_for_the_pack_after_its_own() -> None:
    gate = threading.Event()
    packs = PackIterator(Numbers(gate=gate), 0, 1)
    assert next(packs).number == 0  # although the loader does not return the next one
    assert len(running()) == 1
    gate.set()
    assert next(packs).number == 1
    packs.close()
    assert running() == []


@pytest.mark.parametrize("settled", [True, False])
def test_a_state_counts_the_packs_that_were_returned(settled: bool) -> None:
    whole = PackIterator(Numbers(), 1, 3)
    states, wanted = [whole.save_state()], []
    for _ in range(5):
        wanted.append(next(whole))
        if settled:
            whole.settle()
        states.append(whole.save_state())
    assert [state["drawn"] for state in states] == [0, 1, 2, 3, 4, 5]
    assert [state["loader"]["drawn"] for state in states] == [0, 1, 2, 3, 4, 5]
    assert [pack.number for pack in wanted] == [1, 4, 7, 10, 13]
    for done, state in enumerate(states[:-1]):
        resumed = PackIterator(Numbers(), 1, 3)
        resumed.resume(state, done)
        assert resumed.save_state() == state
        for one in wanted[done:]:
            got = next(resumed)
            assert got.number == one.number
            assert torch.equal(got.pack.tokens_SC, one.pack.tokens_SC)


def test_an_error_is_raised_by_the_step_that_its_pack_is_for() -> None:
    packs = PackIterator(Numbers(bad=2), 0, 1)
    assert [next(packs).number, next(packs).number] == [0, 1]
    packs.settle()
    assert packs.save_state()["loader"] == {"drawn": 2}, "the step before it can be saved"
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^shard-2\.tar is damaged$"):
            next(packs)
    assert running() == []


def test_a_position_that_cannot_be_asked_for_is_an_error_of_the_save() -> None:
    loader = Numbers()
    packs = PackIterator(loader, 0, 1)

    def refuse() -> Callable[[], dict[str, Any]]:
        raise TypeError("the loader's state holds a Thing, which cannot be saved")

    loader.position = refuse  # type: ignore[method-assign]
    next(packs)
    with pytest.raises(TypeError, match="which cannot be saved"):
        packs.save_state()


def test_the_end_of_a_run_does_not_wait_for_a_loader_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_train.data.pack_iterator._CLOSE_SECONDS", 0.01)
    gate = threading.Event()
    packs = PackIterator(Numbers(gate=gate), 0, 1)
    next(packs)
    packs.close()
    (thread,) = running()
    assert thread.daemon, "the interpreter does not wait for it either"
    gate.set()
    thread.join()


def test_packs_for_a_gpu_are_pinned_by_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, chosen = [], []

    def pin(self: LatentPack) -> LatentPack:
        pinned.append(threading.current_thread())
        return self

    monkeypatch.setattr(LatentPack, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    packs = PackIterator(Numbers(), 0, 1, pin=torch.device("cuda", 3))
    next(packs)
    next(packs)
    assert threading.main_thread() not in pinned
    assert set(chosen) == {torch.device("cuda", 3)}
    packs.settle()
    assert len(pinned) == 2


def test_a_run_draws_only_within_its_steps_and_waiting_for_a_pack_is_logged(
    one_process_run: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    calls = [Call("rank_calls:note_drawing_threads", (str(notes),))]
    ended = run((*RUN_OPTIONS, "train.exit_interval=2"), tmp_path / "run", calls=calls)
    assert ended.codes == [0], ended.errors
    found = [json.loads(line) for line in notes.read_text().splitlines()]
    # Two packs a step: the second one's successor is being drawn when the step has been computed.
    assert found == [["in a step", 1], ["between steps", 0]] * 2 + [["at the end", 0]]
    # For the second pack, and at the end of the step for the next one.
    waited = [entry["data_wait"] for entry in steps_of(read_log(tmp_path / "run"))]
    assert len(waited) == 2
    assert waited[0] >= 0.2
    assert waited[1] >= 0.3
    wanted = trajectory(one_process_run)
    assert trajectory(tmp_path / "run") == {step: wanted[step] for step in (1, 2)}
