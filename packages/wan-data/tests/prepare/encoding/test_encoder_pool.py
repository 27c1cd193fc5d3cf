import itertools
import multiprocessing
import os
import signal
import threading

import light_encoders
import pytest

from wan_data.prepare.encoding import encoder_pool
from wan_data.prepare.encoding.encoder import default_processes
from wan_data.prepare.encoding.encoder_pool import EncoderPool, _TaskQueue
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import EncodeTask
from wan_data.storage.local_copies import LocalCopies
from wan_model.testing.processes import wait_until


def tasks(count):
    return [EncodeTask(number, ()) for number in range(count)]


class Immediately:
    """An executor that is called like one and does the work in the calling thread."""

    def __init__(self, log, fails_at=None):
        self.log, self.fails_at = log, fails_at

    def submit(self, _, task, following):
        from concurrent.futures import Future

        self.log.append((task.shard, following and following.shard, threading.get_ident()))
        future = Future()
        if task.shard == self.fails_at:
            future.set_exception(RuntimeError(f"task {task.shard}"))
        else:
            future.set_result([("source", task.shard, None, "nothing to encode")])
        return future


@pytest.fixture
def pool(monkeypatch):
    def make(processes, **how):
        log = []
        one = EncoderPool("model", PrepareSettings(), "cpu", processes, copies=LocalCopies())
        one._processes = [Immediately(log, **how) for _ in range(processes)]
        return one, log

    return make


@pytest.mark.parametrize(
    ("device", "gpus", "local_ranks", "expected"),
    [
        ("auto", 8, None, 8),
        ("cuda", 8, "8", 1),
        ("auto", 8, "2", 4),
        ("auto", 2, "4", 1),
        ("cuda:1", 8, None, 1),
        ("cpu", 8, None, 1),
        ("auto", 0, None, 1),
    ],
)
def test_by_default_every_gpu_encodes(monkeypatch, device, gpus, local_ranks, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    assert default_processes(device) == expected


@pytest.mark.parametrize("count", [0, 1, 2, 7, 50])
def test_results_come_in_order_and_each_task_once(pool, count):
    one, log = pool(3)
    assert [task.shard for task, _ in one.encode(tasks(count), None)] == list(range(count))
    assert sorted(task for task, *_ in log) == list(range(count))


def test_the_next_task_is_known_to_the_process_that_will_do_it(pool):
    one, log = pool(2)
    list(one.encode(tasks(40), None))
    by_thread = {}
    for task, following, thread in log:
        announced = by_thread.get(thread)
        assert announced in (None, task), "the task that a process has decoded is encoded by it"
        by_thread[thread] = following
    assert sum(following is not None for _, following, _ in log) > 20


def test_only_so_many_are_under_way(pool):
    one, _ = pool(2)
    drawn = []

    def counted():
        for task in tasks(100):
            drawn.append(task)
            yield task

    results = one.encode(counted(), None)
    for number in range(50):
        next(results)
        assert len(drawn) <= number + 1 + 6 + 1
    results.close()


def test_errors_of_either_side_reach_the_caller(pool):
    one, _ = pool(2, fails_at=5)
    with pytest.raises(RuntimeError, match="task 5"):
        list(one.encode(tasks(20), None))

    def broken():
        yield from tasks(3)
        raise OSError("the list of shards cannot be read")

    one, _ = pool(2)
    with pytest.raises(OSError, match="the list of shards"):
        list(one.encode(broken(), None))


def test_leaving_early_ends_the_threads(pool):
    one, _ = pool(2)
    before = threading.active_count()
    results = one.encode((EncodeTask(number, ()) for number in itertools.count()), None)
    next(results)
    results.close()
    assert threading.active_count() == before


def test_nothing_is_handed_out_after_the_end():
    one = _TaskQueue(tasks(1), 2)
    assert one.get(wait=True) is not None
    assert one.get(wait=True) is None
    assert one.get(wait=True) is None


@pytest.fixture
def light_pool(monkeypatch):
    """Two real processes of a real fork server, without what they would import."""
    for name in ("initialize", "do_nothing", "encode"):
        monkeypatch.setattr(encoder_pool, f"_{name}", getattr(light_encoders, name))
    monkeypatch.setattr(encoder_pool, "preload_encoders", lambda: multiprocessing.get_context("forkserver"))
    monkeypatch.setattr(encoder_pool, "STOPPED_SECONDS", 1.0)
    return EncoderPool("model", PrepareSettings(), "cpu", 2, copies=LocalCopies())


def have_ended(pids):
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), "the processes have ended", 60.0)
    return True


def test_a_process_that_is_stopped_ends_the_encoding(light_pool):
    pids = set()

    def encode_on_and_on():
        with light_pool:
            for _, (window,) in light_pool.encode((EncodeTask(number, ()) for number in itertools.count()), None):
                before = len(pids)
                pids.add(int(window.problem))
                if before < len(pids) == 2:
                    os.kill(min(pids), signal.SIGSTOP)

    with pytest.raises(
        ChildProcessError, match=r"was stopped \(SIGSTOP\) for 1 seconds and did not go on; run the same"
    ):
        encode_on_and_on()
    assert have_ended(pids)


def test_a_process_that_is_stopped_at_the_end_does_not_hold_it_up(light_pool):
    with light_pool:
        pids = {int(window.problem) for _, (window,) in light_pool.encode(tasks(20), None)}
        os.kill(min(pids), signal.SIGSTOP)
    assert have_ended(pids)


@pytest.mark.parametrize(
    ("cores", "ranks", "processes", "threads"),
    [(2, 1, 1, 1), (1, 1, 1, 1), (16, 1, 1, 8), (64, 1, 8, 7), (64, 8, 1, 7)],
)
def test_decoders_get_the_processors_that_encoding_leaves(cores, ranks, processes, threads, monkeypatch):
    monkeypatch.setattr(encoder_pool, "processors", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert encoder_pool.decoder_threads(processes) == threads
