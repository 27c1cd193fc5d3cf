"""The settings that runs record in their checkpoints: as a table, and where runs differ."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_model.weights.run_settings import RUN_CONFIG, read_run_settings
from wan_train.checkpoint.folder import saved_steps, step_folder

# A run of wan-train has some five hundred.
_MOST_KEYS = 5000
_LONGEST_VALUE = 2000
# Settings that name a place or a moment, and not how a run trains: different in any two runs.
_OF_THE_PLACE = {
    "checkpoint.save",
    "checkpoint.load",
    "checkpoint.ckpt_step",
    "checkpoint.exit_on_missing_checkpoint",
    "dataset.dataloader_save",
}


def newest_settings(folder: Path) -> tuple[dict[str, Any], str]:
    """The settings in the newest checkpoint that has them, by dotted key.

    Args:
        folder: the run's checkpoint folder.

    Returns:
        None of them if no checkpoint has any; and why not, or the folder that has them.
    """
    reason = "no checkpoint has been saved yet"
    for step in reversed(saved_steps(folder)):
        checkpoint = step_folder(folder, step)
        if not (checkpoint / RUN_CONFIG).exists():  # it is being written
            continue
        try:
            return flatten(read_run_settings(checkpoint)), checkpoint.name
        except ValueError as error:
            reason = str(error)
            break
    return {}, reason


def flatten(settings: Mapping[Any, Any]) -> dict[str, Any]:
    """Nested sections as dotted keys, sorted; lists stay values."""
    found: dict[str, Any] = {}

    def add(prefix: str, values: Mapping[Any, Any]) -> None:
        for key, value in values.items():
            if len(found) >= _MOST_KEYS:
                return
            if key == "_target_":  # the class of a section
                continue
            if isinstance(value, Mapping) and value:
                add(f"{prefix}{key}.", value)
            else:
                found[f"{prefix}{key}"] = value

    add("", settings)
    return dict(sorted(found.items()))


def shown(value: Any) -> str:
    """A value as the page has it: as YAML and JSON write it."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except TypeError:  # YAML has keys that JSON has not
        text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + " ..."


def rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each setting of any run: its key, each run's value (None where it has none), and if they differ."""
    keys = sorted({key for run in runs for key in run})
    table = []
    for key in keys:
        values = [shown(run[key]) if key in run else None for run in runs]
        # Runs without any settings have nothing to compare.
        compared = {value for run, value in zip(runs, values, strict=True) if run}
        table.append({"key": key, "values": values, "differs": len(compared) > 1 and key not in _OF_THE_PLACE})
    return table
