"""Training that is cut off anywhere goes on to the bit: crash points, kills, resumes, disks that are full.

WAN_SOAK=1 runs them at full length: every crash point resumed, 20 kills, every step of 12 with and without workers.
"""

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import (
    RUN_OPTIONS,
    SOAK,
    STEPS,
    STEPS_ON_DATA,
    refused,
    rewrite,
    run,
    same_weights,
    sentence_of,
    stopped_after,
    train,
    train_on_data,
    trajectory,
)
from warm_ranks import Call

from wan_train.checkpoint.folder import find_resume_point, saved_steps, step_folder
from wan_train.checkpoint.record import RECORD_NAME, changed_files

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def crash_points(once: Once) -> Path:
    """What kills at every change on the disk would leave, from the first complete checkpoint on."""

    def build(snapshots: Path) -> None:
        snapshots.mkdir()
        folder = snapshots / "run"
        settings = ("checkpoint.save_interval=2", "checkpoint.most_recent_k=1")
        copy = Call("snapshot_saves:copy_at_every_change", [str(snapshots), str(folder), 2])
        ended = run((*RUN_OPTIONS, *settings), folder, calls=[copy])
        assert ended.codes == [0], ended.errors

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


def test_resumes_from_crash_points_to_the_bit(crash_points: Path, one_process_run: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in crash_points.iterdir() if path.name.isdigit())
    partial = [name for name in names if max(saved_steps(crash_points / name)) > _resume_step(crash_points / name)]
    chosen = names if SOAK else [partial[len(partial) // 3]]
    for name in chosen:
        folder = tmp_path / name
        shutil.copytree(crash_points / name, folder)
        train(folder, "checkpoint.save_interval=2")
        got, wanted = trajectory(folder), trajectory(one_process_run)
        assert got, name
        assert all(wanted[step] == values for step, values in got.items()), name
        assert same_weights(folder, one_process_run, STEPS), name
        shutil.rmtree(folder)


# The change on the disk, of those of the second save, before which everything is killed.
KILLS = range(1, 21) if SOAK else (4, 9)


@pytest.mark.parametrize("change", KILLS)
def test_killed_while_saving_resumes_to_the_bit(change: int, one_process_run: Path, tmp_path: Path) -> None:
    """SIGKILL to everything in the middle of the second save; every other time it is an asynchronous one."""
    folder = tmp_path / "run"
    settings = ("checkpoint.save_interval=2", *(["checkpoint.async_save=true"] if change % 2 else []))
    kill = Call("snapshot_saves:end_at_change", [change, str(folder), 2])
    assert run((*RUN_OPTIONS, *settings), folder, calls=[kill]).codes == [-signal.SIGKILL]
    assert _resume_step(folder) == 2
    if change > 2:
        # An asynchronous save may end after the next one has begun.
        assert saved_steps(folder)[:2] == [2, 4], "it was not killed while a checkpoint was being written"
    train(folder, *settings)
    assert trajectory(folder) == trajectory(one_process_run)
    assert same_weights(folder, one_process_run, STEPS)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_step_is_the_uninterrupted_run(
    dataset: Path, run_on_data: Callable[[int], Path], workers: int, tmp_path: Path
) -> None:
    whole = run_on_data(workers)
    wanted = trajectory(whole)
    assert sorted(wanted) == list(range(1, STEPS_ON_DATA + 1))
    for step in range(1, STEPS_ON_DATA) if SOAK else (4,):
        folder = stopped_after(step, whole, tmp_path / f"from-{step}")
        (folder / "log.jsonl").unlink()
        log = train_on_data(folder, dataset, workers)
        assert log[0] == {"event": "resumed", "step": step}
        assert trajectory(folder) == {done: value for done, value in wanted.items() if done > step}
        assert same_weights(folder, whole, STEPS_ON_DATA)
        shutil.rmtree(folder)


@pytest.mark.parametrize("workers", [0, 2] if SOAK else [0])
def test_a_loader_sent_back_to_an_earlier_step_would_show(
    dataset: Path, run_on_data: Callable[[int], Path], workers: int, tmp_path: Path
) -> None:
    """Control: of a resume at step 4 with the loader's state of step 2."""
    whole = run_on_data(workers)
    folder, name = stopped_after(4, whole, tmp_path / "control"), "train_dataloader_dprank000.pt"
    (folder / "log.jsonl").unlink()
    earlier = torch.load(step_folder(folder, 2) / name, weights_only=True)
    drawn = {"drawn": 8}  # two packs a step: as step 4 wants it
    state = {**earlier, "dataloader_state_dict": {**earlier["dataloader_state_dict"], **drawn}}
    rewrite(step_folder(folder, 4), name, state)
    train_on_data(folder, dataset, workers)
    wanted = trajectory(whole)
    assert trajectory(folder) != {done: value for done, value in wanted.items() if done > 4}


def test_a_flipped_bit_is_refused_by_name(one_process_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flipped"
    shutil.copytree(one_process_run, folder)
    file = step_folder(folder, 6) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    said = refused(folder, "train.train_iters=8")
    assert f"{file} is damaged" in said
    assert RECORD_NAME in said


def test_a_full_disk_is_a_sentence_and_the_last_checkpoint_stays(one_process_run: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE at several sizes stands for a disk that fills up at that moment."""
    largest = max(file.stat().st_size for file in step_folder(one_process_run, 4).iterdir())
    thresholds = [largest * share // 21 for share in (range(1, 21) if SOAK else (4,))]
    for threshold in thresholds:
        folder = stopped_after(2, one_process_run, tmp_path / str(threshold))
        (folder / "log.jsonl").unlink()
        limit = Call("resource:setrlimit", [resource.RLIMIT_FSIZE, [threshold, threshold]])
        said = sentence_of(run((*RUN_OPTIONS, "checkpoint.save_interval=2"), folder, calls=[limit]))
        assert f"could not be written to {step_folder(folder, 4)}: [Errno 27] File too large" in said
        assert _resume_step(folder) == 2
        train(folder, "checkpoint.save_interval=2")
        wanted = trajectory(one_process_run)
        assert all(wanted[step] == values for step, values in trajectory(folder).items())
        assert same_weights(folder, one_process_run, STEPS)
        shutil.rmtree(folder)
    print(json.dumps({"file size limits": len(thresholds)}))
