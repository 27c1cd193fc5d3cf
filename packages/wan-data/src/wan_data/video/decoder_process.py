"""Decoding in processes that may die: a broken or hostile file takes its decoder with it and nothing else.

A decoder is a child process that gets jobs as JSON and answers with JSON and raw pixels; nothing it sends is ever
unpickled. It says that it is alive every second of its work. A child that dies, or stands still, costs the job it was
at: that source is rejected, a new child takes up the others.
"""

import collections
import contextlib
import dataclasses
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from wan_data.video.buckets import Size
from wan_data.video.limits import Caps
from wan_data.video.windows import Window

# A second of silence is normal, a minute of it is a decoder that goes round in circles.
_HEARTBEAT_SECONDS = 1.0
_STANDSTILL_SECONDS = 60.0
# Address space of a child beyond what its libraries take: a frame of the largest size in all its forms fits well.
_MEMORY = 8 * 2**30


@dataclasses.dataclass(frozen=True)
class Job:
    """What to decode.

    Attributes:
        path: the source.
        fps: the target rate.
        caps: what is read at most.
        windows: what to cut from it; None to decode it to its end and say what it is.
        size: of the frames returned; None with ``windows``.
        resize_mode, center_crop: see ``decode.to_size``.
    """

    path: Path
    fps: Fraction
    caps: Caps
    windows: tuple[Window, ...] | None = None
    size: Size | None = None
    resize_mode: str = "bicubic"
    center_crop: bool = True

    def to_json(self) -> bytes:
        """Plain values."""
        return json.dumps(
            {
                "path": os.fsencode(self.path).hex(),
                "fps": str(self.fps),
                "caps": dataclasses.astuple(self.caps),
                "windows": None if self.windows is None else [[w.start, w.stop] for w in self.windows],
                "size": None if self.size is None else [self.size.height, self.size.width],
                "resize_mode": self.resize_mode,
                "center_crop": self.center_crop,
            }
        ).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Job":
        """What ``to_json`` wrote."""
        value = json.loads(data)
        return cls(
            path=Path(os.fsdecode(bytes.fromhex(value["path"]))),
            fps=Fraction(value["fps"]),
            caps=Caps(*value["caps"]),
            windows=None if value["windows"] is None else tuple(Window(*pair) for pair in value["windows"]),
            size=None if value["size"] is None else Size(*value["size"]),
            resize_mode=value["resize_mode"],
            center_crop=value["center_crop"],
        )


class Decoder:
    """One child process after another; use as a context manager.

    Args:
        memory: bytes of address space that a child may take beyond its libraries.
        standstill: seconds without a sign of life after which a child is ended.
    """

    def __init__(self, *, memory: int = _MEMORY, standstill: float = _STANDSTILL_SECONDS) -> None:
        self._memory, self._standstill = memory, standstill
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._begun: collections.deque[Job] = collections.deque()

    def __enter__(self) -> "Decoder":
        """The child starts with the first job."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the child."""
        self._end()

    def start(self) -> None:
        """Start the child already, whose libraries take seconds to load."""
        if self._connection is None:
            self._start()

    def begin(self, job: Job) -> None:
        """Start a job, or line it up behind those that are begun; it is decoded while the caller does other things."""
        self._begun.append(job)
        self._send(job)

    def results(self) -> Iterator[Any]:
        """What comes of the oldest job that was begun.

        Yields:
            For a job without windows one ``decode.ClipInfo``, else the frames [T, H, W, 3] of each window, uint8; at a
            failure one ``decode.Rejected``, and nothing more of that job.
        """
        assert self._begun, "begin a job first"
        whole = False
        try:
            yield from self._answers()
            whole = True
        finally:
            if whole:
                self._begun.popleft()
            else:
                self._end()  # its answers to what nobody waits for any more
                self._begun.clear()

    def decode(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """Each job in turn with each of its ``results``, the next job always under way already."""
        current: Job | None = None
        for job in jobs:
            self.begin(job)
            if current is not None:
                for result in self.results():
                    yield current, result
            current = job
        if current is not None:
            for result in self.results():
                yield current, result

    def _answers(self) -> Iterator[Any]:
        # Of the first job; the others are asked again if the child dies.
        from wan_data.video.decode import ClipInfo, Rejected

        job = self._begun[0]
        missing = -1 if job.windows is None else len(job.windows)
        while True:
            try:
                answer = self._receive()
                frames = self._frames(answer["frames"]) if "frames" in answer else None
            except (EOFError, OSError, TimeoutError) as error:
                reason = self._end_of_child(error)
                for behind in list(self._begun)[1:]:
                    self._send(behind)
                if missing:
                    yield Rejected(reason)
                return
            if frames is not None:
                missing -= 1
                yield frames
                continue
            if "info" in answer:
                yield ClipInfo(**answer["info"])
            elif "rejected" in answer:
                yield Rejected(str(answer["rejected"]))
            elif "done" not in answer:
                continue  # it is alive
            return

    def _send(self, job: Job) -> None:
        self.start()
        assert self._connection is not None
        # A child that has died is noticed when its answer is read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send_bytes(job.to_json())

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "wan_data.video.decoder_process", str(theirs.fileno()), str(self._memory)]
        with theirs:
            self._child = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=None
            )
        self._connection = Connection(ours.detach())

    def _receive(self) -> dict[str, Any]:
        assert self._connection is not None
        if not self._connection.poll(self._standstill):
            raise TimeoutError
        answer = json.loads(self._connection.recv_bytes(1 << 20))
        assert isinstance(answer, dict)
        return answer

    def _frames(self, shape: list[int]) -> Any:
        import torch

        assert self._connection is not None
        frames = torch.empty(shape, dtype=torch.uint8)
        if not self._connection.poll(self._standstill):
            raise TimeoutError
        self._connection.recv_bytes_into(frames.numpy().reshape(-1).data)
        return frames

    def _end_of_child(self, error: BaseException) -> str:
        child = self._child
        assert child is not None
        if isinstance(error, TimeoutError):
            self._end()
            return f"its decoding stood still for {self._standstill:g} s and was ended"
        code = child.wait()
        self._end()
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"the decoder died of it ({name})"
        return f"the decoder died of it (exit code {code})"

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = self._connection = None


# -- the child --------------------------------------------------------------------------------------------------------


class _Answers:
    """The child's side of the connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._last = time.monotonic()

    def say(self, **answer: Any) -> None:
        self._connection.send_bytes(json.dumps(answer).encode())
        self._last = time.monotonic()

    def frames(self, frames: Any) -> None:
        self.say(frames=list(frames.shape))
        self._connection.send_bytes(frames.numpy().reshape(-1).data)

    def alive(self, decoded: int) -> None:
        if time.monotonic() - self._last >= _HEARTBEAT_SECONDS:
            self.say(alive=decoded)


def _answer(job: Job, answers: _Answers) -> None:
    from wan_data.video.decode import Rejected, probe, read_windows

    try:
        if job.windows is None:
            answers.say(info=dataclasses.asdict(probe(job.path, job.fps, caps=job.caps, on_frame=answers.alive)))
            return
        assert job.size is not None, "windows have a size"
        for frames in read_windows(
            job.path,
            job.windows,
            job.size,
            fps=job.fps,
            resize_mode=job.resize_mode,
            center_crop=job.center_crop,
            caps=job.caps,
            on_frame=answers.alive,
        ):
            answers.frames(frames)
        answers.say(done=True)
    except Rejected as error:
        answers.say(rejected=str(error))
    except MemoryError:
        answers.say(rejected="its decoding takes more memory than a decoder may have")
    except (BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        answers.say(rejected=f"it cannot be read: {error.strerror or error}")
    except Exception as error:  # whatever a broken file makes of the decoder's libraries
        reason = str(error).split("\n", 1)[0][:200]
        answers.say(rejected=f"it cannot be decoded: {type(error).__name__}: {reason}")


def _leave_with_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def main() -> None:
    """Of the child: ``python -m wan_data.video.decoder_process FD MEMORY``."""
    connection, memory = Connection(int(sys.argv[1])), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the parent's business
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _leave_with_parent()
    import torch

    torch.set_num_threads(1)
    from wan_data.video import decode  # what is loaded from here on counts as the job's memory

    del decode
    if Path("/proc/self/statm").exists():
        limit = _address_space() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # Read by a thread: else the parent could stand sending a job while this process stands sending it frames.
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(connection, jobs), daemon=True).start()
    answers = _Answers(connection)
    while (job := jobs.get()) is not None:
        try:
            _answer(job, answers)
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
