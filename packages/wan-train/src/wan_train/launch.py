"""Starting the processes of a run on this machine, and ending them together."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

_GRACE_SECONDS = 10.0


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


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def launch(argument: str, ranks: int) -> int:
    """Run ``python -m wan_train.worker ARGUMENT`` as that many processes.

    The first that fails ends the others; so does an interrupt of this process.

    Returns:
        0, or the exit status of the first process that failed.
    """
    port = _free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "wan_train.worker", argument],
            env=environment(rank, ranks, port, os.environ),
            # Only the first rank narrates; every rank may complain. With pipeline stages the last one has the loss.
            start_new_session=True,
        )
        for rank in range(ranks)
    ]

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupted)
    try:
        while True:
            codes = [process.poll() for process in processes]
            if failed := [code for code in codes if code]:
                return failed[0] if failed[0] > 0 else 128 - failed[0]
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.1)
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end(processes)
