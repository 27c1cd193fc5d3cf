"""Starting the processes of a run on this machine, and ending them together.

Whatever ends one of them ends all, within ``GRACE_SECONDS``, and is named in one line:

==========================  ===========================================================================================
a process                   is noticed by
==========================  ===========================================================================================
raises                      what it tells (``wan_train.launch.supervision``); of all ranks' errors the cause is shown,
                            not what followed from it
is killed, or exits         its exit status
is stopped (SIGSTOP)        the same call; ``STOPPED_SECONDS`` are forgiven
hangs in a collective       its peers' error when ``dist.distributed_timeout_minutes`` (10) have passed
==========================  ===========================================================================================

When this process itself is killed, its ends of the sockets close and the ranks leave by themselves.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from wan_train.launch.supervision import DESCRIPTOR, Failure, sentence

GRACE_SECONDS = 10.0
STOPPED_SECONDS = 8.0
# Long enough for a killed process to be seen dead after its peers have missed it.
_SETTLE_SECONDS = 1.0
_LOOK_SECONDS = 0.05


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(rank: int, ranks: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """The variables by which torch.distributed finds its peers, as torchrun sets them."""
    threads = base.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))
    return {
        **base,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
    }


class _Rank:
    """One process, the first of a session and group of its own.

    Attributes:
        failure: why it cannot go on, or None; its exit status may yet be to come.
        over: whether it has ended.
    """

    def __init__(self, number: int, argument: str, values: Mapping[str, str]) -> None:
        self.number, self.over, self._said = number, False, b""
        self.failure: Failure | None = None
        self._stopped_at: float | None = None
        self._link, theirs = socket.socketpair()
        self._link.setblocking(False)
        with theirs, contextlib.ExitStack() as undo:
            undo.callback(self._link.close)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wan_train.launch.worker", argument],
                env={**values, DESCRIPTOR: str(theirs.fileno())},
                pass_fds=(theirs.fileno(),),
                # An interrupt of the terminal is for the launcher; whatever the rank starts is found by its group.
                start_new_session=True,
            )
            undo.pop_all()

    def look(self) -> None:
        """See what has become of it."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while part := self._link.recv(1 << 16):
                self._said += part
        if self.failure is None and b"\n" in self._said:
            self.failure = Failure.from_line(self._said)
        while not self.over:
            pid, status = os.waitpid(self._process.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid == 0:
                break
            self._note(status)
        if self.failure is None and self._stopped_at is not None:
            seconds = time.monotonic() - self._stopped_at
            if seconds >= STOPPED_SECONDS:
                self._fail(1, f"the process was stopped (SIGSTOP) {seconds:.0f} seconds ago and does not go on")

    def _note(self, status: int) -> None:
        if os.WIFSTOPPED(status):
            self._stopped_at = time.monotonic()
        elif os.WIFCONTINUED(status):
            self._stopped_at = None
        else:
            code = os.waitstatus_to_exitcode(status)
            self._process.returncode = code  # it was not waited for by its own means
            self.over = True
            if self.failure is None and code < 0:
                hint = "; the system does so where memory runs out" if code == -signal.SIGKILL else ""
                self._fail(128 - code, f"the process was killed by {signal.Signals(-code).name}{hint}")
            elif self.failure is None and code > 0:
                self._fail(code, f"the process ended with exit status {code}")

    def _fail(self, code: int, text: str) -> None:
        self.failure = Failure(time.monotonic(), code, text, lost_peer=False)

    def terminate(self) -> None:
        """Ask it to end; a stopped one is woken to hear it."""
        if not self.over:
            os.kill(self._process.pid, signal.SIGTERM)
            os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        while not self.over:
            self._note(os.waitpid(self._process.pid, 0)[1])
        self._link.close()


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The signals that ask this process to end, as they come; what was ignored before stays so."""
    received: list[int] = []
    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(ranks: Sequence[_Rank], received: Sequence[int]) -> None:
    before, deadline = len(received), time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        rank.terminate()
    # Who interrupts twice does not want to wait.
    while not all(rank.over for rank in ranks) and time.monotonic() < deadline and len(received) == before:
        time.sleep(_LOOK_SECONDS)
        for rank in ranks:
            rank.look()
    for rank in ranks:
        rank.kill()


def _watch(ranks: Sequence[_Rank], received: Sequence[int]) -> bool:
    """Wait until all have ended well (True), or one has failed or an interrupt has come (False)."""
    failed_at = None
    while not received:
        for rank in ranks:
            rank.look()
        failed = [rank for rank in ranks if rank.failure]
        if all(rank.over for rank in ranks):
            return not failed
        if failed:
            failed_at = failed_at or time.monotonic()
            if time.monotonic() - failed_at >= _SETTLE_SECONDS:
                return False
        time.sleep(_LOOK_SECONDS)
    return False


@dataclasses.dataclass(frozen=True)
class _Verdict:
    code: int
    line: str


def _judge(failures: Mapping[int, Failure], ranks: int) -> _Verdict:
    """The cause: the first failure that did not follow from another's; and what to say of it."""
    number, cause = min(failures.items(), key=lambda item: (item[1].lost_peer, item[1].at))
    shared = ranks == 1 or (len(failures) == ranks and len({failure.text for failure in failures.values()}) == 1)
    line = sentence(cause.text, None if shared else number)
    silent = [str(rank) for rank in range(ranks) if rank not in failures]
    if cause.lost_peer and silent:
        line += f"\nThis follows when another process hangs or leaves; nothing was heard of rank {', '.join(silent)}."
    return _Verdict(cause.code, line)


def launch(argument: str, ranks: int) -> int:
    """Run ``python -m wan_train.launch.worker ARGUMENT`` as that many processes.

    The first that fails ends the others; so does an interrupt of this process. When this returns none of them is left,
    nor anything in their groups.

    Returns:
        0; the exit status of the process that failed first, 128 + N if signal N killed it; 128 + N if signal N
        interrupted this process.
    """
    port = _free_port()
    started: list[_Rank] = []
    with _interrupts() as received:
        try:
            for number in range(ranks):
                started.append(_Rank(number, argument, environment(number, ranks, port, os.environ)))
            if _watch(started, received):
                return 0
            if received:
                print(f"Ended by {signal.Signals(received[0]).name}.", file=sys.stderr, flush=True)
                return 128 + received[0]
            verdict = _judge({rank.number: rank.failure for rank in started if rank.failure}, ranks)
            print(verdict.line, file=sys.stderr, flush=True)
            return verdict.code
        finally:
            _end(started, received)
