"""A training run ends when it should; what its launcher does with any ranks is tested in wan-model's tests/system."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training_runs import RUN_OPTIONS, warm_ranks

from wan_model.testing.processes import Job, LaunchServer, default_signals, wait_until, write_forbidden_modules
from wan_train.checkpoint.folder import complete_steps
from wan_train.config.options import RunOptions
from wan_train.launch.launcher import resume_message, save_folder

# What the specification allows between an event and the end of the last process.
SOON = 20.0

# The real main module with something else in the place of training.
WORKER = """
import os, runpy, sys, time, types
rank = int(os.environ["RANK"])
def pretrain(options):
    assert options.recipe == "tiny"
    BODY
run = types.ModuleType("wan_train.loop.run")
run.pretrain = pretrain
sys.modules["wan_train.loop.run"] = run
if __name__ == "__main__": runpy.run_module("wan_train.launch.worker", run_name="__main__", alter_sys=False)
"""


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """Also where the tests run in the background."""
    with default_signals(signal.SIGINT, signal.SIGHUP):
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[LaunchServer]:
    with contextlib.closing(LaunchServer()) as server:
        yield server


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("if rank == 1: raise ValueError('step 3 is not to be had')\n    time.sleep(600)", 2,
         ["Error (rank 1): step 3 is not to be had"]),
        ("if rank == 0: 1 / 0\n    time.sleep(600)", 1,
         ["Error (rank 0):", "Traceback (most recent call last):", ..., "ZeroDivisionError: division by zero"]),
        ("pass", 0, []),
    ],
    ids=["sentence", "traceback", "well"],
)  # fmt: skip
def test_an_error_of_training_reaches_the_launcher(
    body: str, code: int, said: list[object], server: LaunchServer, tmp_path: Path
) -> None:
    (tmp_path / "ranks.py").write_text(WORKER.replace("BODY", body))
    job = server.start("ranks", tmp_path, [RunOptions("tiny").to_json()])
    assert job.code() == code
    assert job.alive() == []
    lines: list[object] = [*job.error_lines()]
    assert [*lines[:2], ..., *lines[-1:]] == said if ... in said else lines == said


# As the script that pip installs, with something else in the place of training.
SCRIPT = """#!PYTHON
import multiprocessing, sys, types
def pretrain(options):
    for method in ("spawn", "forkserver"):
        child = multiprocessing.get_context(method).Process(target=print, args=(f"{method} started",))
        child.start()
        child.join()
        if child.exitcode: raise ValueError(f"{method} ended with {child.exitcode}")
run = types.ModuleType("wan_train.loop.run")
run.pretrain = pretrain
sys.modules["wan_train.loop.run"] = run
from wan_train.cli import main
if __name__ == "__main__": main()
"""


def test_what_a_rank_of_torchrun_starts_imports_nothing_from_the_working_folder(tmp_path: Path) -> None:
    """torchrun starts the script without ``-P``; writers of checkpoints are spawned, with a tracker of resources."""
    place, clips = tmp_path / "bin", tmp_path / "clips"
    for folder in (place, clips):
        folder.mkdir()
    write_forbidden_modules(clips, "base64", "ctypes", "signal", "socket", "struct", "random")
    script = place / "wan-train"
    script.write_text(SCRIPT.replace("PYTHON", sys.executable))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    ended = subprocess.run(
        [sys.executable, str(script), "pretrain", "--recipe", "tiny", "--mock"],
        cwd=clips, env={**environment, "RANK": "0", "WORLD_SIZE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == ["spawn started", "forkserver started"]


@pytest.fixture
def start_training(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """A real run without an end, seen to have trained."""
    jobs: list[Job] = []

    def start(ranks: int, *arguments: str) -> Job:
        folder, clips, place = tmp_path / "run", tmp_path / "clips", tmp_path / "place"
        place.mkdir()
        clips.mkdir()
        # In the working folder of all of its processes, none of which may import it.
        write_forbidden_modules(clips, "socket", "ctypes")
        command = [sys.executable, "-P", "-c", "from wan_train.cli import main; main()", "pretrain", *RUN_OPTIONS]
        endless = ["train.train_iters=100000", "--nproc-per-node", str(ranks), f"checkpoint.save={folder}"]
        jobs.append(job := Job.start([*command, *endless, *arguments], place, cwd=clips))
        log = folder / "log.jsonl"

        def trains() -> bool:
            assert job.process.poll() is None, job.errors.read_text()
            return log.exists() and len(log.read_text().splitlines()) >= 3

        wait_until(trains, "three steps are in the log", 300.0)
        return job

    yield start
    for job in jobs:
        job.end()


def test_a_rank_killed_in_training_ends_the_run(start_training: Callable[..., Job]) -> None:
    job = start_training(2)
    pids = job.ranks()
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    assert job.code(SOON) == 137
    assert job.alive() == []
    assert [line for line in job.error_lines() if "Error" in line] == [job.error_lines()[-1]]
    assert job.error_lines()[-1].startswith("Error (rank 1): the process was killed by SIGKILL")


@pytest.mark.parametrize(
    ("content", "overrides", "folder"),
    [
        (None, [], None),
        (None, ["checkpoint.save=a", "checkpoint.save=b=c"], "b=c"),
        ("checkpoint: {save: mine}", ["checkpoint.load=b"], "mine"),
        ("checkpoint: {save: mine}", ["checkpoint.save=null"], None),
        ("train: {train_iters: 3}", [], None),
    ],
)
def test_where_a_run_saves(content: str | None, overrides: list[str], folder: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    file = None if content is None else str(tmp_path / "run.yaml")
    found = save_folder(RunOptions("tiny", config_file=file, overrides=tuple(overrides)))
    assert found == (None if folder is None else Path(folder))


def test_an_interrupted_run_says_from_where_it_goes_on(start_training: Callable[..., Job], tmp_path: Path) -> None:
    job = start_training(1, "checkpoint.save_interval=2")
    run = tmp_path / "run"
    wait_until(lambda: bool(complete_steps(run)), "a checkpoint is complete")
    job.process.send_signal(signal.SIGINT)
    assert job.code(SOON) == 128 + signal.SIGINT
    newest = complete_steps(run)[-1]
    assert job.error_lines()[-2:] == [
        "Ended by SIGINT.",
        f"The same command goes on after step {newest}, from {run / f'iter_{newest:07d}'}.",
    ]
    shutil.rmtree(run)
    options = RunOptions("tiny", overrides=(f"checkpoint.save={run}",))
    assert resume_message(options) == f"{run} has no complete checkpoint, so the same command starts anew."
    unsaved = "checkpoint.save is not set, so nothing was saved, and the same command starts anew."
    assert resume_message(RunOptions("tiny")) == unsaved


def test_a_run_that_saves_nothing_says_so_at_its_start() -> None:
    settings = ("train.train_iters=1", "train.global_batch_size=2", "scheduler.lr_warmup_iters=0")
    ended = warm_ranks().start(RunOptions("tiny", overrides=settings, mock=True).to_json()).wait()
    assert ended.codes == [0], ended.errors
    first, second = ended.output[0].splitlines()
    assert first == "checkpoint.save is not set: nothing is saved, and an interrupted run has nothing to resume from"
    assert second.startswith("step 1/1")


def test_weights_and_biases_need_a_folder() -> None:
    settings = ("train.train_iters=1", "train.global_batch_size=2", "logger.wandb_project=wan")
    ended = warm_ranks().start(RunOptions("tiny", overrides=settings, mock=True).to_json()).wait()
    assert ended.codes == [2], ended.errors
    assert (
        "logger.wandb_project is 'wan', and there is no folder for its files; set logger.wandb_save_dir" in ended.errors
    )


def test_training_and_its_checkpoint_writers_end_with_a_killed_launcher(start_training: Callable[..., Job]) -> None:
    job = start_training(1, "checkpoint.save_interval=1", "checkpoint.async_save=true")
    # More than the launcher and its rank: somebody is writing.
    wait_until(lambda: len(job.alive()) > 2, "a checkpoint is being written")
    job.process.send_signal(signal.SIGKILL)
    job.code()
    wait_until(lambda: not job.alive(), "all have ended", SOON)
