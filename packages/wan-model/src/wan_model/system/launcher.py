"""Starts several ranks on this machine with torch's elastic multiprocessing, and ends them together.

``torch.distributed.elastic.multiprocessing`` starts each rank in a session of its own, drops unwanted output and
collects the exit status; the rendezvous is a ``TCPStore`` in this process, as under torchrun. When one rank ends, all
ranks are ended within ``GRACE_SECONDS``, and the cause is printed in one sentence:

| a rank | is detected by |
|---|---|
| raises | the failure that it records (``child_process``); the first cause is printed, not its consequences |
| is killed, or exits | its exit status |
| is stopped (SIGSTOP) | the same call, after ``STOPPED_SECONDS`` |
| hangs in a collective | the error of its peers after the timeout of their process group |

torch's own agent, ``LocalElasticAgent``, is not used for the following reasons, which this module and ``child_process``
address. Its restarts and its rendezvous of several machines are not needed here; torchrun provides them.

- The agent ends all ranks at the first exit status that it sees. Often that is a rank which lost its peer.
- It does not detect a stopped rank, and a stopped rank does not receive its SIGTERM.
- It sends SIGTERM to the process group of a rank, so that a rank which saves at SIGTERM first loses its data loader's
  workers; and the child processes of a dead rank keep running.
- It waits 30 seconds for ranks that ignore SIGTERM, even if further signals arrive.
- When it is killed, its ranks keep running. When a later rank cannot be started, the earlier ones keep running.
- It replaces ``$$`` and ``${local_rank}`` in the arguments of the ranks, which may be prompts.

When this process is killed, the ranks end by themselves (``child_process.Supervisor.follow``). torch is imported only
when ranks are started.
"""

import contextlib
import ctypes
import dataclasses
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from wan_model.system.child_process import FAILURES, LAUNCHER_PID, Failure, error_message
from wan_model.system.torchrun import processors

GRACE_SECONDS = 10.0
STOPPED_SECONDS = 8.0
# Wait after a failure for other ranks to fail for the same cause, and for the exit status of a killed rank.
_SETTLE_SECONDS = 1.0
# Wait for the cause while all failures seen are consequences of another rank's failure.
_CAUSE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a launch.

    Attributes:
        code: 0; the exit status of the cause, 128 + N if signal N killed that rank; 128 + N if signal N interrupted
            this process.
        interrupted: whether a signal to this process ended the ranks.
    """

    code: int
    interrupted: bool = False


def environment(rank: int, ranks: int, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of torch.distributed for a rank, as torchrun sets them."""
    threads = base.get("OMP_NUM_THREADS") or str(max(1, processors() // ranks))
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


class Interrupts:
    """Records the signals that ask this process to end; signals that were ignored before stay ignored.

    Use as a context manager, in the main thread.

    Attributes:
        received: the numbers of the received signals, in order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        # Includes SIGQUIT, for which torch also sets a handler when it starts a process.
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (*_SIGNALS, signal.SIGQUIT)}

    def __enter__(self) -> "Interrupts":
        self._install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextlib.contextmanager
    def overriding_torch_handlers(self) -> Iterator[None]:
        """Record signals while torch starts a process: its own handlers raise an exception, which is caught here."""
        from torch.distributed.elastic.multiprocessing import SignalException

        try:
            yield
        except SignalException as interrupt:
            self.received.append(interrupt.sigval)
        finally:
            self._install()

    def _install(self) -> None:
        for number, before in self._before.items():
            taken = number in _SIGNALS and before is not signal.SIG_IGN
            signal.signal(number, self._record if taken else before)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


class Rank:
    """The process of a rank, the leader of its own session and process group.

    Args:
        number: its rank.
        command: the command to run.
        values: its environment.
        folder: the folder for its failure.
        silent: whether its output is dropped.

    Attributes:
        failure: its failure, or None; the process may still be running.
        ended: whether its process has ended.
    """

    def __init__(
        self, number: int, command: Sequence[str], values: Mapping[str, str], folder: Path, *, silent: bool
    ) -> None:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

        self.number, self.ended = number, False
        self.failure: Failure | None = None
        self._folder = folder
        self._stopped_at: float | None = None
        # One context per rank: if a later rank cannot be started, torch loses track of those that it started before.
        # The only local rank of each context is 0; a filter without it drops the output.
        self._context = start_processes(
            name="rank",
            entrypoint=command[0],
            args={0: tuple(command[1:])},
            envs={0: dict(values)},
            logs_specs=DefaultLogsSpecs(log_dir=str(folder), local_ranks_filter={1} if silent else None),
        )
        self._pid: int = self._context.pids()[0]

    def update(self) -> None:
        """Check whether it has failed, stopped or ended."""
        if not self.ended:
            # WNOWAIT leaves the exit status to torch, and keeps the process id from being reused.
            which = os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOHANG | os.WNOWAIT
            event = os.waitid(os.P_PID, self._pid, which)
            code, status = (event.si_code, event.si_status) if event else (None, 0)
            self.ended = code in (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
            self.failure = self.failure or Failure.read(self._folder, self.number)
            if self.ended and self.failure is None and status:
                self.failure = _failure_of_status(status, killed=code != os.CLD_EXITED)
            self._see_stop(stopped=code == os.CLD_STOPPED)

    def _see_stop(self, *, stopped: bool) -> None:
        now = time.monotonic()
        self._stopped_at = (self._stopped_at or now) if stopped else None
        if self._stopped_at is not None and self.failure is None and now - self._stopped_at >= STOPPED_SECONDS:
            text = f"the process was stopped (SIGSTOP) {now - self._stopped_at:.0f} seconds ago and does not go on"
            self.failure = Failure(now, 1, text, lost_peer=False)

    def terminate(self) -> None:
        """Send SIGTERM; a stopped process is continued so that it receives the signal."""
        if not self.ended:
            os.kill(self._pid, signal.SIGTERM)
            os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill its process group."""
        os.killpg(self._pid, signal.SIGKILL)  # the group exists until the next line has collected the exit status
        self._context.close(signal.SIGKILL)

    def collect_orphans(self, deadline: float) -> None:
        """Wait for the end of its child processes, which are children of this process by now (``_subreaper``)."""
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitid(os.P_PGID, self._pid, os.WEXITED | os.WNOHANG) is None:
                    time.sleep(0.005)


def _failure_of_status(status: int, *, killed: bool) -> Failure:
    if not killed:
        return Failure(time.monotonic(), status, f"the process ended with exit status {status}", lost_peer=False)
    hint = "; the system does so where memory runs out" if status == signal.SIGKILL else ""
    text = f"the process was killed by {signal.Signals(status).name}{hint}"
    return Failure(time.monotonic(), 128 + status, text, lost_peer=False)


def _end(ranks: Sequence[Rank], received: Sequence[int]) -> None:
    before, deadline = len(received), time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        rank.terminate()
    # A second interrupt ends the wait.
    while not all(rank.ended for rank in ranks) and time.monotonic() < deadline and len(received) == before:
        time.sleep(_POLL_SECONDS)
        for rank in ranks:
            rank.update()
    for rank in ranks:
        rank.kill()
    deadline = time.monotonic() + GRACE_SECONDS
    for rank in ranks:
        rank.collect_orphans(deadline)


@contextlib.contextmanager
def _exit_statuses_kept() -> Iterator[None]:
    """Handle SIGCHLD by default: where the parent process ignored it, the system drops the exit status of a rank."""
    before = signal.getsignal(signal.SIGCHLD)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Make orphaned descendants of this process its children, so that it can wait for their end (Linux)."""
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _settle_seconds(failures: Sequence[Failure], running: float) -> float:
    """Seconds to wait for further failures; ``running`` is the age of the ranks at the first failure."""
    if all(failure.lost_peer for failure in failures):
        return _CAUSE_SECONDS
    if all(failure.code == 2 for failure in failures):
        # Ranks that refuse the same input fail at nearly the same age, and their common message is printed once.
        return min(_CAUSE_SECONDS, max(_SETTLE_SECONDS, running / 2))
    return _SETTLE_SECONDS


def _monitor(ranks: Sequence[Rank], received: Sequence[int]) -> bool:
    """Wait until all ranks have succeeded (True), or until one fails or a signal arrives (False)."""
    started, failed_at = time.monotonic(), 0.0
    while not received:
        for rank in ranks:
            rank.update()
        failures = [rank.failure for rank in ranks if rank.failure]
        if all(rank.ended or rank.failure for rank in ranks):
            return not failures
        if failures:
            failed_at = failed_at or time.monotonic()
            if time.monotonic() - failed_at >= _settle_seconds(failures, failed_at - started):
                return False
        time.sleep(_POLL_SECONDS)
    return False


def _cause(failures: Mapping[int, Failure], ranks: int) -> tuple[int, str]:
    """The exit status and the message of the first failure that is not a consequence of another one."""
    number, cause = min(failures.items(), key=lambda item: (item[1].lost_peer, item[1].at))
    shared = ranks == 1 or (len(failures) == ranks and len({failure.text for failure in failures.values()}) == 1)
    message = error_message(cause.text, None if shared else number)
    silent = [str(rank) for rank in range(ranks) if rank not in failures]
    if cause.lost_peer and silent:
        ranks_named = ", ".join(silent)
        message += f"\nThis happens when another process hangs or exits; no failure was reported by rank {ranks_named}."
    return cause.code, message


@contextlib.contextmanager
def _without_torchs_messages() -> Iterator[None]:
    # About the signals that torch sends and the packages that it finds: a user cannot act on these.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _rank_variables(folder: Path) -> dict[str, str]:
    """Environment variables of all ranks: the store exists already, and the launcher that started them."""
    return {
        **os.environ,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        LAUNCHER_PID: str(os.getpid()),
        FAILURES: str(folder),
    }


def launch(module: str, arguments: Sequence[str], ranks: int, *, first_rank_output: bool = False) -> Outcome:
    """Run ``python -P -m MODULE ARGUMENTS`` in ``ranks`` processes.

    When one fails, or this process receives a signal, all are ended. When this function returns, no process of their
    process groups is left, and the cause has been printed on standard error. ``-P`` removes the working folder from the
    import path of the ranks and of processes that they start with ``multiprocessing``.

    Args:
        module: a main module that uses ``child_process.Supervisor``.
        arguments: its arguments.
        ranks: number of processes.
        first_rank_output: drop the output of the other ranks.
    """
    started: list[Rank] = []
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(_without_torchs_messages())
        stack.enter_context(_subreaper())
        stack.enter_context(_exit_statuses_kept())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wan-ranks-")))
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # In this process, so that its port is bound before the ranks start, and it exists until the last one has ended.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stack.callback(lambda: _end(started, interrupts.received))
        base = _rank_variables(folder)
        for number in range(ranks):
            with interrupts.overriding_torch_handlers():
                values = environment(number, ranks, store.port, base)
                command = [sys.executable, "-P", "-m", module, *arguments]
                started.append(Rank(number, command, values, folder, silent=first_rank_output and number > 0))
        if _monitor(started, interrupts.received):
            return Outcome(0)
        if interrupts.received:
            number = interrupts.received[0]
            print(f"Ended by {signal.Signals(number).name}.", file=sys.stderr, flush=True)
            return Outcome(128 + number, interrupted=True)
        code, message = _cause({rank.number: rank.failure for rank in started if rank.failure}, ranks)
        print(message, file=sys.stderr, flush=True)
        return Outcome(code)
