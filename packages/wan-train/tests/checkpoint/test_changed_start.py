"""Runs that go on from another run's step, or with other averages, data and objective."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import (
    EQUALITY_SEED,
    RUN_OPTIONS,
    STEPS,
    equality_options,
    read_log,
    read_tensors,
    run,
    stopped_after,
    trajectory,
)
from warm_ranks import Call

from wan_model.tiny import TINY_CONFIG
from wan_train.checkpoint.folder import complete_steps, step_folder
from wan_train.data.mock_data import MockConfig, MockLoader

STOPPED = 2
LR, MIN_LR, START, WARMUP, ANNEALED = 4e-3, 2e-3, 1e-3, 3, 2
WEIGHT_DECAYS = (0.1, 0.4)
SCHEDULE = (
    f"optimizer.lr={LR}", f"optimizer.min_lr={MIN_LR}",
    f"scheduler.lr_warmup_iters={WARMUP}", f"scheduler.lr_warmup_init={START}",
    "scheduler.lr_decay_style=WSD", "scheduler.lr_wsd_decay_style=linear", f"scheduler.lr_wsd_decay_iters={ANNEALED}",
    f"scheduler.start_weight_decay={WEIGHT_DECAYS[0]}", f"scheduler.end_weight_decay={WEIGHT_DECAYS[1]}",
    "scheduler.weight_decay_incr_style=linear",
)  # fmt: skip


def _rate(step: int) -> float:
    """Of a step, counted from 1: a linear warm-up, a constant, a linear decay in the last steps."""
    before = step - 1
    if before < WARMUP:
        return START + (LR - START) * before / WARMUP
    return LR - (LR - MIN_LR) * max(0, before - (STEPS - ANNEALED)) / ANNEALED


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Inode and time of change of every file and folder; a file that is replaced has another inode."""
    found = {path: path.stat() for path in [folder, *folder.rglob("*")]}
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in found.items()}


def test_a_run_goes_on_in_another_folder_by_its_own_schedule(one_process_run: Path, tmp_path: Path) -> None:
    """The same command goes on after that from the other folder, whatever ``checkpoint.ckpt_step`` is."""
    folder = tmp_path / "run"
    elsewhere = (f"checkpoint.load={one_process_run}", f"checkpoint.ckpt_step={STOPPED}")
    command = (*RUN_OPTIONS, *elsewhere, *SCHEDULE, "checkpoint.save_interval=2", "train.exit_duration_in_mins=10")
    note = Call("rank_calls:note_settings", [str(tmp_path / "notes")])
    before = _files(one_process_run)
    ended = run(command, folder, calls=[note, Call("rank_calls:started_before", [11])])
    assert ended.codes == [0], ended.errors
    assert complete_steps(folder) == [3], "the time of the run is over after a step"
    assert _files(one_process_run) == before, "nothing of the other run is changed, not even Megatron's tracker files"
    ended = run(command, folder, calls=[note])
    assert ended.codes == [0], ended.errors
    assert [entry["step"] for entry in read_log(folder) if "event" in entry] == [2, 3]
    steps = range(STOPPED + 1, STEPS + 1)
    assert [float.fromhex(rate) for _, _, rate in trajectory(folder).values()] == pytest.approx(list(map(_rate, steps)))
    groups = [entry for entry in map(json.loads, (tmp_path / "notes").read_text().splitlines()) if "wd_mult" in entry]
    # As set for the next step.
    grown = [WEIGHT_DECAYS[0] + (WEIGHT_DECAYS[1] - WEIGHT_DECAYS[0]) * step / STEPS for step in steps]
    assert [group["weight_decay"] for group in groups if group["wd_mult"]] == pytest.approx(grown)
    assert trajectory(folder)[3][0] == trajectory(one_process_run)[3][0], "the weights are of the other run"


def test_averages_data_and_objective_change(equality_reference: Path, start_weights: Path, tmp_path: Path) -> None:
    folder, seed, decay = stopped_after(STOPPED, equality_reference, tmp_path / "run"), 77, 0.5
    command = (*RUN_OPTIONS, *equality_options(start_weights, EQUALITY_SEED))
    changed = (f"ema.decay={decay}", f"dataset.seed={seed}", "validation.seed=5", "train.train_iters=3")
    note = Call("rank_calls:note_settings", [str(tmp_path / "notes")])
    ended = run((*command, *changed, "--training-mode", "finetune"), folder, calls=[note])
    assert ended.codes == [0], ended.errors
    found = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]

    # A cosine from the end of the warm-up to that of the run: half of it after the second step of three.
    half = 0.001 + (0.01 - 0.001) * (1 + math.cos(math.pi * (2 - 1) / (3 - 1))) / 2
    assert float.fromhex(trajectory(folder)[3][2]) == pytest.approx(half)
    drawn = [entry for entry in found if "noise_seed" in entry]
    assert all((entry["density"], entry["shift"], entry["uniform_mix"]) == ("uniform", 3.0, 0.1) for entry in drawn)
    loader = MockLoader(
        MockConfig([[3, 8, 8], [1, 6, 10], [2, 4, 10]], 512, 3), TINY_CONFIG, rank=0, ranks=1, multiple=1, seed=seed
    )
    loader.drawn, packs = 2 * STOPPED, iter(loader)
    assert [entry["first"] for entry in drawn] == [float(next(packs).tokens_SC[0, 0]) for _ in range(2)]
    assert {entry["validation_seed"] for entry in found if "validation_seed" in entry} == {5}

    before = read_tensors(step_folder(folder, 2), ("ema.blocks.",))
    now, average = (read_tensors(step_folder(folder, 3), (prefix,)) for prefix in ("blocks.", "ema.blocks."))
    assert average
    for key, value in average.items():
        torch.testing.assert_close(value, decay * before[key] + (1 - decay) * now[key], rtol=1e-6, atol=1e-8)

    shutil.rmtree(step_folder(folder, 3))
    ended = run((*command, "ema.decay=0", "samples.ema=false", "train.train_iters=3"), folder)
    assert ended.codes == [0], ended.errors
    assert not read_tensors(step_folder(folder, 3), ("ema.",)), "an average that nothing updates"
