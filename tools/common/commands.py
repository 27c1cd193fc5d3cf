"""Running the programs of this environment, each command line printed before it runs."""

import contextlib
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.failure import ToolFailure

_running: list[subprocess.Popen[bytes]] = []


def running_commands() -> list[subprocess.Popen[bytes]]:
    """The processes that ``run_command`` has started and not seen the end of, those of other threads too."""
    return list(_running)


def _path_of(program: str) -> Path:
    return Path(sys.executable) if program == "python" else Path(sysconfig.get_path("scripts")) / program


def require_programs(*programs: str) -> None:
    """End the tool if programs of this environment are not installed.

    Raises:
        ToolFailure: the sentence names all that are missing.
    """
    missing = [program for program in programs if not os.access(_path_of(program), os.X_OK)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ToolFailure(
            f"{', '.join(missing)} {verb} not installed beside {sys.executable}; install the four packages there"
        )


def run_command(
    *arguments: str,
    folder: Path,
    output: Path | None = None,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
    kept_open: Sequence[int] = (),
) -> None:
    """Run a program of this environment.

    Args:
        arguments: the program and its arguments.
        folder: working folder of the command.
        output: a file for its standard output, which goes to the terminal otherwise.
        errors: the same for its standard error; it may be the same file, and is then added to.
        environment: variables beside those of this process.
        kept_open: descriptors that the program inherits, such as of a locked file: it holds the lock until it ends too.

    Raises:
        ToolFailure: it is not installed, or ended with a non-zero status.
    """
    line = shlex.join(arguments)
    print(f"$ {line}" + (f" > {os.path.relpath(output, folder)}" if output else ""), flush=True)
    program, *rest = arguments
    require_programs(program)
    with contextlib.ExitStack() as files:
        stdout = files.enter_context(open(output, "wb")) if output else None
        stderr = stdout if errors and errors == output else files.enter_context(open(errors, "ab")) if errors else None
        process = subprocess.Popen(
            [_path_of(program), *rest], cwd=folder, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            env={**os.environ, **(environment or {})}, pass_fds=kept_open,
        )  # fmt: skip
        _running.append(process)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.kill()
            raise
        # One that another exception leaves behind stays in the list, for ``common.ending``.
        _running.remove(process)
    if status:
        where = f"in {os.path.relpath(errors, folder)}" if errors else "above"
        raise ToolFailure(f"`{line}` ended with status {status}; see its output {where}")
