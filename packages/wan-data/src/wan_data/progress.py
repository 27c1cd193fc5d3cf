"""Progress reports: a progress bar on a terminal, one line per step in a log."""

import contextlib
from collections.abc import Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wan_data.prepare.report import Report


class LogReport:
    """Writes one line per step to standard error."""

    def __init__(self) -> None:
        self._name, self._total, self._done = "", 0, 0

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` steps."""
        self._name, self._total, self._done = name, total, 0

    def step(self, line: str) -> None:
        """Complete one step."""
        self._done += 1
        click.echo(f"{self._name} {self._done}/{self._total}: {line}", err=True)

    def log(self, line: str) -> None:
        """Show a message to the user."""
        click.echo(line, err=True)


class SilentReport:
    """Reports nothing, because another rank of the same preparation reports."""

    def __enter__(self) -> "SilentReport":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """There is nothing to close."""

    def stage(self, name: str, total: int) -> None:
        """Ignored."""

    def step(self, line: str) -> None:
        """Ignored."""

    def log(self, line: str) -> None:
        """Ignored."""


class TerminalReport:
    """Shows one progress bar per stage; rejections and messages are printed above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` steps."""
        self._progress.update(self._task, completed=total)
        self._task = self._progress.add_task(name, total=total)

    def step(self, line: str) -> None:
        """Complete one step."""
        if line.startswith("REJECTED"):
            self.log(line)
        self._progress.advance(self._task)

    def log(self, line: str) -> None:
        """Show a message to the user."""
        self._progress.console.print(line, markup=False, highlight=False)


@contextlib.contextmanager
def make_report() -> Iterator[Report]:
    """A report for standard error: a progress bar if it is a terminal, otherwise lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield LogReport()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield TerminalReport(progress)
