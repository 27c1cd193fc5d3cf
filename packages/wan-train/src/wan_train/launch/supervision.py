"""What ties a training process to whoever started it: it leaves when they do, and tells them why it fails.

``wan-train`` gives each process that it starts one end of a pair of sockets. The launcher writes nothing into it; its
end closes when the launcher is gone, however that happened. torchrun gives no such thing and is watched by the parent's
number.
"""

import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Self

DESCRIPTOR = "WAN_TRAIN_LAUNCHER"
_UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_FOR_THE_CAUSE = 5.0
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a rank cannot go on.

    Attributes:
        at: by ``time.monotonic``, which all processes of a machine share, seconds.
        code: the exit status that goes with it.
        text: a sentence for users, or a traceback.
        lost_peer: it follows from another rank's end, or from its silence.
    """

    at: float
    code: int
    text: str
    lost_peer: bool

    @classmethod
    def of(cls, error: Exception) -> Self:
        """A ValueError is a sentence, anything else is shown with its traceback."""
        if isinstance(error, ValueError):
            return cls(time.monotonic(), 2, str(error), lost_peer=False)
        text = "".join(traceback.format_exception(error)).rstrip()
        return cls(time.monotonic(), 1, text, _lost_peer(error))

    def to_line(self) -> bytes:
        """As bytes that end with the only newline among them."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """The inverse."""
        return cls(**json.loads(line))


def _lost_peer(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.distributed.DistError):
        return True
    # gloo's errors are plain ones, which begin with the place in its source.
    if isinstance(error, RuntimeError) and "gloo/" in str(error):
        return True
    return error.__cause__ is not None and _lost_peer(error.__cause__)


class Starter:
    """Whoever started this process.

    Args:
        link: this process's end of the launcher's pair of sockets, if ``wan-train`` started it.
        torchrun: the number of the parent, if that is torchrun.
    """

    def __init__(self, link: socket.socket | None, torchrun: int | None) -> None:
        self._link, self._torchrun = link, torchrun

    @classmethod
    def find(cls) -> Self:
        """By the environment, from which the descriptor is taken so that children do not look for it."""
        number = os.environ.pop(DESCRIPTOR, None)
        if number is not None:
            link = socket.socket(fileno=int(number))
            link.set_inheritable(False)
            return cls(link, None)
        return cls(None, os.getppid() if _UNDER_TORCHRUN in os.environ else None)

    def follow(self) -> None:
        """From now on this process, and all that it starts in its group, ends when the starter does."""
        if self._link is not None:
            wait: Callable[[], None] = self._until_the_link_closes
        elif self._torchrun is not None:
            wait = self._until_the_parent_changes
        else:
            return
        threading.Thread(target=_leave_after, args=(wait,), name="follows the launcher", daemon=True).start()
        if sys.platform == "linux":
            # The thread of a stopped process would not see it: the kernel wakes the process for that.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGCONT))

    def tell(self, error: Exception) -> int:
        """Say why this process ends: to the launcher, which shows the first cause of all ranks', else on stderr.

        Returns:
            The exit status for it.
        """
        failure = Failure.of(error)
        if self._link is not None:
            self._link.sendall(failure.to_line())
            return failure.code
        if self._torchrun is not None:
            if failure.lost_peer:
                # torchrun ends this process as soon as the one ends that is the cause, and that one should be heard.
                time.sleep(_SECONDS_FOR_THE_CAUSE)
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)  # for torchrun's own summary
        print(sentence(failure.text, os.environ.get("RANK")), file=sys.stderr, flush=True)
        return failure.code

    def _until_the_link_closes(self) -> None:
        assert self._link is not None
        try:
            while self._link.recv(1):
                pass
        except ConnectionError:
            pass

    def _until_the_parent_changes(self) -> None:
        while os.getppid() == self._torchrun:
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def sentence(text: str, rank: str | int | None) -> str:
    """An error as users see it; of no rank where it is everybody's."""
    where = "Error" if rank is None else f"Error (rank {rank})"
    return f"{where}:{chr(10) if chr(10) in text else ' '}{text}"


def _leave_after(wait: Callable[[], None]) -> None:
    wait()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # workers of the data loader and writers of checkpoints too
    os._exit(1)
