"""Progress on a terminal, plain lines in a log. Imports no torch."""

import time
from typing import TextIO

from wan_model.system.terminal import Terminal


class Progress:
    """Progress messages, on another stream than the results.

    Args:
        stream: usually standard error; on a terminal one line is rewritten, elsewhere at most ten lines a video are
            written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._terminal = Terminal(stream)
        self._label = ""
        self._start = 0.0

    def line(self, text: str) -> None:
        """Write one line."""
        self._terminal.close()
        self._terminal.print_line(text)

    def start(self, label: str) -> None:
        """Begin a new series of steps."""
        self._label, self._start = label, time.monotonic()

    def step(self, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps are done."""
        per_step = (time.monotonic() - self._start) / done
        text = f"{self._label}  step {done}/{total}  {per_step:.2f} s/step  {per_step * (total - done):.0f} s left"
        if self._terminal.rewrites or done == total or done * 10 // total != (done - 1) * 10 // total:
            self._terminal.update_line(text)
        if done == total:
            self._terminal.close()
