"""Reading a training run's log, and checks of it and of the run's checkpoints."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.failure import ToolFailure, require
from common.training_log import LOG_NAME
from common.training_log import read_log as read_entries


@dataclass(frozen=True)
class TrainingLog:
    """A run's ``log.jsonl``.

    Attributes:
        entries: its lines in order: one per step, and an event for each resume and each validation.
    """

    entries: list[dict[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The entries of steps."""
        return [entry for entry in self.entries if "event" not in entry]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """The entries of validations."""
        return [entry for entry in self.entries if entry.get("event") == "validation"]

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [float(entry["loss"]) for entry in self.steps]

    def resumed_from(self) -> int | None:
        """The step that the run resumed from, which must be the last logged step before; None without a resume.

        Raises:
            ToolFailure: several resumes, or one from another step than the last logged one.
        """
        places = [index for index, entry in enumerate(self.entries) if entry.get("event") == "resumed"]
        if not places:
            return None
        require(len(places) == 1, f"the log has {len(places)} resumes; expected one")
        step = int(self.entries[places[0]]["step"])
        before = [entry["step"] for entry in self.entries[: places[0]] if "event" not in entry]
        require(
            bool(before) and before[-1] == step,
            f"the run resumed from step {step}, but the last step logged before was {before[-1] if before else 'none'}",
        )
        return step

    def packing(self, packs_a_step: int, capacity: int) -> dict[str, float]:
        """The packing efficiency for samples of mixed shapes.

        Args:
            packs_a_step: packs per step, over all data-parallel ranks.
            capacity: tokens of a pack.

        Returns:
            ``efficiency`` (tokens of samples / computed tokens), ``fill`` (tokens of samples / capacity of the packs),
            the two counts of tokens, and ``samples_a_pack``.
        """
        needed = sum(entry["tokens"] for entry in self.steps)
        computed = sum(entry["tokens_padded"] for entry in self.steps)
        samples = sum(entry["samples"] for entry in self.steps)
        return {
            "efficiency": round(needed / computed, 4),
            "tokens": needed,
            "tokens_computed": computed,
            "fill": round(needed / (capacity * packs_a_step * len(self.steps)), 4),
            "samples_a_pack": round(samples / (packs_a_step * len(self.steps)), 2),
        }


def read_log(folder: Path) -> TrainingLog:
    """Read the log of the run that saves its checkpoints in ``folder``.

    Raises:
        ToolFailure: there is none.
    """
    if not (path := folder / LOG_NAME).is_file():
        raise ToolFailure(f"the training run left no log at {path}")
    return TrainingLog(read_entries(folder))


def check_steps(log: TrainingLog, last: int) -> None:
    """Check that the log has every step from 1 to ``last`` once, in order, with finite numbers and samples.

    Raises:
        ToolFailure: a check fails.
    """
    numbers = [entry["step"] for entry in log.steps]
    require(
        numbers == list(range(1, last + 1)), f"the log has the steps {numbers}; expected each from 1 to {last} once"
    )
    for entry in log.steps:
        for name in ("loss", "grad_norm"):
            require(math.isfinite(entry[name]), f"the {name} of step {entry['step']} is {entry[name]}")
        require(
            0 < entry["tokens"] <= entry["tokens_padded"],
            f"step {entry['step']} counts {entry['tokens']} tokens of samples among {entry['tokens_padded']} computed",
        )


def check_learning(log: TrainingLog) -> None:
    """Check that the mean loss of the last quarter of the steps is below that of the first quarter.

    Raises:
        ToolFailure: it is not.
    """
    quarter = len(log.losses) // 4
    first, last = (sum(losses) / quarter for losses in (log.losses[:quarter], log.losses[-quarter:]))
    require(
        last < first, f"the mean loss of the last {quarter} steps is {last:.4f}, not below {first:.4f} of the first"
    )


def check_checkpoint(folder: Path, step: int) -> None:
    """Check that the step's checkpoint exists and is the newest one.

    Raises:
        ToolFailure: it does not exist, or another one is newer.
    """
    place = folder / f"iter_{step:07d}"
    require((place / ".metadata").is_file(), f"no checkpoint of step {step}: {place} holds no .metadata")
    tracker = (folder / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip()
    require(tracker == str(step), f"the newest checkpoint in {folder} is of step {tracker}; expected {step}")
