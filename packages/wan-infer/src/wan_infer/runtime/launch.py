"""``--nproc-per-node N``: this command again, N times, as torchrun would start it. Imports no torch.

The first process that fails ends the others, and its error is the one that is shown. When this process goes, its
children go too.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

REPORTS, PARENT = "WAN_INFER_REPORTS", "WAN_INFER_PARENT"
_LOOK_SECONDS = 0.05
# Long enough for the cause to be told behind what followed from it, and for the others to end by themselves.
_SETTLE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def processes() -> int:
    """How many processes this one was started as one of, by torchrun's variables."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_child() -> bool:
    """Whether ``launch`` started this process."""
    return REPORTS in os.environ


def follow_parent() -> None:
    """Have this process killed when the one that started it, of number ``PARENT`` in the environment, is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != int(os.environ[PARENT]):
            os._exit(1)


def report_failure(text: str, *, lost_peer: bool) -> None:
    """Tell the launcher why this child ends.

    Args:
        text: a sentence, or a traceback.
        lost_peer: it follows from another process's end.
    """
    path = Path(os.environ[REPORTS]) / f"{os.environ['RANK']}.json"
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps({"text": text, "lost_peer": lost_peer, "at": time.monotonic()}), encoding="utf-8")
    os.replace(aside, path)


def launch(arguments: Sequence[str], count: int) -> int:
    """Run ``wan-infer ARGUMENTS`` in so many processes.

    Returns:
        0; 1 where a process failed, after one line on standard error; 128 + N if signal N interrupted this one.
    """
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="wan-infer-") as reports:
        try:
            port = _free_port()
            for rank in range(count):
                children.append(_start(arguments, rank, count, port, reports))
            ended_at = None
            while not received and any(child.poll() is None for child in children):
                if any(child.returncode for child in children):
                    ended_at = ended_at or time.monotonic()
                    if time.monotonic() - ended_at > _SETTLE_SECONDS:
                        break
                time.sleep(_LOOK_SECONDS)
        finally:
            for child in children:
                child.kill()
            codes = [child.wait() for child in children]
            for number, handler in previous.items():
                signal.signal(number, handler)
        if received:
            return 128 + received[0]
        if not any(codes):
            return 0
        print(f"Error: {_cause(Path(reports), codes)}", file=sys.stderr)
        return 1


def _start(arguments: Sequence[str], rank: int, count: int, port: int, reports: str) -> subprocess.Popen[bytes]:
    values = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count)),
        REPORTS: reports,
        PARENT: str(os.getpid()),
    }
    # The first speaks for all.
    silent = None if rank == 0 else subprocess.DEVNULL
    command = [sys.executable, "-m", "wan_infer", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, **values}, stdin=subprocess.DEVNULL, stdout=silent, stderr=silent
    )


def _cause(reports: Path, codes: Sequence[int]) -> str:
    """Of all that was told, what came first and did not follow from another's end."""
    told = []
    for rank, code in enumerate(codes):
        with contextlib.suppress(FileNotFoundError):
            report = json.loads((reports / f"{rank}.json").read_text(encoding="utf-8"))
            told.append((report["lost_peer"], report["at"], report["text"]))
            continue
        # Those that were still at work when it was over were killed here.
        if code < 0 and code != -signal.SIGKILL:
            told.append((False, float("inf"), f"process {rank} was killed by {signal.Signals(-code).name}"))
    causes = sorted(told)
    if causes and not causes[0][0]:
        return str(causes[0][2])
    silent = [str(rank) for rank in range(len(codes)) if not (reports / f"{rank}.json").exists()]
    return f"process {', '.join(silent)} was killed; the system does so where memory runs out"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
