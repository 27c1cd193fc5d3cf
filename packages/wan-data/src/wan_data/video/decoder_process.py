"""Decoding in child processes: a damaged or malicious file can crash its decoder and nothing else.

A decoder process receives jobs as JSON and responds with JSON and raw pixels; nothing it sends is unpickled. While it
works, it sends a heartbeat every second. If it crashes or makes no progress, the source of its job is rejected, and a
new process continues with the other jobs.
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_data.video.buckets import Size
from wan_data.video.display.options import DisplayOptions
from wan_data.video.limits import Limits
from wan_data.video.windows import Window
from wan_model.system.child_process import follow_parent

if TYPE_CHECKING:  # it imports torch, which the parent may not need
    from wan_data.video.decode import Measuring

Measure = Callable[[str, Fraction], "Measuring"]
PROGRAM = "wan_data.video.decoder_process"

_HEARTBEAT_SECONDS = 1.0
# Without a heartbeat for this long, the decoder is in an endless loop.
_TIMEOUT_SECONDS = 60.0
# Starting a process imports torch, which takes much longer than a heartbeat on a busy machine.
_START_TIMEOUT_SECONDS = 600.0
# Measures list the cuts of a clip, which may be as many as its frames.
_LARGEST_RESPONSE = 1 << 24
# Address space of a child beyond that of its libraries; enough for all buffers of the largest allowed frame.
_MEMORY = 8 * 2**30


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of a decoder process.

    Attributes:
        path: the source.
        fps: the target rate.
        limits: limits of the source.
        windows: the windows to decode; None to decode the source to its end and return its properties.
        size: of the returned frames; None if ``windows`` is None.
        resize_mode, center_crop: see ``wan_data.video.decode.to_size``.
        display: how the source is displayed.
        measuring: what the program of the process measures of a source without ``windows``, as JSON of its own; None
            measures nothing.
    """

    path: Path
    fps: Fraction
    limits: Limits
    windows: tuple[Window, ...] | None = None
    size: Size | None = None
    resize_mode: str = "bicubic"
    center_crop: bool = True
    display: DisplayOptions = dataclasses.field(default_factory=DisplayOptions)
    measuring: str | None = None

    def to_json(self) -> bytes:
        """The job as JSON."""
        return json.dumps(
            {
                "path": os.fsencode(self.path).hex(),
                "fps": str(self.fps),
                "limits": dataclasses.astuple(self.limits),
                "windows": None if self.windows is None else [[w.start, w.stop] for w in self.windows],
                "size": None if self.size is None else [self.size.height, self.size.width],
                "resize_mode": self.resize_mode,
                "center_crop": self.center_crop,
                "display": dataclasses.astuple(self.display),
                "measuring": self.measuring,
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Job":
        """Inverse of ``to_json``."""
        value = json.loads(data)
        return cls(
            path=Path(os.fsdecode(bytes.fromhex(value["path"]))),
            fps=Fraction(value["fps"]),
            limits=Limits(*value["limits"]),
            windows=None if value["windows"] is None else tuple(Window(*pair) for pair in value["windows"]),
            size=None if value["size"] is None else Size(*value["size"]),
            resize_mode=value["resize_mode"],
            center_crop=value["center_crop"],
            display=DisplayOptions(*value["display"]),
            measuring=value["measuring"],
        )


class Decoder:
    """A decoder process, which is replaced by a new one when it crashes; use it as a context manager.

    Args:
        memory: bytes of address space that the process may use beyond its libraries.
        timeout: seconds without a heartbeat after which the process is killed.
        start_timeout: the same for a process that is still starting.
        program: the module that the process runs: this one, or one whose ``main`` gives measures to that here.
        threads: with which it resizes frames, which takes most of the time of a window; they do not change a bit.
    """

    def __init__(
        self,
        *,
        program: str = PROGRAM,
        memory: int = _MEMORY,
        timeout: float = _TIMEOUT_SECONDS,
        start_timeout: float = _START_TIMEOUT_SECONDS,
        threads: int = 1,
    ) -> None:
        self._memory, self._timeout, self._start_timeout = memory, timeout, start_timeout
        self._program, self._threads = program, threads
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._ready = False
        self._jobs: collections.deque[Job] = collections.deque()

    def __enter__(self) -> "Decoder":
        """The process starts with the first job."""
        return self

    def __exit__(self, *error: object) -> None:
        """Kill the process."""
        self._kill()

    def start(self) -> None:
        """Start the process before the first job, because importing its libraries takes seconds."""
        if self._connection is None:
            self._start()

    def submit(self, job: Job) -> None:
        """Queue a job; it is decoded while the caller continues."""
        self._jobs.append(job)
        self._send(job)

    def results(self) -> Iterator[Any]:
        """The results of the oldest job.

        Yields:
            One ``decode.ClipInfo`` for a job without windows, and what was measured, as values of JSON, if something is
            to be; else the frames [T, H, W, 3] of each window, uint8. After an error one ``source_file.Rejected`` and
            nothing more of that job.
        """
        assert self._jobs, "submit a job first"
        complete = False
        try:
            yield from self._responses()
            complete = True
        finally:
            if complete:
                self._jobs.popleft()
            else:
                self._kill()  # discards responses that nobody reads any more
                self._jobs.clear()

    def decode(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """Yield each job with each of its ``results``; the next job is decoded in the meantime."""
        current: Job | None = None
        for job in jobs:
            self.submit(job)
            if current is not None:
                for result in self.results():
                    yield current, result
            current = job
        if current is not None:
            for result in self.results():
                yield current, result

    def _responses(self) -> Iterator[Any]:
        # Of the first job. If the process dies, a new one gets the other jobs again.
        from wan_data.video.decode import ClipInfo
        from wan_data.video.source_file import Rejected

        job = self._jobs[0]
        missing = -1 if job.windows is None else len(job.windows)
        while True:
            try:
                response = self._receive()
                frames = self._receive_frames(response["frames"]) if "frames" in response else None
            except (EOFError, OSError, TimeoutError) as error:
                reason = self._reason_of_death(error)
                for later in list(self._jobs)[1:]:
                    self._send(later)
                if missing:
                    yield Rejected(reason)
                return
            if frames is not None:
                missing -= 1
                yield frames
                continue
            if "info" in response:
                yield ClipInfo(**response["info"])
                if job.measuring is not None:
                    yield response["measures"]
            elif "rejected" in response:
                yield Rejected(str(response["rejected"]))
            elif "done" not in response:
                continue  # a heartbeat
            return

    def _send(self, job: Job) -> None:
        self.start()
        assert self._connection is not None
        # A dead process is noticed when its response is read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(job.to_json())

    def _start(self) -> None:
        ours, theirs = Pipe()  # blocks, whatever socket.setdefaulttimeout says, which some libraries call
        arguments = [str(theirs.fileno()), str(self._memory), str(self._threads)]
        # -P: a module of the working folder, where the clips may be, is not to be imported.
        command = [sys.executable, "-P", "-m", self._program, *arguments]
        with theirs:
            self._child = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=None
            )
        self._connection = ours
        self._ready = False

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        if not self._connection.poll(self._timeout if self._ready else self._start_timeout):
            raise TimeoutError
        response = json.loads(self._connection.recv_bytes(_LARGEST_RESPONSE))
        assert isinstance(response, dict)
        self._ready = True
        return response

    def _receive_frames(self, shape: list[int]) -> Any:
        import torch

        assert self._connection is not None
        frames = torch.empty(shape, dtype=torch.uint8)
        if not self._connection.poll(self._timeout):
            raise TimeoutError
        self._connection.recv_bytes_into(frames.numpy().reshape(-1).data)
        return frames

    def _reason_of_death(self, error: BaseException) -> str:
        child = self._child
        assert child is not None
        if isinstance(error, TimeoutError):
            self._kill()
            seconds = self._timeout if self._ready else self._start_timeout
            return f"its decoder made no progress for {seconds:g} s and was killed"
        code = child.wait()
        self._kill()
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"its decoder crashed ({name})"
        return f"its decoder crashed (exit code {code})"

    def _kill(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = self._connection = None


# -- child process -----------------------------------------------------------------------------------------------------


class _Responder:
    """The child's end of the connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = time.monotonic()

    def send(self, **response: Any) -> None:
        self._connection.send_bytes(json.dumps(response).encode())
        self._last = time.monotonic()

    def send_frames(self, frames: Any) -> None:
        self.send(frames=list(frames.shape))
        self._connection.send_bytes(frames.numpy().reshape(-1).data)

    def heartbeat(self, decoded: int) -> None:
        if time.monotonic() - self._last >= _HEARTBEAT_SECONDS:
            self.send(decoded=decoded)


def _run(job: Job, responder: _Responder, measure: Measure | None) -> None:
    from wan_data.video.decode import probe, read_windows
    from wan_data.video.source_file import Rejected

    try:
        if job.windows is None:
            assert measure is not None or job.measuring is None, "another program measures"
            measuring = measure(job.measuring, job.fps) if measure is not None and job.measuring is not None else None
            info = probe(
                job.path,
                job.fps,
                limits=job.limits,
                display=job.display,
                on_frame=responder.heartbeat,
                measuring=measuring,
            )
            measures = None if measuring is None else measuring.result()
            responder.send(info=dataclasses.asdict(info), measures=measures)
            return
        assert job.size is not None, "windows have a size"
        for frames in read_windows(
            job.path,
            job.windows,
            job.size,
            fps=job.fps,
            resize_mode=job.resize_mode,
            center_crop=job.center_crop,
            limits=job.limits,
            display=job.display,
            on_frame=responder.heartbeat,
        ):
            responder.send_frames(frames)
        responder.send(done=True)
    except Rejected as error:
        responder.send(rejected=str(error))
    except MemoryError:
        responder.send(rejected="its decoding needs more memory than a decoder may use")
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        responder.send(rejected=f"it cannot be read: {error.strerror or error}")
    except Exception as error:  # a damaged file can raise any exception in the libraries
        reason = str(error).split("\n", 1)[0][:200]
        responder.send(rejected=f"it cannot be decoded: {type(error).__name__}: {reason}")


def _address_space_in_use() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def _limit_address_space(limit: int) -> None:
    """Lower the limit of this process; one that the system or a scheduler has set may be lower already."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(load: Callable[[], Measure] | None = None) -> None:
    """Entry point of the child: ``python -m wan_data.video.decoder_process FD MEMORY THREADS``.

    Args:
        load: of a program that measures: imports its libraries, and returns what begins to measure a clip from
            ``Job.measuring`` and the rate; the result is values of JSON.
    """
    connection, memory, threads = Connection(int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl+C
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    follow_parent()
    import torch

    torch.set_num_threads(threads)
    from wan_data.video import decode  # memory that is allocated after this import counts as the job's

    del decode
    measure = load() if load is not None else None
    if Path("/proc/self/statm").exists():
        _limit_address_space(_address_space_in_use() + memory)
    # A thread reads the jobs; otherwise parent and child could block on sending to each other.
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(connection, jobs), daemon=True).start()
    responder = _Responder(connection)
    responder.send(started=True)
    while (job := jobs.get()) is not None:
        try:
            _run(job, responder, measure)
        except (BrokenPipeError, ConnectionResetError):
            return


def _read_jobs(connection: Connection, jobs: "queue.SimpleQueue[Job | None]") -> None:
    try:
        while True:
            jobs.put(Job.from_json(connection.recv_bytes()))
    except (EOFError, OSError):
        pass
    finally:
        jobs.put(None)


if __name__ == "__main__":
    main()
