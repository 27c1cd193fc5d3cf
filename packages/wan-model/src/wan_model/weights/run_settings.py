"""The settings that a training run records in each of its checkpoints. Imports no torch."""

from pathlib import Path
from typing import Any

from wan_model.system.safe_reading import read_yaml

RUN_CONFIG = "run_config.yaml"


def read_run_settings(path: Path) -> dict[str, Any]:
    """Read all settings of the run that wrote a checkpoint, as plain values by section.

    Raises:
        ValueError: the file is missing, is no plain YAML, or has no sections.
    """
    file = path / RUN_CONFIG
    try:
        content = read_yaml(file)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the checkpoint is partial, or of another program") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} has no sections: it was cut, or is of another program")
    return content
