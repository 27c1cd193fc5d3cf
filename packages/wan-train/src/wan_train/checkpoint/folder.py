"""The checkpoint folder of a run: resume point and retention. Needs no Megatron.

A checkpoint is complete if its ``complete.json`` exists, which is written last, and every file has the size recorded
there. Megatron's tracker files are ignored: after a crash they can point to an incomplete checkpoint.
"""

import dataclasses
import re
import shutil
from pathlib import Path

from wan_model.system.files import sync_folder
from wan_train.checkpoint.record import (
    RECORD_NAME,
    DamagedCheckpointError,
    FileRecord,
    PartialCheckpointError,
    read_record,
)

LOG_NAME = "log.jsonl"
_FOLDER = re.compile(r"iter_(\d{7,})")


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint.

    Attributes:
        folder: the run's checkpoint folder.
        step: number of completed steps.
        files: its files.
    """

    folder: Path
    step: int
    files: dict[str, FileRecord]

    @property
    def step_folder(self) -> Path:
        """The folder of its files."""
        return step_folder(self.folder, self.step)


def step_folder(folder: Path, step: int) -> Path:
    """The folder of a step, complete or not."""
    return folder / f"iter_{step:07d}"


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a folder, complete or not, ascending."""
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
        step: a specific step; the newest complete one by default.

    Returns:
        None if no step is complete.

    Raises:
        ValueError: the requested step does not exist or is incomplete, or the newest complete one is damaged.
    """
    if step is not None:
        if step not in (saved := saved_steps(folder)):
            raise ValueError(f"{folder} has no checkpoint of step {step}; available steps: {saved}")
        return _read(folder, step)
    for newest in reversed(saved_steps(folder)):
        try:
            return _read(folder, newest)
        except PartialCheckpointError:
            continue
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(
                f"{error}; restore it, or delete {step_folder(folder, newest)} to resume from the checkpoint before it"
            ) from error
    return None


def prune(folder: Path, keep: int) -> list[int]:
    """Delete all checkpoints older than the newest ``keep`` complete ones, incomplete ones included.

    A newer incomplete one is kept, because it may be in progress. At least one complete checkpoint is always kept.

    Returns:
        The deleted steps.
    """
    kept = complete_steps(folder)[-max(1, keep) :]
    deleted = []
    for step in saved_steps(folder):
        if not kept or step in kept or step > kept[-1]:
            continue
        delete_checkpoint(folder, step)
        deleted.append(step)
    return deleted


def delete_checkpoint(folder: Path, step: int) -> None:
    """Delete a checkpoint, its ``complete.json`` first, so that a crash leaves an incomplete one."""
    path = step_folder(folder, step)
    if not path.is_dir():
        return
    (path / RECORD_NAME).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)
