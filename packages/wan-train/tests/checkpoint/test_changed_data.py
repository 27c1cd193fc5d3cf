"""The dataset of a resumed run: its folder may move, its content may not change."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from training_runs import (
    BASE_OPTIONS,
    STEPS_ON_DATA,
    data_options,
    read_log,
    refused_on,
    same_weights,
    stopped_after,
    train_on,
    train_on_data,
    trajectory,
    write_dataset,
)

from wan_data.reading.datasets import open_split
from wan_model.weights.run_settings import read_run_settings
from wan_model.weights.training_checkpoint import find_checkpoint

STOPPED = STEPS_ON_DATA - 2


def test_a_dataset_that_has_moved_is_continued_to_the_bit(
    run_on_data: Callable[[int], Path], dataset: Path, tmp_path: Path
) -> None:
    """Its model, which ``dataset.encoded_by`` names, has moved with it."""
    folder = stopped_after(STOPPED, run_on_data(0), tmp_path / "run")
    moved = Path(shutil.copytree(dataset, tmp_path / "moved"))
    train_on_data(folder, moved)
    assert trajectory(folder) == trajectory(run_on_data(0))
    assert same_weights(folder, run_on_data(0), STEPS_ON_DATA)
    recorded = read_run_settings(find_checkpoint(folder))["dataset"]
    assert (recorded["path"], recorded["encoded_by"]) == (str(moved / "data"), str(moved / "model"))


def test_another_dataset_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    """By the digests in the manifest."""
    run, options = tmp_path / "run", (*BASE_OPTIONS, "train.train_iters=2", "train.exit_interval=1")
    for name, seed in (("first", 5), ("other", 6)):
        write_dataset(tmp_path / name, seed=seed, manifest=True)
    train_on((*options, *data_options(tmp_path / "first")), run)
    before, after = (open_split(tmp_path / name / "data", "train")[0].fingerprint for name in ("first", "other"))
    said = refused_on((*options, *data_options(tmp_path / "other")), run)
    assert f"the loader's state is of another run: dataset ['{before}'] instead of ['{after}']" in said
    assert said.startswith(f"dataset.path is {tmp_path / 'other' / 'data'}: ")
    assert "resume with the same dataset" in said
    assert f"or start a new run from its weights: checkpoint.load={run} checkpoint.finetune=true" in said
    write_dataset(tmp_path / "smaller", train=30)
    assert "the loader's state is of another run: dataset" in refused_on(
        (*options, *data_options(tmp_path / "smaller")), run
    )
    assert [entry["step"] for entry in read_log(run)] == [1], "a step was taken"


def test_other_data_without_digests_are_refused(run_on_data: Callable[[int], Path], tmp_path: Path) -> None:
    """As of NVIDIA's script: number and sizes of the shards are equal."""
    folder = stopped_after(STOPPED, run_on_data(0), tmp_path / "run")
    write_dataset(tmp_path / "other", seed=6)
    options = (*BASE_OPTIONS, f"train.train_iters={STEPS_ON_DATA}", *data_options(tmp_path / "other"), "ema.decay=0.9")
    said = refused_on(options, folder)
    before = torch.load(find_checkpoint(folder) / "train_dataloader_dprank000.pt", weights_only=True)
    assert "the data's content is " in said
    assert f"where the checkpoint was trained on {before['dataloader_state_dict']['content']};" in said
    assert [entry["step"] for entry in read_log(folder) if "event" not in entry] == list(range(1, STOPPED + 1))
