"""Running the programs of this environment, each command line printed before it runs."""

import contextlib
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from common.failure import ToolFailure


def run_command(
    *arguments: str,
    folder: Path,
    output: Path | None = None,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a program of this environment.

    Args:
        arguments: the program and its arguments.
        folder: working folder of the command.
        output: a file for its standard output, which goes to the terminal otherwise.
        errors: the same for its standard error; it may be the same file, and is then added to.
        environment: variables beside those of this process.

    Raises:
        ToolFailure: it is not installed, or ended with a non-zero status.
    """
    line = shlex.join(arguments)
    print(f"$ {line}" + (f" > {os.path.relpath(output, folder)}" if output else ""), flush=True)
    program, *rest = arguments
    path = sys.executable if program == "python" else str(Path(sysconfig.get_path("scripts")) / program)
    if not os.access(path, os.X_OK):
        raise ToolFailure(f"{program} is not installed beside {sys.executable}; install the four packages there")
    with contextlib.ExitStack() as files:
        stdout = files.enter_context(open(output, "wb")) if output else None
        stderr = stdout if errors and errors == output else files.enter_context(open(errors, "ab")) if errors else None
        status = subprocess.run(
            [path, *rest], cwd=folder, check=False, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            env={**os.environ, **(environment or {})},
        ).returncode  # fmt: skip
    if status:
        where = f"in {os.path.relpath(errors, folder)}" if errors else "above"
        raise ToolFailure(f"`{line}` ended with status {status}; see its output {where}")
