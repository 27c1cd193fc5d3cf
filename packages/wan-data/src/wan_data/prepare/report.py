"""What a preparation tells the user while it runs."""

import collections
from collections.abc import Sequence
from typing import Protocol

from wan_data.index.records import LEFT_OUT
from wan_data.prepare.planned_source import ProbeResult, RejectedSource
from wan_data.video.windows import Window


class Report(Protocol):
    """Receives the progress of a preparation."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of ``total`` steps."""

    def step(self, line: str) -> None:
        """Complete one step."""

    def log(self, line: str) -> None:
        """Show a message to the user."""


def describe_windows(windows: Sequence[Window]) -> str:
    """The lengths of windows in words, such as ``3 of 81, 1 of 17 frames``."""
    lengths = collections.Counter(window.length for window in windows)
    return ", ".join(f"{count} of {length}" for length, count in sorted(lengths.items(), reverse=True)) + " frames"


def describe(result: ProbeResult) -> str:
    """A probe result in a line."""
    if isinstance(result, RejectedSource):
        return f"{'left out' if result.verdict in LEFT_OUT else 'REJECTED'} {result.name}: {result.reason}"
    return (
        f"{result.name}: {result.info.frames} frames at the target rate, {describe_windows(result.windows)} "
        f"in {result.size}"
    )
