"""The stages of the quickstart: each prints a headline, the output of its commands, and its duration."""

import contextlib
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from quickstart.failure import QuickstartError


class Stages:
    """Runs stages one after another and records their durations.

    Args:
        count: number of stages, for the headlines.
        folder: working folder of the commands, so that their paths are short.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Print a headline and measure the duration of the block."""
        print(f"\n[{len(self.seconds) + 1}/{self.count}] {name}: {what}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"      {self.seconds[name]} s", flush=True)

    def command(self, *arguments: str, output: Path | None = None) -> None:
        """Run a program of this environment.

        Args:
            arguments: the program and its arguments.
            output: a file for its standard output, which goes to the terminal otherwise.

        Raises:
            QuickstartError: it ended with a non-zero status.
        """
        line = shlex.join(arguments)
        print(f"$ {line}" + (f" > {os.path.relpath(output, self.folder)}" if output else ""), flush=True)
        program, *rest = arguments
        path = sys.executable if program == "python" else str(Path(sysconfig.get_path("scripts")) / program)
        if not os.access(path, os.X_OK):
            raise QuickstartError(
                f"{program} is not installed beside {sys.executable}; install the four packages there"
            )
        with open(output, "wb") if output else contextlib.nullcontext() as file:
            status = subprocess.run(
                [path, *rest], cwd=self.folder, check=False, stdin=subprocess.DEVNULL, stdout=file
            ).returncode
        if status:
            raise QuickstartError(f"`{line}` ended with status {status}; see its output above")
