"""Where a run saves, what it resumes from, what it keeps; no Megatron needed.

A checkpoint is complete when its ``complete.json`` is there, which is written last, and every file has the size that
it says. Nothing else counts: Megatron's own tracker files can point to a checkpoint that a crash has cut.
"""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from wan_model.system.files import sync_folder
from wan_train.checkpoint.record import (
    RECORD_NAME,
    DamagedCheckpointError,
    FileRecord,
    PartialCheckpointError,
    read_record,
)

_FOLDER = re.compile(r"iter_(\d{7,})")


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint.

    Attributes:
        folder: the run's checkpoint folder.
        step: steps done.
        files: what it consists of.
    """

    folder: Path
    step: int
    files: dict[str, FileRecord]

    @property
    def step_folder(self) -> Path:
        """Where its files lie."""
        return step_folder(self.folder, self.step)


def step_folder(folder: Path, step: int) -> Path:
    """Where the files of a step lie, complete or not."""
    return folder / f"iter_{step:07d}"


def saved_steps(folder: Path) -> list[int]:
    """Steps of which there is a folder, complete or not, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _FOLDER.fullmatch(path.name)))


def _read(folder: Path, step: int) -> ResumePoint:
    return ResumePoint(folder, step, read_record(step_folder(folder, step), step))


def complete_steps(folder: Path) -> list[int]:
    """Steps whose checkpoints are complete, ascending."""
    complete = []
    for step in saved_steps(folder):
        try:
            _read(folder, step)
        except ValueError:
            continue
        complete.append(step)
    return complete


def find_resume_point(folder: Path, step: int | None = None) -> ResumePoint | None:
    """The checkpoint that a run resumes from.

    Args:
        folder: the checkpoint folder.
        step: a certain step; the newest complete one by default.

    Returns:
        None where no step was ever saved completely.

    Raises:
        ValueError: the step asked for is not there, or not complete; or the newest that was complete is damaged.
    """
    if step is not None:
        if step not in (saved := saved_steps(folder)):
            raise ValueError(f"{folder} has no checkpoint of step {step}; the steps there are {saved}")
        return _read(folder, step)
    for newest in reversed(saved_steps(folder)):
        try:
            return _read(folder, newest)
        except PartialCheckpointError:
            continue
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(
                f"{error}; restore it, or delete {step_folder(folder, newest)} to go on from the checkpoint before it"
            ) from error
    return None


def prune(folder: Path, keep: int) -> list[int]:
    """Delete what the newest ``keep`` complete checkpoints make superfluous, partial ones before them included.

    A newer partial one is left alone: it may be being written. One is always kept.

    Returns:
        The steps that are deleted.
    """
    kept = complete_steps(folder)[-max(1, keep) :]
    deleted = []
    for step in saved_steps(folder):
        if not kept or step in kept or step > kept[-1]:
            continue
        discard(folder, step)
        deleted.append(step)
    return deleted


def discard(folder: Path, step: int) -> None:
    """Delete a checkpoint; from the first moment on it counts as incomplete."""
    path = step_folder(folder, step)
    if not path.is_dir():
        return
    (path / RECORD_NAME).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)


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
