"""The log of a training run, for the tools and the tests of several packages. Imports nothing of the packages."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.failure import ToolFailure, require

LOG_NAME = "log.jsonl"


def read_log(checkpoints: Path) -> list[dict[str, Any]]:
    """The entries of a run's log, in its folder of checkpoints: one per step, and an event for each resume.

    Raises:
        ToolFailure: a line is no JSON object, such as the last one of a run that was killed.
    """
    path = checkpoints / LOG_NAME
    return [_entry(line, f"line {number} of {path}") for number, line in enumerate(path.read_bytes().splitlines(), 1)]


def _entry(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:  # no JSON, or no text
        entry = None
    if not isinstance(entry, dict):
        raise ToolFailure(f"{where} is {line[:60]!r}; expected a JSON object; remove it, or train again")
    return entry


def read_steps(checkpoints: Path) -> list[dict[str, Any]]:
    """Those of steps."""
    return [entry for entry in read_log(checkpoints) if "event" not in entry]


def counted(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries that count: those of steps that a later start trained again are left out."""
    kept: list[dict[str, Any]] = []
    last = 0
    for entry in entries:
        if "event" not in entry:
            if entry["step"] <= last:
                kept = [one for one in kept if one.get("step", 0) < entry["step"]]
            last = entry["step"]
        kept.append(dict(entry))
    return kept


def seconds_until(entries: Sequence[Mapping[str, Any]], step: int) -> float:
    """How long the counted steps up to ``step`` took, without validations and saves."""
    return sum(entry["seconds"] for entry in entries if "event" not in entry and entry["step"] <= step)


def validation_at(entries: Sequence[Mapping[str, Any]], step: int) -> dict[str, Any]:
    """The last validation after ``step``.

    Raises:
        ToolFailure: there is none.
    """
    found = [entry for entry in entries if entry.get("event") == "validation" and entry["step"] == step]
    require(bool(found), f"the run's log has no validation of step {step}; set validation.interval to reach it")
    return dict(found[-1])
