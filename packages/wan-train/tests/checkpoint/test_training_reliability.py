"""Training that is cut off anywhere goes on to the bit: crash points, kills, resumes, disks that are full.

WAN_SOAK=1 runs them at full length: every crash point resumed, 20 kills, every step of 12 with and without workers.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import (
    BASE_OPTIONS,
    RUN_OPTIONS,
    data_options,
    read_log,
    rewrite,
    steps_of,
    train,
    train_on,
    wan_train,
    write_dataset,
)

from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_train.checkpoint.folder import find_resume_point, saved_steps, step_folder
from wan_train.checkpoint.record import RECORD_NAME, changed_files
from wan_train.config.options import RunOptions

Once = Callable[[str, Callable[[Path], object]], Path]
SOAK = bool(os.environ.get("WAN_SOAK"))
LAST = 6


def trajectory(folder: Path) -> dict[int, tuple[str, str]]:
    """Loss and gradient norm of each step, to the bit, as the log says last."""
    return {
        entry["step"]: (float(entry["loss"]).hex(), float(entry["grad_norm"]).hex())
        for entry in steps_of(read_log(folder))
    }


def same_weights(one: Path, other: Path, step: int) -> bool:
    states = [
        read_training_checkpoint(find_checkpoint(folder, step), dtype=torch.float32)[2] for folder in (one, other)
    ]
    return all(torch.equal(states[0][key], states[1][key]) for key in states[1])


@pytest.fixture(scope="session")
def undisturbed(once: Once) -> Path:
    """Six steps, saved after each second one."""
    return once("undisturbed", lambda folder: train(folder, "checkpoint.save_interval=2"))


@pytest.fixture(scope="session")
def crash_points(once: Once) -> Path:
    """What kills at every change on the disk would leave, from the first complete checkpoint on."""

    def build(snapshots: Path) -> None:
        snapshots.mkdir()
        folder = snapshots / "run"
        options = RunOptions("tiny", mock=True, overrides=tuple(
            option for option in (*RUN_OPTIONS, "checkpoint.save_interval=2", "checkpoint.most_recent_k=1",
                                  f"checkpoint.save={folder}") if "=" in option
        ))  # fmt: skip
        script = Path(__file__).parents[1] / "snapshot_saves.py"
        done = subprocess.run(
            [sys.executable, str(script), str(snapshots), str(folder), "2", options.to_json()],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return once("crash-points", build)


def _resume_step(folder: Path) -> int:
    point = find_resume_point(folder)
    assert point is not None, f"{folder.name}: nothing to resume from"
    return point.step


def test_every_crash_point_of_a_save_leaves_a_whole_checkpoint(crash_points: Path) -> None:
    found, partial, misled = [], 0, 0
    for snapshot in sorted(path for path in crash_points.iterdir() if path.name.isdigit()):
        point = find_resume_point(snapshot)
        assert point is not None, f"{snapshot.name}: nothing to resume from"
        assert changed_files(point.step_folder, point.files, point.files) == []
        found.append(point.step)
        later = [step for step in saved_steps(snapshot) if step > point.step]
        partial += bool(later)
        tracker = snapshot / "latest_checkpointed_iteration.txt"
        misled += tracker.read_text() != str(point.step)
        for step in later:  # the same, with each file that was being written cut in half
            for file in step_folder(snapshot, step).iterdir():
                whole = file.read_bytes()
                file.write_bytes(whole[: len(whole) // 2])
                assert _resume_step(snapshot) == point.step
                file.write_bytes(whole)
    assert found == sorted(found)
    assert set(found) == {2, 4, 6}
    print(f"{len(found)} crash points, {partial} with a partial checkpoint, {misled} where Megatron's tracker is wrong")
    assert partial >= 10
    assert misled > 0, "control: trusting the tracker would have failed"


def test_resumes_from_crash_points_to_the_bit(crash_points: Path, undisturbed: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in crash_points.iterdir() if path.name.isdigit())
    partial = [
        name for name in names if max(saved_steps(crash_points / name)) > find_resume_point(crash_points / name).step
    ]  # type: ignore[union-attr]
    chosen = names if SOAK else [partial[len(partial) // 3]]
    for name in chosen:
        folder = tmp_path / name
        shutil.copytree(crash_points / name, folder)
        train(folder, "checkpoint.save_interval=2")
        got, wanted = trajectory(folder), trajectory(undisturbed)
        assert got, name
        assert all(wanted[step] == values for step, values in got.items()), name
        assert same_weights(folder, undisturbed, LAST), name
        shutil.rmtree(folder)


def _start(folder: Path, *settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from wan_train.cli import main; main()", "pretrain", *RUN_OPTIONS]
    return subprocess.Popen(
        [*command, f"checkpoint.save={folder}", *settings], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def test_killed_while_saving_resumes_to_the_bit(undisturbed: Path, tmp_path: Path) -> None:
    """SIGKILL to everything at moments spread over the second save; every other time with an asynchronous save."""
    kills = 20 if SOAK else 2
    partial = 0
    for number in range(kills):
        folder = tmp_path / f"{number:02d}"
        settings = ["checkpoint.save_interval=2", *(["checkpoint.async_save=true"] if number % 2 else [])]
        run = _start(folder, *settings)
        try:
            while not step_folder(folder, 4).is_dir() and run.poll() is None:
                time.sleep(0.002)
            time.sleep(0.03 * number)
        finally:
            for child in _descendants(run.pid):
                _kill(child)
            _kill(run.pid)
            run.wait()
        point = find_resume_point(folder)
        partial += point is None or point.step < max(saved_steps(folder))
        train(folder, *settings)
        assert trajectory(folder) == trajectory(undisturbed), f"kill {number}"
        assert same_weights(folder, undisturbed, LAST), f"kill {number}"
    print(f"{kills} kills, {partial} left a partial checkpoint, 0 differing")
    assert partial > 0, "no kill came while a checkpoint was being written"


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


@pytest.fixture(scope="session")
def dataset(once: Once) -> Path:
    return once("dataset", write_dataset)


def _train_on_data(folder: Path, dataset: Path, workers: int, *settings: str) -> list[dict[str, Any]]:
    options = (*BASE_OPTIONS, *data_options(dataset, workers), "train.train_iters=12", "checkpoint.save_interval=1")
    return train_on((*options, "ema.decay=0.9", *settings), folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_step_is_the_uninterrupted_run(dataset: Path, workers: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    _train_on_data(whole, dataset, workers)
    wanted = trajectory(whole)
    assert sorted(wanted) == list(range(1, 13))
    for step in range(1, 12) if SOAK else (5,):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(whole, folder)
        for later in range(step + 1, 13):
            shutil.rmtree(step_folder(folder, later))
        (folder / "log.jsonl").unlink()
        log = _train_on_data(folder, dataset, workers)
        assert log[0] == {"event": "resumed", "step": step}
        assert trajectory(folder) == {done: value for done, value in wanted.items() if done > step}
        assert same_weights(folder, whole, 12)
        shutil.rmtree(folder)

    # Control: with the loader sent back to its beginning, the run is another one.
    folder = tmp_path / "control"
    shutil.copytree(step_folder(whole, 1), step_folder(folder, 1))
    path, start = step_folder(folder, 1), step_folder(whole, 6)
    shutil.copytree(start, step_folder(folder, 6))
    first = torch.load(path / "train_dataloader_dprank000.pt", weights_only=True)
    state = first["dataloader_state_dict"]
    rewrite(
        step_folder(folder, 6),
        "train_dataloader_dprank000.pt",
        {**first, "dataloader_state_dict": {**state, "drawn": 12}},
    )
    _train_on_data(folder, dataset, workers)
    assert trajectory(folder) != {done: value for done, value in wanted.items() if done > 6}


def test_a_flipped_bit_is_refused_by_name(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flipped"
    shutil.copytree(undisturbed, folder)
    file = step_folder(folder, 6) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    done = wan_train(*RUN_OPTIONS, "train.train_iters=8", f"checkpoint.save={folder}")
    assert done.returncode == 2
    assert f"{file} is not what was saved" in done.stderr
    assert RECORD_NAME in done.stderr
    assert done.stderr.count("Traceback") == 0


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(undisturbed: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE at several sizes stands for a disk that fills up at that moment."""
    largest = max(file.stat().st_size for file in step_folder(undisturbed, 4).iterdir())
    thresholds = [largest * share // 21 for share in (range(1, 21) if SOAK else (4,))]
    for threshold in thresholds:
        folder = tmp_path / str(threshold)
        shutil.copytree(undisturbed, folder)
        for step in (4, 6):
            shutil.rmtree(step_folder(folder, step))
        (folder / "log.jsonl").unlink()
        command = [sys.executable, "-c", "from wan_train.cli import main; main()", "pretrain", *RUN_OPTIONS]
        done = subprocess.run(
            [*command, f"checkpoint.save={folder}", "checkpoint.save_interval=2"],
            capture_output=True, text=True, check=False, timeout=300,
            preexec_fn=lambda limit=threshold: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),  # type: ignore[misc]
        )  # fmt: skip
        assert done.returncode == 2, done.stderr[-2000:]
        assert f"could not be written to {step_folder(folder, 4)}: [Errno 27] File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert _resume_step(folder) == 2
        train(folder, "checkpoint.save_interval=2")
        got = trajectory(folder)
        assert all(trajectory(undisturbed)[step] == values for step, values in got.items())
        assert same_weights(folder, undisturbed, LAST)
        shutil.rmtree(folder)
    print(json.dumps({"file size limits": len(thresholds)}))
