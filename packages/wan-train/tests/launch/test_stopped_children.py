"""A worker of the loader or a writer of checkpoints that is stopped or killed ends the run; nothing would answer it."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version
from training_runs import BASE_OPTIONS, RUN_OPTIONS, data_options, read_log, sentence_of, start
from warm_ranks import Call, Ranks

from wan_model.system.process_tree import is_running
from wan_model.testing.processes import wait_until
from wan_train.engine.installed import version_of

ENDLESS = "train.train_iters=100000"
BOUND = 2.0
SOON = Call("rank_calls:see_stopped_children_after", [BOUND])


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _trains(ranks: Ranks, folder: Path, steps: int) -> bool:
    assert ranks.running(), ranks.wait().errors
    return (folder / "log.jsonl").exists() and len(read_log(folder)) >= steps


@pytest.fixture
def stopped() -> Iterator[list[int]]:
    pids: list[int] = []
    yield pids
    for pid in pids:
        wait_until(lambda pid=pid: not is_running(pid), "nothing outlives the run")  # type: ignore[misc]


def test_a_stopped_worker_of_the_loader_ends_the_run(dataset: Path, tmp_path: Path, stopped: list[int]) -> None:
    ranks = start(
        (*BASE_OPTIONS, ENDLESS, *data_options(dataset, workers=2)), tmp_path / "run", calls=[SOON], timeout=60
    )
    wait_until(lambda: _trains(ranks, tmp_path / "run", 2), "two steps are in the log")
    worker = _children(ranks.pids[0])[0]
    stopped.append(worker)
    # A shorter stop is none of our business.
    os.kill(worker, signal.SIGSTOP)
    time.sleep(BOUND / 3)
    os.kill(worker, signal.SIGCONT)
    done = len(read_log(tmp_path / "run"))
    wait_until(lambda: _trains(ranks, tmp_path / "run", done + 3), "training goes on")
    os.kill(worker, signal.SIGSTOP)
    said = sentence_of(ranks.wait())
    assert said.startswith(f"process {worker}, a worker of the data loader or a writer of checkpoints, was stopped")
    assert said.endswith("2 seconds ago and does not go on; the same command resumes from the last checkpoint")


def test_a_stopped_writer_of_checkpoints_ends_the_run(tmp_path: Path, stopped: list[int]) -> None:
    settings = ("checkpoint.async_save=true", "checkpoint.save_interval=1", "checkpoint.most_recent_k=1")
    ranks = start((*RUN_OPTIONS, ENDLESS, *settings), tmp_path / "run", calls=[SOON], timeout=60)

    def writes() -> bool:
        assert ranks.running(), ranks.wait().errors
        for child in _children(ranks.pids[0]):
            os.kill(child, signal.SIGSTOP)
            stopped.append(child)
        return bool(stopped)

    wait_until(writes, "a checkpoint is written")
    assert f"process {stopped[0]}, a worker of the data loader or a writer of checkpoints" in sentence_of(ranks.wait())


@pytest.mark.skipif(
    Version(version_of("megatron.core")) >= Version("0.17"), reason="Core from 0.17 on writes in threads"
)
@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_killed_writer_of_files_ends_the_run(asynchronous: str, tmp_path: Path, stopped: list[int]) -> None:
    """Who saves, a rank or its asynchronous writer, forks two processes, for whose files it waits."""
    settings = ("checkpoint.save_interval=1", "checkpoint.most_recent_k=1", f"checkpoint.async_save={asynchronous}")
    ranks = start((*RUN_OPTIONS, ENDLESS, *settings), tmp_path / "run", timeout=60)

    def ends() -> bool:
        if not ranks.running():
            return True
        with contextlib.suppress(OSError):
            savers = _children(ranks.pids[0]) if asynchronous == "true" else ranks.pids[:1]
            for child in [child for saver in savers for child in _children(saver)]:
                stopped.append(child)
                os.kill(child, signal.SIGKILL)
        return False

    wait_until(ends, "the run ends")
    said = sentence_of(ranks.wait())
    assert stopped
    assert said.startswith("the checkpoint of step ")
    assert "could not be written to" in said
    assert ": a process that writes its files ended with SIGKILL; the system does that when memory runs out; " in said
