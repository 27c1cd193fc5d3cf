"""A row of the report: what was checked, how it ended and why, and its numbers. Imports no torch."""

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

Outcome = Literal["passed", "failed", "not run"]
Value = str | int | float | bool | None

# What a machine may lack without a fault of this project.
OPTIONAL = frozenset(
    {
        *("accelerate", "av", "datasets", "diffusers", "ftfy", "megatron", "nvidia_resiliency_ext", "omegaconf"),
        *("pytest", "tokenizers", "transformer_engine", "transformers", "triton"),
    }
)
_TRACEBACK_LINES = 16
_LONGEST_REASON = 400


@dataclasses.dataclass
class Row:
    """A row.

    Attributes:
        name: what was checked.
        outcome: how it ended.
        why: one sentence.
        numbers: what was measured, with units in the names.
        seconds: that it took.
        traceback: the last lines, where an exception was not expected.
        table: further rows of figures, such as the longest kernels.
    """

    name: str
    outcome: Outcome
    why: str
    numbers: dict[str, Value] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    traceback: list[str] = dataclasses.field(default_factory=list)
    table: list[dict[str, Value]] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without empty parts."""
        values = {
            **dataclasses.asdict(self),
            "numbers": {name: _finite(value) for name, value in self.numbers.items()},
            "table": [{name: _finite(value) for name, value in line.items()} for line in self.table],
        }
        return {key: value for key, value in values.items() if value or key in ("name", "outcome", "why")}


def _finite(value: Value) -> Value:
    # JSON has no other numbers.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Found:
    """The result of a check that holds.

    Args:
        why: one sentence that says what was shown.
        numbers, table: see ``Row``.
    """

    def __init__(
        self, why: str, numbers: Mapping[str, Value] | None = None, table: list[dict[str, Value]] | None = None
    ) -> None:
        self.why, self.numbers, self.table = why, dict(numbers or {}), table or []


class Failed(Exception):
    """A check that does not hold.

    Args:
        why, numbers: see ``Found``.
        traceback: the last lines, where it is an exception of what was checked.
    """

    def __init__(
        self, why: str, numbers: Mapping[str, Value] | None = None, traceback: list[str] | None = None
    ) -> None:
        super().__init__(why)
        self.numbers, self.traceback = dict(numbers or {}), traceback or []


class NotRun(Exception):
    """A check that this machine does not allow; the message is the reason."""


class DeviceLostError(Exception):
    """The CUDA context of this process is unusable after an error in a kernel; a new process must go on."""


def one_line(error: BaseException | str) -> str:
    """A message on one line, shortened."""
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 4] + " ..."


def last_lines(error: BaseException) -> list[str]:
    """The end of its traceback."""
    return "".join(traceback.format_exception(error)).rstrip().splitlines()[-_TRACEBACK_LINES:]


def absent_package(error: BaseException | None) -> str | None:
    """The optional package whose absence caused an error, or None."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] in OPTIONAL:
            return error.name
        error = error.__cause__ or error.__context__
    return None


def measured(name: str, measure: Callable[[], Found], *, memory_may_lack: bool = False) -> Row:
    """The row of a check, however it ends.

    Args:
        name: of the row.
        measure: returns what it found, or raises ``Failed``, ``NotRun`` or any other exception.
        memory_may_lack: too little memory is no failure.

    Raises:
        DeviceLostError: from ``measure``.
    """
    start = time.monotonic()
    try:
        found = measure()
        row = Row(name, "passed", found.why, found.numbers, table=found.table)
    except NotRun as reason:
        row = Row(name, "not run", one_line(reason))
    except Failed as failure:
        row = Row(name, "failed", one_line(failure), failure.numbers, traceback=failure.traceback)
    except DeviceLostError:
        raise
    except Exception as error:
        row = _unexpected(name, error, memory_may_lack=memory_may_lack)
    row.seconds = round(time.monotonic() - start, 2)
    return row


def _unexpected(name: str, error: Exception, *, memory_may_lack: bool) -> Row:
    if package := absent_package(error):
        return Row(name, "not run", f"the package {package} is not installed")
    # By name, because torch is not imported here.
    if type(error).__name__ == "OutOfMemoryError" and memory_may_lack:
        return Row(name, "not run", "it needs more memory than the device has")
    return Row(name, "failed", f"{type(error).__name__}: {one_line(error)}", traceback=last_lines(error))
