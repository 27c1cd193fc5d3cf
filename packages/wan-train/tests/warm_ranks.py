"""Ranks without the nine seconds that each needs to import the engine: forked from a process that has done it.

Everything behind ``wan_train.launch.worker`` runs as ever, in processes of its own. What the launcher does is left
out, and tested with the real command line in test_launch.py and test_command.py.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Ended:
    """How the ranks ended: their exit statuses, negative for a signal, and what they wrote on stderr."""

    codes: list[int]
    errors: str


class WarmRanks:
    """The process to fork from; it ends with this one."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def run(self, argument: str, ranks: int, timeout: float = 300) -> Ended:
        """``wan_train.launch.worker`` as that many processes; the first that fails ends the others."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            order = json.dumps({"argument": argument, "ranks": ranks, "folder": folder, "timeout": timeout})
            self._server.stdin.write(order.encode() + b"\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
            assert answer, "the process to fork from has ended"
            errors = "".join(path.read_text() for path in sorted(Path(folder).iterdir()))
        return Ended(json.loads(answer), errors)


def _run_rank(order: dict[str, object], rank: int, port: int) -> int:
    from wan_train.launch import worker
    from wan_train.launch.launcher import environment

    ranks = int(str(order["ranks"]))
    os.setsid()
    os.environ.update(environment(rank, ranks, port, os.environ))
    for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, f"{order['folder']}/{rank}")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
    sys.argv = ["worker", str(order["argument"])]
    return worker.main()


def _fork(order: dict[str, object], rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _run_rank(order, rank, port)
    except BaseException:
        traceback.print_exc()
    finally:
        from multiprocessing.util import _exit_function

        _exit_function()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], timeout: float) -> list[int]:
    def too_long(number: int, frame: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    codes: dict[int, int] = {}
    try:
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:
                break
    except TimeoutError:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    for pid in pids:
        if pid not in codes:
            os.killpg(pid, signal.SIGKILL)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [codes[pid] for pid in pids]


def _serve() -> None:
    from wan_train import engine

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Megatron talks while it is imported
    engine.start()
    import megatron.bridge.training.pretrain  # noqa: F401

    import wan_train.checkpoint.hooks
    import wan_train.data.dataset
    import wan_train.loop.callback
    import wan_train.loop.validation  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [_fork(order, rank, port) for rank in range(order["ranks"])]
        print(json.dumps(_wait(pids, order["timeout"])), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
