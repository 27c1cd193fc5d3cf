"""A run's ``log.jsonl`` as curves: read while it is being written, whatever stands in it.

After a resume the steps since the checkpoint are logged again, and the later entries hold. So a value at a step
replaces what its curve has from that step on, and a resume at a step removes what the curves have after it.
"""

import bisect
import math
import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_model.system.safe_reading import complete_lines, open_file, parse_json
from wan_train.checkpoint.folder import LOG_NAME

_LONGEST_LINE = 1 << 20
# A run of wan-train has some twenty; a log of another program could have any number.
_MOST_CURVES = 200
_LARGEST_STEP = 1 << 53  # of JavaScript's exact integers
_MOST_EVENTS = 10_000
# Sums and multiples of what is shown stay finite; a norm in fp32 is below 4e38.
_LARGEST_NUMBER = 1e100


@dataclass
class Curve:
    """Values of one key by ascending step.

    Attributes:
        steps: the steps.
        values: NaN where the log has a number that is not finite, or beyond 1e100.
    """

    steps: array = field(default_factory=lambda: array("q"))
    values: array = field(default_factory=lambda: array("d"))

    def put(self, step: int, value: float) -> int:
        """Set the value at a step, instead of what there is from it on; returns how many values that were."""
        replaced = self.cut(step - 1) if self.steps and self.steps[-1] >= step else 0
        self.steps.append(step)
        self.values.append(value)
        return replaced

    def cut(self, last: int) -> int:
        """Remove the values after a step; returns how many there were."""
        keep = bisect.bisect_right(self.steps, last)
        removed = len(self.steps) - keep
        del self.steps[keep:], self.values[keep:]
        return removed


@dataclass(frozen=True)
class Event:
    """An entry of the log that is neither of steps nor a validation.

    Attributes:
        kind: ``resumed``, ``begun``, or what another version writes.
        step: where it was logged, if the entry says so.
        text: its other values.
    """

    kind: str
    step: int | None
    text: str


def _step_of(entry: Mapping[str, Any]) -> int | None:
    step = entry.get("step")
    return step if type(step) is int and 0 <= step < _LARGEST_STEP else None


def _number(value: Any) -> float | None:
    """As a float, NaN for what is not finite or too large to be added up; None for what is no number."""
    if type(value) not in (int, float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return math.nan
    return found if abs(found) <= _LARGEST_NUMBER else math.nan


class RunLog:
    """The log of a run, which may be in progress.

    Args:
        folder: the run's checkpoint folder.

    Attributes:
        curves: by key, none of them empty. Keys of steps are those of the log; those of events begin with the event's
            name, such as ``validation.loss``, and ``validation.timesteps.500`` for the loss at a timestep.
        events: in the order of the log.
        replaced: entries of steps that were logged again after a resume.
        unreadable: lines that are no entries.
        first_unreadable: number of the first of these, from 1; 0 without any.
        lines: how many have been read.
        incomplete: whether the last line has no end yet.

    Raises:
        ValueError: the folder has no log.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG_NAME
        self._begin()
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; expected what a run has as checkpoint.save")
        if not self.path.exists():
            raise ValueError(f"{folder} has no {LOG_NAME}; expected a folder that a run has as checkpoint.save")
        self.read()

    def _begin(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.events: list[Event] = []
        self.replaced = self.unreadable = self.first_unreadable = self.unknown_keys = 0
        self.lines = self._offset = 0
        self.incomplete = False
        self._file: tuple[int, int] | None = None

    def read(self) -> bool:
        """Read what has been written since the last call; the whole file if it is another one or shorter.

        Returns:
            Whether there was anything.

        Raises:
            ValueError: the file cannot be read.
        """
        try:
            file = open_file(self.path)
        except FileNotFoundError:
            raise ValueError(f"{self.path} does not exist any more") from None
        with file:
            found = os.fstat(file.fileno())
            begun = self._file
            if begun is not None and (begun != (found.st_dev, found.st_ino) or found.st_size < self._offset):
                self._begin()
            self._file = found.st_dev, found.st_ino
            before = self._offset
            file.seek(self._offset)
            for line in complete_lines(file, _LONGEST_LINE):
                self._take(line)
                self._offset = file.tell()
            file.seek(self._offset)
            self.incomplete = bool(file.read(1))
        return self._offset != before or begun is None

    def _take(self, line: bytes | None) -> None:
        self.lines += 1
        try:
            entry = None if line is None else parse_json(line.decode("utf-8"), str(self.path), _LONGEST_LINE)
        except ValueError:  # also of UTF-8
            entry = None
        if not isinstance(entry, dict):
            self._leave_out()
            return
        step, kind = _step_of(entry), entry.get("event")
        if kind is None:
            if step is None:
                self._leave_out()
                return
            # Counted by the loss, which every entry of steps has.
            self.replaced += self._put("loss", step, entry.get("loss"))
            self._put_all("", step, entry)
        else:
            self._take_event(str(kind), step, entry)

    def _leave_out(self) -> None:
        self.unreadable += 1
        self.first_unreadable = self.first_unreadable or self.lines

    def _take_event(self, kind: str, step: int | None, entry: Mapping[str, Any]) -> None:
        if kind == "resumed" and step is not None:
            removed = {key: curve.cut(step) for key, curve in self.curves.items()}
            self.replaced += removed.get("loss", 0)
            self.curves = {key: curve for key, curve in self.curves.items() if curve.steps}
        if step is not None:
            self._put_all(f"{kind}.", step, entry)
        if kind != "validation" and len(self.events) < _MOST_EVENTS:
            rest = (f"{key} {value}" for key, value in entry.items() if key not in ("event", "step"))
            self.events.append(Event(kind, step, ", ".join(rest)))

    def _put_all(self, prefix: str, step: int, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if key in ("event", "step") or prefix + key == "loss":
                continue
            if isinstance(value, dict):
                self._put_all(f"{prefix}{key}.", step, value)
            else:
                self._put(prefix + key, step, value)

    def _put(self, key: str, step: int, value: Any) -> int:
        number = _number(value)
        if number is None:
            return 0
        if key not in self.curves:
            if len(self.curves) >= _MOST_CURVES:
                self.unknown_keys += 1
                return 0
            self.curves[key] = Curve()
        return self.curves[key].put(step, number)

    @property
    def last_step(self) -> int:
        """The last step that was logged, 0 before the first."""
        steps = [curve.steps[-1] for key, curve in self.curves.items() if curve.steps and "." not in key]
        return max(steps, default=0)
