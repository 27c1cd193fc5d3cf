"""Where a run saves and what it resumes from; no Megatron needed."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

TRACKER = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """A saved step."""

    folder: Path
    step: int

    @property
    def step_folder(self) -> Path:
        """Where its files lie."""
        return self.folder / f"iter_{self.step:07d}"


def find_resume_point(folder: Path, step: int | None = None) -> ResumePoint | None:
    """The step that a run would resume from.

    Args:
        folder: the checkpoint folder.
        step: a certain step; the one that the tracker names by default.

    Returns:
        None where nothing has been saved yet.

    Raises:
        ValueError: a tracker that cannot be read, or a step that is not there.
    """
    tracker = folder / TRACKER
    if step is None:
        if not tracker.is_file():
            return None
        text = tracker.read_text(encoding="utf-8").strip()
        if not text.isdigit():
            raise ValueError(f"{tracker} says {text!r}; expected the number of the newest saved step")
        step = int(text)
    point = ResumePoint(folder, step)
    if not point.step_folder.is_dir():
        saved = sorted(int(path.name[5:]) for path in folder.glob("iter_*") if path.name[5:].isdigit())
        raise ValueError(f"{folder} has no checkpoint of step {step}; the steps there are {saved}")
    return point


def read_loader_state(point: ResumePoint, rank: int) -> dict[str, Any]:
    """The data loader's state of one data-parallel rank.

    Raises:
        ValueError: it is not in the checkpoint, or is not plain values.
    """
    path = point.step_folder / f"train_dataloader_dprank{rank:03d}.pt"
    try:
        saved = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: the checkpoint holds no loader state for data-parallel rank {rank}; "
            "resume with the data-parallel size that it was saved with"
        ) from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    state: dict[str, Any] = saved["dataloader_state_dict"]
    return state
