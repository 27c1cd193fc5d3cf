"""Support for tests of processes: commands all of whose processes can be found, and launches that start at once.

A launch imports torch, which takes seconds. ``LaunchServer`` is a process that has done so and forks one launcher after
another; everything from ``wan_model.system.launcher.launch`` on is as in a command.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_model.system.process_tree import environment_of, processes_with
from wan_model.testing.devices import check_fork

# Inherited by every process of a job, independent of its parents and process groups.
_MARK = "WAN_TEST_JOB"
PATIENCE = 120.0


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition; the assertion error names ``what`` was expected."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds:.0f} s it is still not true that {what}"
        time.sleep(0.02)


def write_forbidden_modules(folder: Path, *names: str) -> None:
    """Write modules that end the process which imports them, such as from its working folder."""
    for name in names:
        (folder / f"{name}.py").write_text("raise SystemExit('a module of the working folder was imported')")


@contextlib.contextmanager
def default_signals(*numbers: int) -> Iterator[None]:
    """In this context signals that are ignored have their default action, also in what is started.

    What a shell starts in the background ignores SIGINT, and under nohup SIGHUP.
    """
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


class _Launcher:
    """A child of the server, with the methods of ``subprocess.Popen``."""

    def __init__(self, ask: Callable[..., Any], pid: int) -> None:
        self._ask, self.pid = ask, pid
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._ask(poll=self.pid)
        return self._code

    def wait(self, timeout: float) -> int:
        wait_until(lambda: self.poll() is not None, "the launcher has ended", timeout)
        assert self._code is not None
        return self._code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Job:
    """A started command.

    Args:
        process: its first process, with ``variables`` in its environment and its output in ``stdout`` and ``stderr``.
        place: folder of the output; processes may write files there that are named by their rank.
        mark: value of the environment variable that identifies its processes.
    """

    def __init__(self, process: subprocess.Popen[bytes] | _Launcher, place: Path, mark: str) -> None:
        self.process, self.place, self._mark = process, place, mark
        self.errors = place / "stderr"

    @classmethod
    def start(cls, command: Sequence[str], place: Path, cwd: Path | None = None, **variables: str) -> "Job":
        """Start a command; ``place`` is an empty folder."""
        mark = uuid.uuid4().hex
        # Files, not pipes: a process that keeps running must not block the test.
        with (place / "stdout").open("wb") as out, (place / "stderr").open("wb") as errors:
            process = subprocess.Popen(
                command, stdout=out, stderr=errors, cwd=cwd, env={**os.environ, **variables, _MARK: mark}
            )
        return cls(process, place, mark)

    def pid(self, rank: int) -> int:
        """The process id that a rank has written to its file."""
        path = self.place / str(rank)
        wait_until(lambda: path.exists() or self.process.poll() is not None, f"rank {rank} is ready")
        assert path.exists(), self.errors.read_text()
        return int(path.read_text())

    def code(self, seconds: float = PATIENCE) -> int:
        """Wait for its end and return the exit status."""
        return self.process.wait(seconds)

    def alive(self) -> list[int]:
        """The process ids of all of its processes that have not ended."""
        found = [] if self.process.poll() is not None else [self.process.pid]
        return [*found, *(pid for pid in processes_with(_MARK, self._mark) if pid not in found)]

    def ranks(self) -> list[int]:
        """The process ids of the ranks that the launcher has started, in order."""
        ranks = {}
        for pid in self.alive():
            rank = environment_of(pid).get("RANK")
            # What a rank starts has its number too, and is no leader of a process group.
            with contextlib.suppress(ProcessLookupError):
                if rank is not None and os.getpgid(pid) == pid:
                    ranks[int(rank)] = pid
        return [ranks[rank] for rank in sorted(ranks)]

    def error_lines(self) -> list[str]:
        """The lines on standard error."""
        return self.errors.read_text().splitlines()

    def end(self) -> None:
        """Kill all of its remaining processes."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


class LaunchServer:
    """Starts launchers; end it with ``close``."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def start(
        self,
        module: str,
        place: Path,
        arguments: Sequence[str] = (),
        ranks: int = 2,
        cwd: Path | None = None,
        settings: Mapping[str, float] | None = None,
        first_rank_output: bool = False,
        ignored: Sequence[int] = (),
        **variables: str,
    ) -> Job:
        """``wan_model.system.launcher.launch`` in a process of its own.

        Args:
            module, arguments, ranks, first_rank_output: of the launch.
            place: an empty folder; the ranks may import modules from it.
            cwd: the working folder.
            settings: names and values of the launcher's module to replace.
            ignored: signals that the process ignores when it starts.
            variables: of the environment, besides ``os.environ`` as it is now.
        """
        path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
        launch = {
            "module": module,
            "arguments": list(arguments),
            "ranks": ranks,
            "first": first_rank_output,
            "settings": dict(settings or {}),
            "ignored": list(ignored),
        }
        return self._start(place, cwd or place, {"PYTHONPATH": path, **variables}, launch=launch)

    def start_torchrun(self, arguments: Sequence[str], place: Path) -> Job:
        """``torchrun ARGUMENTS`` in a process of its own; ``place`` is an empty folder."""
        return self._start(place, place, {"PYTHONWARNINGS": "ignore"}, torchrun=list(arguments))

    def _start(self, place: Path, cwd: Path, variables: Mapping[str, str], **order: Any) -> Job:
        mark = uuid.uuid4().hex
        for name in ("stdout", "stderr"):  # a job's output can be read from its start on
            (place / name).touch()
        order |= {"place": str(place), "cwd": str(cwd), "environment": {**os.environ, **variables, _MARK: mark}}
        return Job(_Launcher(self._ask, self._ask(start=order)), place, mark)

    def _ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End it."""
        with self._server:
            self._server.kill()


def _run(order: dict[str, Any]) -> int:
    for descriptor, name in ((0, os.devnull), (1, f"{order['place']}/stdout"), (2, f"{order['place']}/stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), descriptor)
    for number in (signal.SIGINT, signal.SIGHUP):  # a shell's background processes ignore them
        signal.signal(number, signal.SIG_DFL)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    tempfile.tempdir = None  # found by the variables, once
    if "torchrun" in order:
        from torch.distributed.run import main

        main(order["torchrun"])
        return 0
    from wan_model.system import launcher

    launch = order["launch"]
    for name, value in launch["settings"].items():
        setattr(launcher, name, value)
    for number in launch["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    outcome = launcher.launch(launch["module"], launch["arguments"], launch["ranks"], first_rank_output=launch["first"])
    return outcome.code


def _fork(order: dict[str, Any]) -> int:
    check_fork()
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = _run(order)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _serve() -> None:
    import torch.distributed.run  # noqa: F401  # and with it what a launch imports

    for line in sys.stdin:
        request = json.loads(line)
        answer = _fork(request["start"]) if "start" in request else _poll(request["poll"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
