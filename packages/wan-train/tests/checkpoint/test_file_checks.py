"""What a file of a checkpoint holds is read as values, never run."""

from pathlib import Path

import pytest
import torch

from wan_model.testing.pickled_call import PickledCall
from wan_train.checkpoint.file_checks import read_loader_state
from wan_train.checkpoint.folder import ResumePoint


def test_a_loader_state_that_is_code_is_refused_and_not_run(tmp_path: Path) -> None:
    point, marker = ResumePoint(tmp_path, 1, {}), tmp_path / "marker"
    point.step_folder.mkdir()
    torch.save(
        {"dataloader_state_dict": PickledCall(Path.touch, marker)}, point.step_folder / "train_dataloader_dprank000.pt"
    )
    with pytest.raises(ValueError, match="cannot be read"):
        read_loader_state(point, 0)
    assert not marker.exists()
    torch.load(point.step_folder / "train_dataloader_dprank000.pt", weights_only=False)
    assert marker.exists(), "control: a plain load would have run it"
