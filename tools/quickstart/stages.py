"""The stages of the quickstart: each prints a headline, the output of its commands, and its duration."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from common.commands import run_command


class Stages:
    """Runs stages one after another and records their durations.

    Args:
        count: number of stages, for the headlines.
        folder: working folder of the commands, so that their paths are short.

    Attributes:
        seconds: of each stage that has ended.
        kept_open: descriptors that the commands inherit.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        self.seconds: dict[str, float] = {}
        self.kept_open: list[int] = []

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
            ToolFailure: it ended with a non-zero status.
        """
        run_command(*arguments, folder=self.folder, output=output, kept_open=self.kept_open)
