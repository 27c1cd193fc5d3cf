"""A signal to ``wan-data prepare`` or ``plan``: the command ends, and so does everything that it has started."""

import signal
import sys

import numpy as np
import pytest

from wan_model.testing.processes import Job, wait_until

# What starts the tests may ignore signals, and its children with it.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from wan_data.cli import main
main()
"""
SMALL = ("--area", "1536", "--frames", "5", "--min-frames", "5", "--windows", "consecutive", "--num-decoders", "1")
# On an idle machine ten seconds are enough for all of it.
SECONDS = 60.0


@pytest.fixture(scope="session")
def many_windows(once, clip):
    """Clips that take longer to probe and to encode than a signal takes to arrive."""

    def build(folder):
        shades = np.arange(300) % 200
        for number in range(6):
            clip(folder / f"{number}.mkv", (shades + number).tolist())
            (folder / f"{number}.txt").write_text("A clip.")

    return once("many-windows", build)


@pytest.fixture
def command(many_windows, tiny_model, tmp_path):
    jobs = []

    def start(name):
        options = ["--video-folder", many_windows, "--output-folder", tmp_path / "out", *SMALL]
        if name == "prepare":
            options += ["--model", tiny_model, "--device", "cpu", "--num-processes", "2"]
        place = tmp_path / "place"
        place.mkdir()
        jobs.append(Job.start([sys.executable, "-P", "-c", PROGRAM, name, *map(str, options)], place))
        return jobs[0]

    yield start
    for job in jobs:
        job.end()


@pytest.mark.parametrize(
    ("name", "moment", "sent"),
    [
        ("prepare", "encoding", signal.SIGINT),
        ("prepare", "encoding", signal.SIGTERM),
        ("prepare", "encoding", signal.SIGHUP),
        ("prepare", "probing", signal.SIGHUP),
        ("prepare", "probing", signal.SIGKILL),
        ("plan", "probing", signal.SIGTERM),
    ],
)
def test_a_signal_ends_the_command_and_all_that_it_started(command, name, moment, sent):
    job = command(name)
    wait_until(
        lambda: f"{moment} 1/" in job.errors.read_text() or job.process.poll() is not None, f"it is {moment}", 300.0
    )
    assert job.process.poll() is None, job.errors.read_text()
    assert len(job.alive()) > 1
    job.process.send_signal(sent)
    assert job.code(SECONDS) == (130 if sent == signal.SIGINT else -sent), job.errors.read_text()
    wait_until(lambda: not job.alive(), "all of its processes have ended", SECONDS)
    said = job.errors.read_text()
    ended = "Ended by SIGINT. What is finished is kept, and the same command goes on.\n"
    assert said.endswith(ended) == (sent == signal.SIGINT)
    for word in ("Traceback", "Warning", "resource_tracker", "terminate called"):
        assert word not in said, said
