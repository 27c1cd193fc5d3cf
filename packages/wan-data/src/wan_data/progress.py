"""Progress of long work: a bar on a terminal, one plain line a step in a log."""

import contextlib
from collections.abc import Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wan_data.prepare.run import Report


class LogReport:
    """Plain lines on standard error."""

    def __init__(self) -> None:
        self._name, self._total, self._done = "", 0, 0

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""
        self._name, self._total, self._done = name, total, 0

    def step(self, line: str) -> None:
        """One step is done."""
        self._done += 1
        click.echo(f"{self._name} {self._done}/{self._total}: {line}", err=True)

    def say(self, line: str) -> None:
        """Something the user should know."""
        click.echo(line, err=True)


class SilentReport:
    """Nothing: another process of the same preparation reports."""

    def __enter__(self) -> "SilentReport":
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to end."""

    def stage(self, name: str, total: int) -> None:
        """Not shown."""

    def step(self, line: str) -> None:
        """Not shown."""

    def say(self, line: str) -> None:
        """Not shown."""


class TerminalReport:
    """A bar a stage; rejections and remarks stay above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("starting", total=None)

    def stage(self, name: str, total: int) -> None:
        """A stage of ``total`` steps begins."""
        self._progress.update(self._task, completed=total)
        self._task = self._progress.add_task(name, total=total)

    def step(self, line: str) -> None:
        """One step is done."""
        if line.startswith("REJECTED"):
            self.say(line)
        self._progress.advance(self._task)

    def say(self, line: str) -> None:
        """Something the user should know."""
        self._progress.console.print(line, markup=False, highlight=False)


@contextlib.contextmanager
def make_report() -> Iterator[Report]:
    """The kind that suits standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield LogReport()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        yield TerminalReport(progress)
