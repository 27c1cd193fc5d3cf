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
- It writes to a folder for temporary files, which may be full, and leaves the folder when it is killed.
- It sends SIGTERM to the process group of a rank, so that a rank which saves at SIGTERM first loses its data loader's
  workers; and the child processes of a dead rank keep running.
- It waits 30 seconds for ranks that ignore SIGTERM, even if further signals arrive.
- When it is killed, its ranks keep running. When a later rank cannot be started, the earlier ones keep running.
- It replaces ``$$`` and ``${local_rank}`` in the arguments of the ranks, which may be prompts.

When this process is killed, the ranks end by themselves (``child_process.Supervisor.follow``). torch is imported only
when ranks are started.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from wan_model.system.child_process import FAILURE_FILE, LAUNCHER_PID, Failure, error_message
from wan_model.system.process_tree import STOPPED_SECONDS, descendants, end_descendants, subreaper
from wan_model.system.torchrun import processors

GRACE_SECONDS = 10.0
# Wait after a failure for other ranks to fail for the same cause, and for the exit status of a killed rank.
_SETTLE_SECONDS = 1.0
# Wait for the cause while all failures seen are consequences of another rank's failure.
_CAUSE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


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
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}

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
            signal.signal(number, before if before is signal.SIG_IGN else self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


def _output(silent: bool) -> Any:
    """Where torch sends the output of its local rank 0; its own class writes to a folder of log files."""
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class Output(LogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            stream = {0: os.devnull if silent else ""}  # empty for that of this process
            return LogsDest(stdouts=stream, stderrs=dict(stream), error_files={0: os.devnull})

        @property
        def root_log_dir(self) -> str:
            return os.devnull

    return Output()


class Rank:
    """The process of a rank, the leader of its own session and process group.

    Args:
        number: its rank.
        command: the command to run.
        values: its environment.
        failure_file: an open file that it writes its failure to.
        silent: whether its output is dropped.

    Attributes:
        failure: its failure, or None; the process may still be running.
        ended: whether its process has ended.
    """

    def __init__(
        self, number: int, command: Sequence[str], values: Mapping[str, str], failure_file: int, *, silent: bool
    ) -> None:
        from torch.distributed.elastic.multiprocessing import start_processes

        self.number, self.ended = number, False
        self.failure: Failure | None = None
        self._failure_file = failure_file
        self._stopped_at: float | None = None
        # One context per rank: if a later rank cannot be started, torch loses track of those that it started before.
        # The only local rank of each context is 0.
        self._context = start_processes(
            name="rank",
            entrypoint=command[0],
            args={0: tuple(command[1:])},
            envs={0: dict(values)},
            logs_specs=_output(silent),
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
            self.failure = self.failure or Failure.read(self._failure_file)
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


def _failure_of_status(status: int, *, killed: bool) -> Failure:
    if not killed:
        return Failure(time.monotonic(), status, f"the process ended with exit status {status}", lost_peer=False)
    hint = "; the system does so where memory runs out" if status == signal.SIGKILL else ""
    text = f"the process was killed by {signal.Signals(status).name}{hint}"
    return Failure(time.monotonic(), 128 + status, text, lost_peer=False)


def _end(ranks: Sequence[Rank], received: Sequence[int], kept: Sequence[int]) -> None:
    """End the ranks and all of their descendants; ``kept`` are the other children of this process."""
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
    end_descendants(kept, time.monotonic() + GRACE_SECONDS)


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
    message = error_message(cause.text, None if shared else number) if cause.text else ""
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


def _rank_variables() -> dict[str, str]:
    """Environment variables of all ranks: the store exists already, and the launcher that started them."""
    return {
        **os.environ,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        LAUNCHER_PID: str(os.getpid()),
    }


@contextlib.contextmanager
def _failure_file() -> Iterator[tuple[int, str]]:
    """A file for the failure of a rank, as a descriptor and a path; in memory, so that it needs no space on a disk."""
    if sys.platform != "linux":
        with tempfile.NamedTemporaryFile(prefix="wan-rank-") as file:
            yield file.fileno(), file.name
        return
    descriptor = os.memfd_create("wan-rank-failure")
    try:
        yield descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _not_started(error: OSError, rank: int, command: Sequence[str]) -> str:
    """Why the process of a rank could not be started."""
    text = f"the process of rank {rank} could not be started: {error.strerror or error}"
    if error.errno == errno.E2BIG:
        size = sum(len(os.fsencode(argument)) for argument in command)
        return f"{text} ({size:,} bytes); put prompts or settings into a file, and name the file"
    if error.errno in (errno.EAGAIN, errno.ENOMEM):
        return f"{text}; start fewer processes, or raise the limits of processes and memory (ulimit -u, ulimit -v)"
    return text


def launch(module: str, arguments: Sequence[str], ranks: int, *, first_rank_output: bool = False) -> Outcome:
    """Run ``python -P -m MODULE ARGUMENTS`` in ``ranks`` processes.

    When one fails, or this process receives a signal, all are ended. When this function returns, none of their
    descendants is left, and the cause has been printed on standard error. ``-P`` removes the working folder from the
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
        kept = descendants()
        stack.enter_context(subreaper())
        stack.enter_context(_exit_statuses_kept())
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # In this process, so that its port is bound before the ranks start, and it exists until the last one has ended.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        base, command = _rank_variables(), [sys.executable, "-P", "-m", module, *arguments]
        files = [stack.enter_context(_failure_file()) for _ in range(ranks)]
        stack.callback(lambda: _end(started, interrupts.received, kept))
        for number, (descriptor, path) in enumerate(files):
            values = {**environment(number, ranks, store.port, base), FAILURE_FILE: path}
            silent = first_rank_output and number > 0
            try:
                with interrupts.overriding_torch_handlers():
                    started.append(Rank(number, command, values, descriptor, silent=silent))
            except OSError as error:
                print(error_message(_not_started(error, number, command), None), file=sys.stderr, flush=True)
                return Outcome(1)
        if _monitor(started, interrupts.received):
            return Outcome(0)
        if interrupts.received:
            number = interrupts.received[0]
            print(f"Ended by {signal.Signals(number).name}.", file=sys.stderr, flush=True)
            return Outcome(128 + number, interrupted=True)
        code, message = _cause({rank.number: rank.failure for rank in started if rank.failure}, ranks)
        if message:
            print(message, file=sys.stderr, flush=True)
        return Outcome(code)
