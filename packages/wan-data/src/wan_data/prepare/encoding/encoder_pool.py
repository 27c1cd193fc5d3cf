"""Encoding in one process or several; each decodes its next clip while it encodes the current one."""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from wan_data.prepare.encoding.encoder import EncodedWindow, WindowEncoder, choose_device, load_codec
from wan_data.prepare.encoding.fetching import TaskFetcher
from wan_data.prepare.encoding.preload import encoding_processes, preload_encoders
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import EncodeTask
from wan_data.storage.local_copies import LocalCopies
from wan_data.video.decoder_process import Decoder
from wan_model.codec.latent_codec import LatentCodec
from wan_model.system.child_process import end_after
from wan_model.system.process_tree import STOPPED_SECONDS, StoppedProcesses
from wan_model.system.torchrun import local_world_size, processors

_POLL_SECONDS = 0.25
_MOST_DECODER_THREADS = 8

Result = list[tuple[str, int, Any, str | None]]  # source, window, latent as an array, problem

# -- worker process ----------------------------------------------------------------------------------------------------

_worker: dict[str, Any] = {}  # its encoder, and the tasks that it is decoding


def _initialize(
    model: str, settings: PrepareSettings, device: str, index: int, threads: int, decoder_threads: int
) -> None:
    # Not follow_parent: os.getppid() is the fork server, which lives as long as its forks; the caller is its parent.
    caller = multiprocessing.parent_process()
    assert caller is not None, "multiprocessing has started this process"
    end_after(caller.join)
    torch.set_num_threads(threads)
    decoder = Decoder(threads=decoder_threads)
    decoder.start()  # it exits with this process
    codec = load_codec(model, settings, choose_device(device, index), vae=True, text=False)
    _worker["encoder"], _worker["pending"] = WindowEncoder(codec, settings, decoder), collections.deque()


def _do_nothing() -> None:
    """A call that makes an executor start its process."""


def _encode(task: EncodeTask, next_task: EncodeTask | None) -> Result:
    encoder, pending = _worker["encoder"], _worker["pending"]
    for one in (task, next_task):
        if one is not None and one not in pending:
            encoder.submit(one)
            pending.append(one)
    windows = encoder.result(pending.popleft())
    # As arrays: tensors would be sent through shared memory, of which containers have little.
    return [
        (one.source, one.window, None if one.latent is None else one.latent.numpy(), one.problem) for one in windows
    ]


# -- calling process ---------------------------------------------------------------------------------------------------


class _TaskQueue:
    """Tasks for several threads, with results in the order of the tasks and a limit on those in flight.

    Args:
        tasks: read one at a time, by any thread.
        in_flight: number of tasks that are being encoded or whose results wait to be read.
    """

    def __init__(self, tasks: Iterable[EncodeTask], in_flight: int) -> None:
        self._tasks, self._lock = iter(tasks), threading.Lock()
        self._free = threading.Semaphore(in_flight)
        self._submitted: queue.SimpleQueue[tuple[EncodeTask, concurrent.futures.Future[Result]] | None]
        self._submitted = queue.SimpleQueue()
        self._ended = False
        self.stopped = False

    def get(self, *, wait: bool) -> "tuple[EncodeTask, concurrent.futures.Future[Result]] | None":
        """The next task and the future of its result.

        Args:
            wait: wait while the limit is reached; otherwise return None then.

        Returns:
            None when there are no more tasks.
        """
        if not self._free.acquire(blocking=wait):
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
                self._submitted.put((EncodeTask(-1, ()), future))
            if task is None:
                self._end()
                return None
            self._submitted.put((task, future))
            return task, future

    def _end(self) -> None:
        self._ended = True
        self._submitted.put(None)
        # Wake the threads that wait in get(), now or later.
        self._free.release(1 << 20)

    def stop(self) -> None:
        """Hand out no more tasks; nobody reads the results any more."""
        self.stopped = True
        self._end()

    def results(self) -> Iterator[tuple[EncodeTask, Result]]:
        """Yield each task with its result, in the order of the tasks."""
        while (submitted := self._submitted.get()) is not None:
            task, future = submitted
            result = future.result()
            self._free.release()
            yield task, result


def _feed(
    process: concurrent.futures.Executor, tasks: _TaskQueue, fetcher: TaskFetcher, why_ended: Callable[[], str]
) -> None:
    """Send tasks to one process, each with the task that it decodes in the meantime if its clips are there."""
    following, next_task = None, None
    while (current := following or tasks.get(wait=True)) is not None:
        if tasks.stopped:
            return
        task, future = current
        following = tasks.get(wait=False)
        try:
            fetched = next_task or fetcher.begin(task)
            assert fetched is not None, "it was waited for"
            next_task = fetcher.begin(following[0], wait=False) if following else None
            future.set_result(process.submit(_encode, fetched, next_task).result())
            fetcher.end(fetched)
        except BaseException as error:
            if isinstance(error, concurrent.futures.BrokenExecutor):
                error = ChildProcessError(f"{why_ended()}; run the same command again to resume")
            for _, unfinished in (current, *((following,) if following else ())):
                unfinished.set_exception(error)
            return


class _Watch:
    """A thread that kills encoding processes which are stopped and do not go on: nobody would notice otherwise."""

    def __init__(self) -> None:
        self.found: str | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watches the encoding processes", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def reason(self) -> str:
        """Why a process has ended."""
        return self.found or "an encoding process died, perhaps for lack of memory"

    def _run(self) -> None:
        stopped = StoppedProcesses(STOPPED_SECONDS)
        while not self._end.wait(_POLL_SECONDS):
            for pid in stopped.look(encoding_processes()):
                self.found = (
                    f"an encoding process ({pid}) was stopped (SIGSTOP) for {STOPPED_SECONDS:.0f} seconds and did not "
                    "go on"
                )
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def decoder_threads(processes: int) -> int:
    """Threads of the decoder beside each encoding process: a GPU encodes faster than one thread resizes frames.

    Args:
        processes: encoding processes of this process; each keeps a processor for itself.
    """
    of_each = processors() // (processes * local_world_size())
    return max(1, min(_MOST_DECODER_THREADS, of_each - 1))


class EncoderPool:
    """Encodes tasks in this process or in several; results come in the order of the tasks.

    Entering the context starts the processes, which load the model while the caller continues.

    Args:
        model: folder or hub id.
        settings: of the preparation.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        processes: 1 encodes in this process; more start that many processes, each with its own autoencoder.
        local_rank: rank of this process on its machine; it determines the devices of the encoding processes.
        copies: of clips in a store, for all processes.
    """

    def __init__(
        self,
        model: str,
        settings: PrepareSettings,
        device: str,
        processes: int,
        local_rank: int = 0,
        *,
        copies: LocalCopies,
    ) -> None:
        self._settings, self._fetcher = settings, TaskFetcher(copies)
        self._indices = range(local_rank * processes, (local_rank + 1) * processes) if processes > 1 else range(0)
        self._arguments = (model, settings, device)
        self._processes: list[concurrent.futures.Executor] = []
        self._decoder_threads = decoder_threads(processes)
        self._decoder = Decoder(threads=self._decoder_threads)
        self._starter: threading.Thread | None = None
        self._watch = _Watch()

    def __enter__(self) -> "EncoderPool":
        """Start the processes."""
        if not self._indices:
            self._decoder.start()
            return self
        context = preload_encoders()
        threads = max(1, torch.get_num_threads() // len(self._indices))
        # One executor per process, so that a task goes to the process that has decoded it.
        self._processes = [
            concurrent.futures.ProcessPoolExecutor(
                1,
                mp_context=context,
                initializer=_initialize,
                initargs=(*self._arguments, index, threads, self._decoder_threads),
            )
            for index in self._indices
        ]
        # The first call starts the process and waits for it, so the calls are made in a thread.
        self._starter = threading.Thread(target=self._start_all)
        self._starter.start()
        self._watch.start()
        return self

    def _start_all(self) -> None:
        for process in self._processes:
            with contextlib.suppress(EOFError, OSError):  # the fork server has ended; the first task starts another
                process.submit(_do_nothing)

    def __exit__(self, *error: object) -> None:
        """End the processes; tasks that they have not started are cancelled."""
        if self._starter is not None:
            self._starter.join()
        if self._processes:
            # All at a time. An executor that was told not to wait can no longer be waited for.
            with concurrent.futures.ThreadPoolExecutor(len(self._processes)) as threads:
                list(threads.map(lambda process: process.shutdown(cancel_futures=True), self._processes))
        self._watch.end()  # last: a process that is stopped does not end
        self._decoder.__exit__(*error)

    def encode(
        self, tasks: Iterable[EncodeTask], codec: LatentCodec
    ) -> Iterator[tuple[EncodeTask, list[EncodedWindow]]]:
        """Yield each task with its encoded windows.

        Args:
            tasks: the tasks to encode.
            codec: the autoencoder if this process encodes; not used otherwise.
        """
        if not self._indices:
            yield from self._encode_in_this_process(tasks, codec)
            return
        # The limit bounds the memory of results that wait for those of earlier tasks.
        task_queue = _TaskQueue(tasks, 3 * len(self._processes))
        with contextlib.ExitStack() as stack:
            threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(self._processes)))
            stack.callback(task_queue.stop)
            stack.push(self._stop_fetching)
            for process in self._processes:
                threads.submit(_feed, process, task_queue, self._fetcher, self._watch.reason)
            for task, windows in task_queue.results():
                yield (
                    task,
                    [
                        EncodedWindow(name, number, None if array is None else torch.from_numpy(array), problem)
                        for name, number, array, problem in windows
                    ],
                )

    def _stop_fetching(self, kind: object, *error: object) -> None:
        if kind is not None:
            self._fetcher.stop()

    def _encode_in_this_process(
        self, tasks: Iterable[EncodeTask], codec: LatentCodec
    ) -> Iterator[tuple[EncodeTask, list[EncodedWindow]]]:
        encoder = WindowEncoder(codec, self._settings, self._decoder)
        current: EncodeTask | None = None

        def result(task: EncodeTask) -> tuple[EncodeTask, list[EncodedWindow]]:
            windows = encoder.result(task)
            self._fetcher.end(task)
            return task, windows

        for task in tasks:
            fetched = self._fetcher.begin(task, wait=current is None)
            if fetched is not None:
                encoder.submit(fetched)
            if current is not None:
                yield result(current)
            if fetched is None:  # there was no room beside the current one, or it is still on its way
                fetched = self._fetcher.begin(task)
                assert fetched is not None, "it was waited for"
                encoder.submit(fetched)
            current = fetched
        if current is not None:
            yield result(current)
