"""A tool that a signal ends takes its commands with it, and what they have started."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from common.commands import running_commands
from wan_model.system.process_tree import descendants, end_descendants, subreaper

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# wan-train gives its ranks ten seconds to save.
GRACE_SECONDS = 12.0
_KILL_SECONDS = 10.0
_POLL_SECONDS = 0.05


class EndedBySignal(BaseException):
    """A signal asked this process to end; no ``Exception``, so that nothing on the way takes it for a failure.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended, as of a shell."""
        return 128 + self.number

    @property
    def sentence(self) -> str:
        """What happened, for users."""
        return f"ended by {signal.Signals(self.number).name}, and its commands with it"


@contextlib.contextmanager
def ending_commands() -> Iterator[None]:
    """In this context SIGINT, SIGTERM and SIGHUP end the commands of ``run_command``, then this process.

    A signal that was ignored before stays ignored: SIGINT in a job in the background of a script, SIGHUP under nohup.
    Use it in the main thread.

    Raises:
        EndedBySignal: after a signal; then no process that was started in the context is left.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            _terminate()  # here, because threads that wait for a command go on waiting otherwise
            raise EndedBySignal(number)

    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}
    kept = descendants()
    with subreaper():
        try:
            for number, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(number, end)
            yield
        finally:
            if received:
                _wait(received)
                end_descendants(kept, time.monotonic() + _KILL_SECONDS)
            for number, handler in before.items():
                signal.signal(number, handler)


def _terminate() -> None:
    """Send SIGTERM, which no shell has made a command ignore; one that is stopped is continued to receive it."""
    for process in running_commands():
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGCONT)


def _wait(received: list[int]) -> None:
    """Wait for the end of the commands; a second signal ends the wait."""
    deadline = time.monotonic() + GRACE_SECONDS
    while len(received) == 1 and time.monotonic() < deadline:
        if all(process.poll() is not None for process in running_commands()):
            return
        time.sleep(_POLL_SECONDS)
