"""Training processes without the nine seconds that each needs to import the engine: forked from one that has it.

One server for all xdist workers of a session imports Megatron once; it ends when the last of them has left. What runs
behind ``wan_train.launch.worker`` is unchanged and in processes of its own. The launcher is left out; it is tested with
the real command line in launch/ and in test_command.py.
"""

import contextlib
import dataclasses
import fcntl
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_model.testing.devices import check_fork

# Far above what a tiny run takes on a busy machine: a run that hangs fails the test instead of the session.
TIMEOUT_SECONDS = 600.0
_START_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Call:
    """A function that every rank calls before it trains: ``module:name`` with JSON values."""

    function: str
    arguments: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Ended:
    """How the ranks ended.

    Attributes:
        codes: exit statuses by rank, negative for a signal.
        output: what each rank wrote on stdout.
        errors: what all of them wrote on stderr.
    """

    codes: list[int]
    output: list[str]
    errors: str


class Ranks:
    """Processes that run."""

    def __init__(self, connection: socket.socket, folder: Path, pids: list[int]) -> None:
        self._connection, self._folder, self.pids = connection, folder, pids

    def running(self) -> bool:
        """Whether none of them has failed, nor all of them ended."""
        return not select.select([self._connection], [], [], 0)[0]

    def wait(self) -> Ended:
        """Until the last has ended; the first that fails ends the others."""
        codes: list[int] = json.loads(_read_line(self._connection))
        self._connection.close()
        texts = {
            kind: [(self._folder / f"{rank}.{kind}").read_text() for rank in range(len(codes))]
            for kind in ("out", "err")
        }
        return Ended(codes, texts["out"], "".join(texts["err"]))


class WarmRanks:
    """A client of the server that ranks are forked from.

    Args:
        folder: common to all clients of a session; the first of them starts the server.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, 0
        link = folder / "warm-ranks"
        with (folder / "warm-ranks.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            connection = _connect(link)
            if connection is None:  # none yet, or its clients have all left
                link.unlink(missing_ok=True)
                # A socket's path may have some hundred characters, which a test's folder can exceed.
                link.symlink_to(tempfile.mkdtemp(prefix="wan-ranks-"))
                connection = _start_server(link)
            self._link, self._connection = link, connection

    def close(self) -> None:
        """Leave the server, which ends when all clients have."""
        self._connection.close()

    def start(
        self,
        argument: str | None,
        ranks: int = 1,
        *,
        calls: Sequence[Call] = (),
        environment: Mapping[str, str] | None = None,
        timeout: float = TIMEOUT_SECONDS,
    ) -> Ranks:
        """``wan_train.launch.worker`` with that argument as that many processes; nothing but the calls with None."""
        self._runs += 1
        folder = self._folder / f"ranks-{os.getpid()}-{self._runs}"
        folder.mkdir()
        order = {
            "argument": argument, "ranks": ranks, "folder": str(folder), "timeout": timeout,
            "environment": {**_own_variables(), **(environment or {})},
            "calls": [dataclasses.asdict(call) for call in calls],
        }  # fmt: skip
        connection = _connect(self._link)
        assert connection is not None, "the server that ranks are forked from has ended"
        connection.sendall(json.dumps(order).encode() + b"\n")
        return Ranks(connection, folder, json.loads(_read_line(connection)))


def _own_variables() -> dict[str, str]:
    """What a test has set, and its name for the table of costs."""
    return {name: os.environ[name] for name in ("PYTEST_CURRENT_TEST",) if name in os.environ}


def _address(link: Path) -> str:
    return f"{os.path.realpath(link)}/socket"


def _connect(link: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(_address(link))
    except OSError:
        connection.close()
        return None
    return connection


def _start_server(link: Path) -> socket.socket:
    errors = link.with_suffix(".err")
    with errors.open("w") as file:
        server = subprocess.Popen(
            [sys.executable, __file__, _address(link)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + _START_SECONDS
    while (connection := _connect(link)) is None:
        assert server.poll() is None, errors.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.returncode = 0  # it outlives this client if others need it
    return connection


def _read_line(connection: socket.socket) -> bytes:
    content = b""
    while not content.endswith(b"\n"):
        part = connection.recv(1)  # a second line may have come already, from ranks that ended at once
        assert part, "the server that ranks are forked from has ended"
        content += part
    return content


def _call(function: str, arguments: Sequence[Any]) -> None:
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)


def _run_rank(order: dict[str, Any], rank: int, port: int) -> int:
    os.setsid()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["ranks"]), LOCAL_WORLD_SIZE=str(order["ranks"]),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **order["environment"],
    )  # fmt: skip
    places = {0: os.devnull, 1: f"{order['folder']}/{rank}.out", 2: f"{order['folder']}/{rank}.err"}
    for descriptor, path in places.items():
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
    for call in order["calls"]:
        _call(**call)
    if order["argument"] is None:
        return 0
    from wan_train.launch import worker

    sys.argv = ["worker", str(order["argument"])]
    return worker.main()


def _fork(order: dict[str, Any], rank: int, port: int, client: socket.socket) -> int:
    check_fork()
    pid = os.fork()
    if pid:
        return pid
    client.close()
    code = 1
    try:
        code = _run_rank(order, rank, port)
    except BaseException:
        traceback.print_exc()
    finally:
        from multiprocessing.util import _exit_function

        _exit_function()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _supervise(order: dict[str, Any], client: socket.socket) -> None:
    """Run the ranks of one order and send their exit statuses; end them when the client has gone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = [_fork(order, rank, port, client) for rank in range(order["ranks"])]
    client.sendall(json.dumps(pids).encode() + b"\n")
    running = {os.pidfd_open(pid): pid for pid in pids}
    codes: dict[int, int] = {}
    deadline = time.monotonic() + order["timeout"]
    while running and not any(codes.values()):
        ready, _, _ = select.select([client, *running], [], [], max(0.0, deadline - time.monotonic()))
        if not ready or client in ready:
            break
        for descriptor in ready:
            pid = running.pop(descriptor)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for pid in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        client.sendall(json.dumps([codes[pid] for pid in pids]).encode() + b"\n")
    _note_cost(order)


def _note_cost(order: dict[str, Any]) -> None:
    """A line a run with its processor seconds, where WAN_RANKS_TABLE names a file."""
    if table := os.environ.get("WAN_RANKS_TABLE"):
        used = os.times()
        line = {"test": order["environment"].get("PYTEST_CURRENT_TEST"), "ranks": order["ranks"]}
        with open(table, "a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "seconds": round(used.children_user + used.children_system, 2)}) + "\n")


def _import_engine() -> None:
    import torch
    import yaml

    from wan_train import engine

    if torch.cuda.is_available():
        # The engine would take the device, and ranks that are forked behind that could not.
        raise RuntimeError(
            "ranks are forked from one process with the engine, which must not use CUDA: run these tests without "
            "-m gpu, which hides the GPU, and tests that need it in processes of their own"
        )

    # It writes the same, and the one in Python takes a third of the time of a save.
    yaml.SafeDumper = yaml.CSafeDumper  # type: ignore[misc]

    engine.start()
    import megatron.bridge.training.pretrain  # noqa: F401

    for name in (
        "checkpoint.hooks",
        "data.dataset",
        "loop.callback",
        "loop.validation",
        "sampling.sampler",
        "config.recipes",
    ):
        importlib.import_module(f"wan_train.{name}")
    # What was imported is garbage in no rank: each of its collections would go through all of it.
    gc.collect()
    gc.freeze()


def _serve(path: str) -> None:
    _import_engine()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors are waited for by nobody
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        clients: list[socket.socket] = [listener.accept()[0]]
        while clients:
            ready, _, _ = select.select([listener, *clients], [], [])
            for one in ready:
                if one is listener:
                    clients.append(listener.accept()[0])
                    continue
                order = one.makefile("rb").readline()
                if order and os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    listener.close()
                    for other in clients:
                        if other is not one:
                            other.close()
                    try:
                        _supervise(json.loads(order), one)
                    except BaseException:
                        os._exit(1)
                    os._exit(0)
                clients.remove(one)
                one.close()
    shutil.rmtree(Path(path).parent)


if __name__ == "__main__":
    _serve(sys.argv[1])
