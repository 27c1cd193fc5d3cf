"""The stages of the quickstart: each a headline, a command with its output live on the terminal, and its seconds."""

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
    """Runs one stage after another and remembers how long each took.

    Args:
        count: how many there will be, for the headlines.
        folder: where the commands run, so that the paths on their command lines are short.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Announce a stage and time what happens inside it."""
        print(f"\n[{len(self.seconds) + 1}/{self.count}] {name}: {what}", flush=True)
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        print(f"      {self.seconds[name]} s", flush=True)

    def command(self, *arguments: str) -> None:
        """Run a program of this environment as a user would type it; its output goes straight to the terminal.

        Raises:
            QuickstartError: it ended with a non-zero status.
        """
        print(f"$ {shlex.join(arguments)}", flush=True)
        program, *rest = arguments
        path = sys.executable if program == "python" else str(Path(sysconfig.get_path("scripts")) / program)
        if not os.access(path, os.X_OK):
            raise QuickstartError(
                f"{program} is not installed beside {sys.executable}; install the four packages there"
            )
        status = subprocess.run([path, *rest], cwd=self.folder, check=False, stdin=subprocess.DEVNULL).returncode
        if status:
            raise QuickstartError(f"`{shlex.join(arguments)}` ended with status {status}; its last lines above say why")
