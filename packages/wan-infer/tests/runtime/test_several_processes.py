"""The command in several processes: its result, its errors, and how the processes end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from wan_infer.output.video_file import read_video
from wan_model.testing.processes import Job, LaunchServer, wait_until, write_forbidden_modules


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "wan_infer", *map(str, arguments)]


QUICK = ("--sizes", "32*48", "--frame_nums", "5", "--sample_steps", "2", "--device", "cpu")


WAYS = {
    "alone": ([], []),
    "two": ([], ["--nproc-per-node", 2, "--cfg-parallel", "--shard-weights"]),
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2], ["--cfg-parallel"]),
}


def test_the_command_in_two_processes(model_folder: Path, tmp_path: Path) -> None:
    # Single images are stored without loss; an encoder of videos makes much of a difference in the last digit.
    pictures, options = {}, ("--prompts", "a rabbit", "--sizes", "32*48", "--frame_nums", "1", "--sample_steps", "2")
    for name, (starter, extra) in WAYS.items():
        path = tmp_path / f"{name}.png"
        done = subprocess.run(
            [sys.executable, *map(str, starter), *command(
                "--model", model_folder, *options, "--device", "cpu", "--save_file", path, *extra, "--json"
            )[1:]],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["processes"] == (1 if name == "alone" else 2)
        assert report["peak_memory_bytes"] > 10_000_000
        assert done.stderr.count("step 2/2") == 1, "the first process speaks for all"
        pictures[name] = read_video(path)[0].astype(int)
    for name in ("two", "torchrun"):
        assert np.abs(pictures[name] - pictures["alone"]).max() <= 1
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in WAYS}


def test_what_stands_in_the_way_is_said_once(model_folder: Path, tmp_path: Path) -> None:
    broken = ("--model", tmp_path / "absent", "--prompts", "a", *QUICK, "--nproc-per-node", 2)
    done = subprocess.run(command(*broken), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if not line.startswith("load")]
    assert len(errors) == 1
    # Where the other process starts much later, on busy processors, only the first one has found it.
    assert re.match(r"Error( \(rank \d\))?: no model at", errors[0])


@pytest.fixture(scope="module")
def server() -> Iterator[LaunchServer]:
    with contextlib.closing(LaunchServer()) as server:
        yield server


ENDS = {
    "a rank is killed": (signal.SIGTERM, 1, "Error (rank 1): the process was killed by SIGTERM"),
    "a rank is stopped": (signal.SIGSTOP, 1, "Error (rank 1): the process was stopped (SIGSTOP) 1 seconds ago"),
    "the launcher is killed": (signal.SIGKILL, -signal.SIGKILL, None),
    "the launcher is interrupted": (signal.SIGTERM, 128 + signal.SIGTERM, "Ended by SIGTERM."),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are looked up in /proc")
@pytest.mark.parametrize("end", ENDS)
def test_all_end_together(end: str, server: LaunchServer, model_folder: Path, tmp_path: Path) -> None:
    number, code, message = ENDS[end]
    place, folder = tmp_path / "place", tmp_path / "clips"
    place.mkdir()
    folder.mkdir()
    # In the working folder of all processes, none of which may import it.
    write_forbidden_modules(folder, "socket", "ctypes")
    video = tmp_path / "videos" / "a.mp4"
    options = ("--model", model_folder, "--prompts", "a", *QUICK, "--save_file", video, "--sample_steps", 1000)
    if end == "a rank is killed":  # the command as a whole
        whole = [sys.executable, "-P", *command(*options, "--nproc-per-node", 2)[1:]]
        job = Job.start(whole, place, cwd=folder)
    else:
        arguments, quick = [*map(str, options)], {"STOPPED_SECONDS": 1.0}
        job = server.start("wan_infer", place, arguments, cwd=folder, settings=quick, first_rank_output=True)
    try:
        wait_until(lambda: "step " in job.errors.read_text() or job.process.poll() is not None, "it samples", 300.0)
        ranks = job.ranks()
        assert len(ranks) == 2, job.errors.read_text()
        if end.startswith("a rank"):
            os.kill(ranks[1], number)
        else:
            job.process.send_signal(number)
        assert job.code(30.0) == code
        if message is None:
            wait_until(lambda: not job.alive(), "all have ended", 20.0)
        else:
            assert job.alive() == []
            assert job.error_lines()[-1].startswith(message)
            assert "Error" not in "".join(job.error_lines()[:-1])
        assert not video.parent.exists() or not list(video.parent.iterdir())
    finally:
        job.end()
