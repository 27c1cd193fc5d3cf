"""Workers do not finalize what their parent has left to the garbage collector."""

import gc
import multiprocessing
import os

import pytest

from wan_data.energon.worker_processes import WorkerContext


class Garbage:
    """In a cycle with itself; its end is recorded with the process."""

    def __init__(self, log):
        self.log, self.me = log, self

    def __del__(self):
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} ")


@pytest.fixture
def left_garbage(tmp_path):
    log = tmp_path / "log"
    log.touch()
    gc.unfreeze()  # what another library of this process may have frozen
    gc.collect()
    gc.disable()
    Garbage(log)
    yield log
    gc.enable()


def collect_in(context):
    process = context.Process(target=gc.collect)
    process.start()
    process.join()
    assert process.exitcode == 0
    return process.pid


def test_a_worker_collects_nothing_of_its_parent(left_garbage):
    collect_in(WorkerContext())
    assert left_garbage.read_text() == ""
    gc.collect()
    assert left_garbage.read_text() == f"{os.getpid()} ", "the parent still collects it"


def test_a_process_of_torch_s_own_context_would(left_garbage):
    pid = collect_in(multiprocessing.get_context("fork"))
    assert left_garbage.read_text() == f"{pid} "


def test_what_was_frozen_before_stays_frozen(left_garbage):
    gc.freeze()
    try:
        collect_in(WorkerContext())
        gc.collect()
        assert left_garbage.read_text() == ""
    finally:
        gc.unfreeze()
