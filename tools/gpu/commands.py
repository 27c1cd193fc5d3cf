"""Commands of this repository as a user starts them, in processes of their own."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu.rows import Failed, one_line

# What ``wan-train``, ``wan-data`` and ``wan-infer`` run once they are installed.
WAN_TRAIN = [sys.executable, "-c", "from wan_train.cli import main; main()"]
WAN_DATA = [sys.executable, "-c", "from wan_data.cli import main; main()"]
WAN_INFER = [sys.executable, "-m", "wan_infer"]
_REASON_LINES = 6


@dataclasses.dataclass
class Started:
    """A command that runs.

    Attributes:
        process: its first process.
        log: the file of its output.
        began: by ``time.monotonic``.
    """

    process: "subprocess.Popen[bytes]"
    log: Path
    began: float

    def wait(self, seconds: float) -> float:
        """Wait for its success.

        Args:
            seconds: from now on; the runner of the stages kills what is left behind.

        Returns:
            Seconds that it took.

        Raises:
            Failed: it failed, or takes longer; the message has its last lines.
        """
        try:
            code = self.process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.process.terminate()
            raise Failed(f"it did not end within {seconds:.0f} s: {self.last_lines()}") from None
        if code:
            raise Failed(f"it ended with status {code}: {self.last_lines()}")
        return time.monotonic() - self.began

    def last_lines(self) -> str:
        """Of its output, on one line."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return one_line(" / ".join(line.strip() for line in lines[-_REASON_LINES:])) or "it printed nothing"


def start(command: Sequence[str], log: Path, output: Path | None = None) -> Started:
    """Start a command.

    Args:
        command: with its arguments.
        log: file of its output.
        output: file of its standard output, if that is to be separate.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors, (output or Path(os.devnull)).open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out if output else errors, stderr=errors, cwd=log.parent
        )
    return Started(process, log, time.monotonic())
