"""Encoding in one process or in several, each of which decodes its next clip while it encodes one."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from wan_data.prepare.encoding import Encoded, WindowEncoder, choose_device, load_codec
from wan_data.prepare.preload import warm_up
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import Task
from wan_data.video.decoder_process import Decoder
from wan_model.codec.latent_codec import LatentCodec

Result = list[tuple[str, int, Any, str | None]]  # source, window, latent as an array, problem

# -- in a process of the pool -----------------------------------------------------------------------------------------

_here: dict[str, Any] = {}  # its encoder, made once; what has been begun


def _start(model: str, settings: PrepareSettings, device: str, place: int, threads: int) -> None:
    threading.Thread(target=_leave_with_caller, daemon=True).start()
    torch.set_num_threads(threads)
    decoder = Decoder()
    decoder.start()  # it leaves with this process
    codec = load_codec(model, settings, choose_device(device, place), vae=True, text=False)
    _here["encoder"], _here["begun"] = WindowEncoder(codec, settings, decoder), collections.deque()


def _leave_with_caller() -> None:
    # The parent in the system's sense is the process that this one was forked from, which lives as long as its forks.
    caller = multiprocessing.parent_process()
    assert caller is not None, "it was started by multiprocessing"
    caller.join()
    os._exit(1)


def _ready() -> None:
    """For the initializer's sake."""


def _encode(task: Task, upcoming: Task | None) -> Result:
    encoder, begun = _here["encoder"], _here["begun"]
    for one in (task, upcoming):
        if one is not None and one not in begun:
            encoder.begin(one)
            begun.append(one)
    windows = encoder.finish(begun.popleft())
    # As arrays: tensors would travel through shared memory, which containers keep small.
    return [
        (one.source, one.window, None if one.latent is None else one.latent.numpy(), one.problem) for one in windows
    ]


# -- in the process that has it ---------------------------------------------------------------------------------------


class _Handout:
    """Tasks for whoever asks, results in the order of the tasks; only so many are out or wait for their turn.

    Args:
        tasks: drawn one at a time, by any thread.
        ahead: how many.
    """

    def __init__(self, tasks: Iterable[Task], ahead: int) -> None:
        self._tasks, self._lock = iter(tasks), threading.Lock()
        self._room = threading.Semaphore(ahead)
        self._out: queue.SimpleQueue[tuple[Task, concurrent.futures.Future[Result]] | None] = queue.SimpleQueue()
        self._ended = False
        self.stopped = False

    def take(self, *, wait: bool) -> "tuple[Task, concurrent.futures.Future[Result]] | None":
        """The next task and where its result goes; None at the end, and without ``wait`` while there is no room."""
        if not self._room.acquire(blocking=wait):
            return None
        with self._lock:
            if self._ended:
                return None
            future: concurrent.futures.Future[Result] = concurrent.futures.Future()
            try:
                task = next(self._tasks, None)
            except BaseException as error:
                task = None
                future.set_exception(error)
                self._out.put((Task(-1, ()), future))
            if task is None:
                self._end()
                return None
            self._out.put((task, future))
            return task, future

    def _end(self) -> None:
        self._ended = True
        self._out.put(None)
        # Whoever waits for room, now or later, is to see that it is over.
        self._room.release(1 << 20)

    def stop(self) -> None:
        """Nobody wants the results any more."""
        self.stopped = True
        self._end()

    def results(self) -> Iterator[tuple[Task, Result]]:
        """Each task with its result."""
        while (one := self._out.get()) is not None:
            task, future = one
            result = future.result()
            self._room.release()
            yield task, result


def _drive(process: concurrent.futures.Executor, handout: _Handout) -> None:
    """Give tasks to one process, always the next one together with one to decode meanwhile."""
    upcoming = None
    while (current := upcoming or handout.take(wait=True)) is not None:
        if handout.stopped:
            return
        upcoming = handout.take(wait=False)
        task, future = current
        try:
            future.set_result(process.submit(_encode, task, upcoming[0] if upcoming else None).result())
        except BaseException as error:
            if isinstance(error, concurrent.futures.BrokenExecutor):
                error = ChildProcessError(
                    "an encoding process died, perhaps of too little memory; the same command goes on where it was"
                )
            for _, unmet in (current, *((upcoming,) if upcoming else ())):
                unmet.set_exception(error)
            return


class EncoderPool:
    """Encodes tasks here or in several processes; results come in the order of the tasks.

    Use it as a context manager, which starts the processes: they load what they need while the caller does the same.

    Args:
        model: folder or hub id.
        settings: of the preparation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        processes: 1 encodes here; more start that many, each with an autoencoder of its own.
        local_rank: of this launch on its machine; its processes take the devices that follow from it.
    """

    def __init__(self, model: str, settings: PrepareSettings, device: str, processes: int, local_rank: int = 0) -> None:
        self._settings = settings
        self._places = range(local_rank * processes, (local_rank + 1) * processes) if processes > 1 else range(0)
        self._arguments = (model, settings, device)
        self._processes: list[concurrent.futures.Executor] = []
        self._decoder = Decoder()
        self._starter: threading.Thread | None = None

    def __enter__(self) -> "EncoderPool":
        """Start the processes."""
        if not self._places:
            self._decoder.start()
            return self
        context = warm_up()
        threads = max(1, torch.get_num_threads() // len(self._places))
        # An executor a process, so that it is known here which one decodes what.
        self._processes = [
            concurrent.futures.ProcessPoolExecutor(
                1, mp_context=context, initializer=_start, initargs=(*self._arguments, place, threads)
            )
            for place in self._places
        ]
        # The first call starts a process, and waits until that process is there.
        self._starter = threading.Thread(target=lambda: [process.submit(_ready) for process in self._processes])
        self._starter.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End them; what they have not begun is dropped."""
        if self._starter is not None:
            self._starter.join()
        for process in self._processes:
            process.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.shutdown()
        self._decoder.__exit__(*error)

    def encode(self, tasks: Iterable[Task], codec: LatentCodec) -> Iterator[tuple[Task, list[Encoded]]]:
        """Each task with what became of its windows.

        Args:
            tasks: what to encode.
            codec: with its autoencoder where the processes are 1; else it is not used.
        """
        if not self._places:
            yield from self._encode_here(tasks, codec)
            return
        # What is done waits in memory for its turn.
        handout = _Handout(tasks, 3 * len(self._processes))
        with contextlib.ExitStack() as stack:
            threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(self._processes)))
            stack.callback(handout.stop)
            for process in self._processes:
                threads.submit(_drive, process, handout)
            for task, windows in handout.results():
                yield (
                    task,
                    [
                        Encoded(name, number, None if array is None else torch.from_numpy(array), problem)
                        for name, number, array, problem in windows
                    ],
                )

    def _encode_here(self, tasks: Iterable[Task], codec: LatentCodec) -> Iterator[tuple[Task, list[Encoded]]]:
        encoder = WindowEncoder(codec, self._settings, self._decoder)
        current: Task | None = None
        for task in tasks:
            encoder.begin(task)
            if current is not None:
                yield current, encoder.finish(current)
            current = task
        if current is not None:
            yield current, encoder.finish(current)
