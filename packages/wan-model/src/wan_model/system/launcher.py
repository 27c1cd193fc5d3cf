"""Several ranks on this machine, started by torch's elastic multiprocessing and ended together.

``torch.distributed.elastic.multiprocessing`` starts each rank in a session of its own, drops the output that is not
wanted and collects the exit status; the rendezvous is a ``TCPStore`` in this process, as under torchrun. Whatever ends
one rank ends all, within ``GRACE_SECONDS``, and is named in one sentence:

==========================  ===========================================================================================
a rank                      is noticed by
==========================  ===========================================================================================
raises                      what it records (``wan_model.system.child_process``); of all ranks' errors the cause is
                            shown, not what followed from it
is killed, or exits         its exit status
is stopped (SIGSTOP)        the same call; ``STOPPED_SECONDS`` are allowed
hangs in a collective       its peers' error when the timeout of their process group has passed
==========================  ===========================================================================================

torch's own agent, ``LocalElasticAgent``, does not do the following, which this module and ``child_process`` add; its
restarts and its rendezvous of several machines are not needed here, for those there is torchrun:

- The agent ends all ranks at the first exit status that it sees. Often that is a rank which lost its peer.
- It does not notice a stopped rank, and a stopped rank does not receive its SIGTERM.
- It sends SIGTERM to the whole group of a rank, so that a rank which saves at SIGTERM loses its data loader's workers
  first; and what a dead rank has started lives on.
- It waits 30 seconds for ranks that ignore SIGTERM, whatever further signals come.
- When it is killed, its ranks live on. When a later rank cannot be started, the earlier ones live on.
- It replaces ``$$`` and ``${local_rank}`` in the arguments of the ranks, which may be prompts.

When this process is killed, the ranks end by themselves (``child_process.Supervisor.follow``). Imports torch only to
launch.
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

GRACE_SECONDS = 10.0
STOPPED_SECONDS = 8.0
# Long enough for the other ranks to fail of the same cause, and for a killed rank to be seen dead.
_SETTLE_SECONDS = 1.0
# As long as all failures follow from another rank's, and none of that one is seen.
_CAUSE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the ranks ended.

    Attributes:
        code: 0; the exit status of the cause, 128 + N if signal N killed that rank; 128 + N if signal N interrupted
            this process.
        interrupted: whether a signal to this process ended them.
    """

    code: int
    interrupted: bool = False


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


class Interrupts:
    """The signals that ask this process to end, as they come; what was ignored before stays ignored.

    Use as a context manager, in the main thread.

    Attributes:
        received: their numbers, in order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        # With SIGQUIT, for which torch sets a handler, too, whenever it starts a process.
        self._before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (*_SIGNALS, signal.SIGQUIT)}

    def __enter__(self) -> "Interrupts":
        self._install()
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextlib.contextmanager
    def in_place_of_torchs(self) -> Iterator[None]:
        """Around a start of processes, for whose time torch's handlers are set: those raise an exception."""
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
    """One process, the first of a session and group of its own.

    Args:
        number: its rank.
        command: what to run.
        values: its environment.
        folder: where it records a failure.
        silent: whether its output is dropped.

    Attributes:
        failure: why it cannot go on, or None; its end may yet be to come.
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
        # One context a rank: where a later rank cannot be started, torch forgets those that it has started before.
        # The only local rank of each is 0; a filter without it drops the output.
        self._context = start_processes(
            name="rank",
            entrypoint=command[0],
            args={0: tuple(command[1:])},
            envs={0: dict(values)},
            logs_specs=DefaultLogsSpecs(log_dir=str(folder), local_ranks_filter={1} if silent else None),
        )
        self._pid: int = self._context.pids()[0]

    def update(self) -> None:
        """Look for its failure, stop or end."""
        if not self.ended:
            # Without collecting the exit status (WNOWAIT): that is torch's, and keeps the process id from reuse.
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
        """Ask it to end; a stopped one is continued, so that it receives the signal."""
        if not self.ended:
            os.kill(self._pid, signal.SIGTERM)
            os.kill(self._pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it and whatever it has started."""
        os.killpg(self._pid, signal.SIGKILL)  # the group exists until the next line has collected the exit status
        self._context.close(signal.SIGKILL)

    def collect_orphans(self, deadline: float) -> None:
        """Wait for the end of what it had started, which is this process's to wait for (``_subreaper``)."""
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
def _subreaper() -> Iterator[None]:
    """Make orphans among the descendants of this process its children, so that it can wait for their end (Linux)."""
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
    """How long to wait for further failures, of ranks that had run for so many seconds when the first came."""
    if all(failure.lost_peer for failure in failures):
        return _CAUSE_SECONDS
    if all(failure.code == 2 for failure in failures):
        # Ranks that refuse the same input do so at nearly the same time of their run, and then it is said once.
        return min(_CAUSE_SECONDS, max(_SETTLE_SECONDS, running / 2))
    return _SETTLE_SECONDS


def _monitor(ranks: Sequence[Rank], received: Sequence[int]) -> bool:
    """Wait until all have ended well (True), or one has failed or an interrupt has come (False)."""
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
    """The exit status and the message of the first failure that did not follow from another rank's."""
    number, cause = min(failures.items(), key=lambda item: (item[1].lost_peer, item[1].at))
    shared = ranks == 1 or (len(failures) == ranks and len({failure.text for failure in failures.values()}) == 1)
    message = error_message(cause.text, None if shared else number)
    silent = [str(rank) for rank in range(ranks) if rank not in failures]
    if cause.lost_peer and silent:
        ranks_named = ", ".join(silent)
        message += f"\nThis follows when another process hangs or leaves; nothing was heard of rank {ranks_named}."
    return cause.code, message


@contextlib.contextmanager
def _without_torchs_messages() -> Iterator[None]:
    # Of the signals that torch sends to processes, and of packages that it finds: nothing that a user could put right.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _rank_variables(folder: Path) -> dict[str, str]:
    """What all ranks get beside their ``environment``: the store is there already, and who started them."""
    return {
        **os.environ,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        LAUNCHER_PID: str(os.getpid()),
        FAILURES: str(folder),
    }


def launch(module: str, arguments: Sequence[str], ranks: int, *, first_rank_output: bool = False) -> Outcome:
    """Run ``python -P -m MODULE ARGUMENTS`` as that many processes.

    The first that fails ends the others; so does a signal to this process. When this returns none of them is left, nor
    anything in their groups, and the cause has been printed on standard error. ``-P`` keeps the working folder off the
    import path, of the ranks and of what they start with ``multiprocessing``.

    Args:
        module: its processes use ``child_process.Supervisor``.
        arguments: theirs.
        ranks: how many processes.
        first_rank_output: drop what the other ranks print.
    """
    started: list[Rank] = []
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        stack.enter_context(_without_torchs_messages())
        stack.enter_context(_subreaper())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wan-ranks-")))
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # In this process: its port is bound before the ranks start, and it lasts until the last of them has ended.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stack.callback(lambda: _end(started, interrupts.received))
        base = _rank_variables(folder)
        for number in range(ranks):
            with interrupts.in_place_of_torchs():
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
