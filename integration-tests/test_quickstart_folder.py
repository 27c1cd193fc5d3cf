"""Whose folder the quickstart clears, and what ends with it."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from quickstart import __main__ as command_line
from quickstart import results_folder
from quickstart.real_clips import RealClips
from quickstart.workflow import MADE, Workflow
from quickstart.world_clips import WORLD, WorldClips

from common import commands
from common.failure import ToolFailure
from common.json_file import write_json
from small_world.adherence import requests
from small_world.commands import write_requests
from wan_model.system.process_tree import is_running
from wan_model.testing.processes import default_signals

TOOLS = Path(command_line.__file__).parents[1]
DEADLINE = 120.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that does not exist yet, below the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "q"


def _prepare(workflow: type[Workflow] = WorldClips) -> None:
    with workflow(Path.cwd(), Path("q")).prepared():
        pass


def _content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workflow", [RealClips, WorldClips])
def test_a_folder_with_files_that_no_run_has_made_is_left_alone(workflow, folder):
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights").write_text("of a user")
    with pytest.raises(
        ToolFailure, match=r"^q holds files and no \.quickstart, .*; expected a new or empty folder, .*;"
    ):
        _prepare(workflow)
    assert _content(folder) == ["model", "model/weights"]


@pytest.mark.parametrize("workflow", [RealClips, WorldClips])
@pytest.mark.parametrize("empty", [True, False])
def test_a_run_replaces_the_results_of_either_and_keeps_the_rest(workflow, empty, folder):
    if empty:
        folder.mkdir()
    _prepare(workflow)
    for name in ("clips", "samples", "download"):
        (folder / name).mkdir()
        (folder / name / "old").write_text("old")
    for name in ("video.mp4", "adherence.png", "report.json", "own.txt"):
        (folder / name).write_text("old")
    _prepare(workflow)
    assert _content(folder) == [".quickstart", "download", "download/old", "own.txt"]


def test_every_result_is_cleared(folder):
    _prepare()
    for name in MADE:
        (folder / name).write_text("old")
    _prepare()
    assert _content(folder) == [".quickstart"]


def test_the_marker_is_there_before_anything_is_removed(folder, monkeypatch):
    _prepare()
    (folder / "clips").mkdir()
    seen = []

    def remove(path: Path) -> None:
        seen.append(_content(folder))
        raise OSError(errno.EACCES, "refused", str(path))

    monkeypatch.setattr(results_folder.shutil, "rmtree", remove)
    with pytest.raises(OSError, match="refused"):
        _prepare()
    assert seen == [[".quickstart", "clips"]]


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_a_file_in_place_of_the_folder_is_refused(kind, folder):
    if kind == "file":
        folder.write_text("of a user")
    else:
        folder.symlink_to("nowhere")
    with pytest.raises(ToolFailure, match=r"^q is a file or a broken link; expected a folder; choose another"):
        _prepare()
    assert folder.is_symlink() or folder.read_text() == "of a user"


def test_a_link_in_place_of_a_result_is_refused_before_anything_is_removed(folder, tmp_path):
    _prepare()
    (tmp_path / "elsewhere").mkdir()
    (folder / "clips").mkdir()
    (folder / "dataset").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ToolFailure, match=r"^q/dataset: a symbolic link; expected .*; remove the link, or choose"):
        _prepare()
    assert _content(folder) == [".quickstart", "clips", "dataset"]


def test_a_link_in_place_of_the_marker_makes_no_folder_the_quickstarts(folder, tmp_path):
    folder.mkdir()
    (folder / "clips").mkdir()
    (folder / ".quickstart").symlink_to(tmp_path / "other")
    with pytest.raises(ToolFailure, match=r"^q holds files and no \.quickstart"):
        _prepare()
    assert _content(folder) == [".quickstart", "clips"]


def test_a_second_run_in_a_folder_is_refused_while_the_first_goes_on(folder):
    workflow = WorldClips(Path.cwd(), Path("q"))
    with workflow.prepared():
        (folder / "clips").mkdir()
        with pytest.raises(ToolFailure, match=r"^another run, .* is writing to q; expected one at a time; wait"):
            _prepare()
        assert (folder / "clips").is_dir()
    _prepare()
    assert not (folder / "clips").exists()


def test_a_command_that_outlives_its_run_keeps_the_folder_locked(folder, monkeypatch):
    workflow, started = WorldClips(Path.cwd(), Path("q")), []

    class Killed(Exception):
        pass

    class Outlives(subprocess.Popen):
        def wait(self, timeout: float | None = None) -> int:
            started.append(self)
            raise Killed

    with monkeypatch.context() as patched, contextlib.suppress(Killed), workflow.prepared():
        patched.setattr(commands.subprocess, "Popen", Outlives)
        workflow.stages.command("python", "-c", "import time; time.sleep(600)")
    (process,) = started
    assert process in commands.running_commands()
    try:
        with pytest.raises(ToolFailure, match=r"^another run, or a command that it left, is writing to q;"):
            _prepare()
    finally:
        process.kill()
        subprocess.Popen.wait(process)
        commands._running.remove(process)
    _prepare()


# -- what is missing --------------------------------------------------------------------------------------------------


def test_missing_programs_are_found_before_anything_else(folder, tmp_path, monkeypatch):
    _prepare()
    (folder / "clips").mkdir()
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "wan-train").symlink_to(sys.executable)
    monkeypatch.setattr(commands.sysconfig, "get_path", lambda _: str(scripts))
    with pytest.raises(ToolFailure, match=r"^wan-data, wan-infer are not installed beside .*; install the four"):
        _prepare()
    assert (folder / "clips").is_dir()


@pytest.mark.parametrize(
    "write", [lambda path: write_json(path, {"a": 1}), lambda path: write_requests(WORLD, requests(WORLD), path)]
)
def test_a_full_disk_is_named_with_the_file(write: Callable[[Path], None]):
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'") as caught:
        write(Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left", "q/report.json"), "cannot read or write q/report.json: No space left"),
        (OSError(errno.ENOSPC, "No space left"), "[Errno 28] No space left"),
        (ToolFailure("wan-data failed"), "wan-data failed"),
    ],
)
def test_an_error_of_a_stage_ends_the_run_in_a_sentence(error, sentence, folder, monkeypatch):
    def run(self: Workflow) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(WorldClips, "run", run)
    monkeypatch.setattr(sys, "argv", ["quickstart", "--folder", "q"])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    assert end.value.code == f"\nquickstart: {sentence}"
    assert _content(folder) == [".quickstart"]


# -- signals ----------------------------------------------------------------------------------------------------------

# A program with a worker in a session of its own, as the ranks of a training are; the worker ignores SIGTERM.
WORKER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
PROGRAM = f"""
import json, os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", {WORKER!r}], start_new_session=True, stdout=subprocess.PIPE)
worker.stdout.readline()
with open("started.new", "w") as file:
    json.dump([os.getpid(), worker.pid], file)
os.rename("started.new", "started")
time.sleep(600)
"""
TOOL = f"""
import signal, sys
from pathlib import Path
from common.commands import run_command
from common.ending import EndedBySignal, ending_commands
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored
for name in sys.argv[1:]:
    signal.signal(signal.Signals[name], signal.SIG_IGN)
try:
    with ending_commands():
        run_command("python", "-c", {PROGRAM!r}, folder=Path.cwd())
except EndedBySignal as end:
    print(end.sentence, file=sys.stderr)
    sys.exit(end.status)
"""
QUICKSTART = f"""
from quickstart import __main__ as command_line
from quickstart.world_clips import WorldClips
WorldClips.run = lambda self: self.stages.command("python", "-c", {PROGRAM!r})
command_line.main()
"""


@contextlib.contextmanager
def _started(folder: Path, code: str, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A tool whose program has started its worker, and the process ids of these two."""
    path = os.pathsep.join([str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A file and no pipe, which a worker that is left would keep open.
    with (folder / "errors").open("wb") as errors:
        tool = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path},
            stderr=errors,
            start_new_session=True,
        )
    processes: list[int] = []
    try:
        deadline = time.monotonic() + DEADLINE
        while not (folder / "started").exists():
            assert tool.poll() is None, (folder / "errors").read_text()
            assert time.monotonic() < deadline, "the program has not started"
            time.sleep(0.02)
        processes += json.loads((folder / "started").read_text())
        yield tool, processes
    finally:
        for process in [tool.pid, *processes]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        tool.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_commands_and_what_they_started(number, tmp_path):
    with default_signals(number), _started(tmp_path, TOOL) as (tool, processes):
        assert all(map(is_running, processes))
        tool.send_signal(number)
        assert tool.wait(DEADLINE) == 128 + number
        assert (tmp_path / "errors").read_text() == f"ended by {number.name}, and its commands with it\n"
        assert not any(map(is_running, processes))


def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    with _started(tmp_path, TOOL, "SIGHUP") as (tool, _):
        tool.send_signal(signal.SIGHUP)
        tool.send_signal(signal.SIGTERM)
        assert tool.wait(DEADLINE) == 128 + signal.SIGTERM


def test_the_quickstart_ends_with_its_commands_and_releases_its_folder(folder, tmp_path):
    with _started(tmp_path, QUICKSTART, "--folder", "q") as (tool, processes):
        with pytest.raises(ToolFailure, match=r"^another run, .* is writing to q;"):
            _prepare()
        tool.send_signal(signal.SIGTERM)
        assert tool.wait(DEADLINE) == 128 + signal.SIGTERM
        assert (tmp_path / "errors").read_text().splitlines()[
            -1
        ] == "quickstart: ended by SIGTERM, and its commands with it"
        assert not any(map(is_running, processes))
    _prepare()
