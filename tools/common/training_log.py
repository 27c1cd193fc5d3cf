"""The log of a training run, for the tools and the tests of several packages. Imports nothing of the packages."""

import json
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"


def read_log(checkpoints: Path) -> list[dict[str, Any]]:
    """The entries of a run's log, in its folder of checkpoints: one per step, and an event for each resume."""
    return [json.loads(line) for line in (checkpoints / LOG_NAME).read_text(encoding="utf-8").splitlines()]


def read_steps(checkpoints: Path) -> list[dict[str, Any]]:
    """Those of steps."""
    return [entry for entry in read_log(checkpoints) if "event" not in entry]
