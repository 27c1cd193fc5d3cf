"""The report of the check: ``gpu_check.json`` and ``gpu_check.md``, written atomically. Imports no torch."""

import dataclasses
from pathlib import Path
from typing import Any

from common.markdown_table import escaped, markdown_table
from gpu.processes import StageResult
from gpu.rows import Row, Value
from wan_model.system.files import write_bytes, write_json

NAME = "gpu_check"
OUTCOMES = ("passed", "failed", "not run")
# Of the closing table.
_SPEED = ("seconds", "seconds a step", "tokens/s", "TFLOP/s", "MFU %", "peak GB")


@dataclasses.dataclass
class Report:
    """What is known of a check.

    Attributes:
        facts: device, commit, minutes and so on.
        results: of the stages that have begun.
        finished: whether the check has come to its end.
        seconds: since it began, or None for those of its stages.
    """

    facts: dict[str, Value]
    results: list[StageResult] = dataclasses.field(default_factory=list)
    finished: bool = False
    seconds: float | None = None

    def counts(self) -> dict[str, int]:
        """Rows by outcome."""
        return {outcome: sum(result.count(outcome) for result in self.results) for outcome in OUTCOMES}

    def summary(self) -> str:
        """One line."""
        counts = self.counts()
        seconds = sum(result.seconds for result in self.results) if self.seconds is None else self.seconds
        end = "" if self.finished else "; the check has not come to its end"
        return (
            f"{counts['passed']} rows passed, {counts['failed']} failed, {counts['not run']} not run "
            f"in {seconds:.0f} s on {self.facts.get('card') or self.facts.get('device')}{end}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.facts,
            "finished": self.finished,
            "counts": self.counts(),
            "stages": [_stage_json(result) for result in self.results],
        }

    def write(self, folder: Path) -> None:
        """Write both files."""
        write_json(folder / f"{NAME}.json", self.to_json())
        write_bytes(folder / f"{NAME}.md", to_markdown(self).encode())


def _stage_json(result: StageResult) -> dict[str, Any]:
    return {
        "name": result.stage.name,
        "title": result.stage.title,
        "finished": result.finished,
        "seconds": result.seconds,
        "deadline": result.deadline,
        "rows": [row.to_json() for row in result.rows],
        "log": result.log,
    }


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return escaped(str(value))


def _figures(table: list[dict[str, Value]]) -> str:
    columns = list(dict.fromkeys(key for line in table for key in line))
    return markdown_table(columns, [[_cell(line.get(column, "")) for column in columns] for line in table])


def _numbers(row: Row) -> str:
    return "; ".join(f"{name} {_cell(value)}" for name, value in row.numbers.items())


def to_markdown(report: Report) -> str:
    """The report for people: a summary, what failed, every stage, and the speed of whole steps."""
    parts = ["# GPU check", report.summary() + "."]
    parts.append("; ".join(f"{name}: {_cell(value)}" for name, value in report.facts.items() if value is not None))
    overview = [
        [result.stage.title, *(str(result.count(outcome)) for outcome in OUTCOMES), f"{result.seconds:.0f}"]
        for result in report.results
    ]
    parts.append(markdown_table(["stage", *OUTCOMES, "seconds"], overview))
    failed = [(result, row) for result in report.results for row in result.rows if row.outcome == "failed"]
    if failed:
        parts.append("## Failed")
        parts.append("\n".join(f"- {result.stage.title}: **{_cell(row.name)}**: {row.why}" for result, row in failed))
    for result in report.results:
        parts.append(f"## {result.stage.title}")
        lines = [[_cell(row.name), row.outcome, _cell(row.why), _numbers(row)] for row in result.rows]
        parts.append(markdown_table(["row", "outcome", "why", "numbers"], lines) if lines else "No row yet.")
        for row in result.rows:
            if row.table:
                parts += [f"### {_cell(row.name)}", _figures(row.table)]
            if row.traceback:
                parts += [f"### {_cell(row.name)}: traceback", "```text\n" + "\n".join(row.traceback) + "\n```"]
        if result.log:
            parts += [f"### {result.stage.title}: what its processes printed last", _fenced(result.log)]
    if speeds := _speeds(report):
        parts += ["## Speed", _figures(speeds)]
    return "\n\n".join(parts) + "\n"


def _speeds(report: Report) -> list[dict[str, Value]]:
    """What was measured of whole steps, one line each."""
    return [
        {"row": row.name, **{name: row.numbers.get(name, "") for name in _SPEED}}
        for result in report.results
        for row in result.rows
        if row.outcome == "passed" and "tokens/s" in row.numbers
    ]


def _fenced(lines: list[str]) -> str:
    return "```text\n" + "\n".join(lines) + "\n```"
