"""Checks of what the files of a checkpoint hold, before they are used: one that was changed is refused by name.

The digests in ``complete.json`` tell damage. Whoever rewrites a file and the record needs another answer than the
traceback of the first function that stumbles over it.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from wan_model.system.safe_reading import read_json, require_file
from wan_train.checkpoint.folder import ResumePoint

TRAIN_STATE = "train_state.pt"
_STRATEGY = "metadata.json"
# Far above what each of these files has; a state of the loader lists some 20,000 sequences of samples.
_LARGEST_STRATEGY, _LARGEST_STATE = 1 << 16, 1 << 30
# What functions raise that expect another form.
_WRONG_FORM = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RecursionError,
    TypeError,
    pickle.UnpicklingError,
)


def loader_state_path(point: ResumePoint, rank: int) -> Path:
    """The file with the data loader's state of one data-parallel rank."""
    return point.step_folder / f"train_dataloader_dprank{rank:03d}.pt"


def _instead(point: ResumePoint) -> str:
    return f"restore it, or delete {point.step_folder} to resume from the checkpoint before it"


@contextlib.contextmanager
def wrong_form_refused(point: ResumePoint, path: Path) -> Iterator[None]:
    """In this context an error about the form of a file or folder of the checkpoint is a ``ValueError`` naming it."""
    try:
        yield
    except _WRONG_FORM as error:
        reason = " ".join(str(error).split())[:200]
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise ValueError(f"{path} does not hold what a checkpoint does ({reason}); {_instead(point)}") from error


def _load(path: Path) -> Any:
    try:
        require_file(path, _LARGEST_STATE)
        return torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise any exception
        raise TypeError(f"it cannot be read: {error}") from error


def read_loader_state(point: ResumePoint, rank: int) -> dict[str, Any]:
    """The data loader's state of one data-parallel rank.

    Raises:
        ValueError: the checkpoint has no such file, or it holds anything but plain values.
    """
    path = loader_state_path(point, rank)
    if not path.exists():
        raise ValueError(
            f"{path} is missing: the checkpoint has no loader state for data-parallel rank {rank}; "
            "resume with the data-parallel size that it was saved with"
        )
    with wrong_form_refused(point, path):
        state = _load(path)["dataloader_state_dict"]
        if not isinstance(state, dict) or not isinstance(state["loader"], dict):
            raise TypeError("the loader's state is no mapping")
        return state


def check_file_contents(point: ResumePoint, restore: Callable[[Mapping[str, Any]], object]) -> None:
    """Verify the form of the files that Megatron-Bridge reads first.

    Args:
        point: the checkpoint.
        restore: makes a state of the loop from the content of ``train_state.pt``.

    Raises:
        ValueError: a file has another form; the message names it.
    """
    if (path := point.step_folder / _STRATEGY).exists():  # not in those of FSDP
        with wrong_form_refused(point, path):
            try:
                found = read_json(path, _LARGEST_STRATEGY)
            except ValueError as error:
                raise TypeError(str(error)) from error
            if found["sharded_backend"] != "torch_dist":
                raise TypeError(f"it names the format {found['sharded_backend']!r}, expected 'torch_dist'")
            if found.get("common_backend", "torch") != "torch":
                raise TypeError(f"it names the format {found['common_backend']!r}, expected 'torch'")
    path = point.step_folder / TRAIN_STATE
    with wrong_form_refused(point, path):
        saved = _load(path)
        if not isinstance(saved, dict) or not all(
            isinstance(value, torch.Tensor) and value.numel() == 1 for value in saved.values()
        ):
            raise TypeError("expected a mapping of single numbers")
        restore(saved)
        if int(saved["step"]) != point.step:
            raise TypeError(f"it is of step {int(saved['step'])}, expected {point.step}")
