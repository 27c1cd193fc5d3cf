"""A child ends when its parent does, however that happens, and says why it fails where that is read."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wan_model.system.child_process import Failure, Supervisor, error_message
from wan_model.testing.processes import Job, wait_until

LOST_PEER = RuntimeError("[x/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def raised(error: Exception, cause: Exception | None = None) -> Failure:
    try:
        raise error from cause
    except Exception as caught:
        return Failure.of(caught)


def test_a_failure_is_recorded_whole(tmp_path: Path) -> None:
    failure, path = raised(RuntimeError("two\nlines"), ValueError("ü")), tmp_path / "failure"
    with path.open("wb+") as file:
        assert Failure.read(file.fileno()) is None
        failure.write(path)
        assert Failure.read(file.fileno()) == failure
        file.truncate(path.stat().st_size - 1)
        assert Failure.read(file.fileno()) is None, "a part of it"
    assert "ValueError: ü" in failure.text
    assert failure.text.endswith("RuntimeError: two\nlines")
    assert (failure.code, failure.lost_peer) == (1, False)


def test_errors_of_the_system_are_sentences_and_others_keep_their_traceback() -> None:
    denied = raised(PermissionError(13, "Permission denied", "/data/iter_0000002"))
    assert (denied.code, denied.text) == (2, "cannot read or write /data/iter_0000002: Permission denied")
    lost = raised(ConnectionResetError(104, "Connection reset by peer"))
    assert lost.code == 1
    assert lost.text.endswith("\nConnectionResetError: [Errno 104] Connection reset by peer")


def test_what_follows_from_a_lost_peer_is_told_from_its_cause() -> None:
    assert raised(LOST_PEER).lost_peer
    assert raised(RuntimeError("NCCL communicator was aborted on rank 1")).lost_peer
    assert raised(torch.distributed.DistNetworkError("The client socket has failed")).lost_peer
    assert raised(RuntimeError("the checkpoint is not whole"), LOST_PEER).lost_peer
    assert not raised(RuntimeError("the checkpoint is not whole"), OSError(28, "No space left on device")).lost_peer
    assert not raised(ValueError("a sentence"), LOST_PEER).lost_peer


def test_an_error_is_shown_in_one_line_if_it_is_one() -> None:
    assert error_message("a sentence", 3) == "Error (rank 3): a sentence"
    assert error_message("a sentence", None) == "Error: a sentence"
    assert error_message("two\nlines", 0) == "Error (rank 0):\ntwo\nlines"


def supervisor(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Supervisor:
    for name in ("WAN_LAUNCHER_PID", "WAN_LAUNCHER_FAILURE_FILE", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Supervisor.find()


def test_the_launcher_reads_the_error_and_children_are_not_taken_for_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = supervisor(monkeypatch, WAN_LAUNCHER_PID="1", WAN_LAUNCHER_FAILURE_FILE=str(tmp_path / "failure"), RANK="2")
    assert ours.is_launcher
    assert not Supervisor.find().is_launcher
    assert ours.record(ValueError("no such recipe")) == 2
    with (tmp_path / "failure").open("rb") as file:
        recorded = Failure.read(file.fileno())
    assert recorded is not None
    assert (recorded.text, recorded.code) == ("no such recipe", 2)
    assert capsys.readouterr().err == ""
    # Where it cannot be recorded, it is shown all the same.
    lost = supervisor(
        monkeypatch, WAN_LAUNCHER_PID="1", WAN_LAUNCHER_FAILURE_FILE=str(tmp_path / "absent" / "failure"), RANK="2"
    )
    assert lost.record(ValueError("no such recipe")) == 2
    assert capsys.readouterr().err == "Error (rank 2): no such recipe\n"


def test_torchrun_gets_the_error_for_its_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "error.json"
    torchruns = supervisor(monkeypatch, TORCHELASTIC_RUN_ID="x", TORCHELASTIC_ERROR_FILE=str(file), RANK="1")
    assert not torchruns.is_launcher
    assert torchruns.record(ValueError("no such recipe")) == 2
    assert json.loads(file.read_text())["message"]["message"] == "ValueError: no such recipe"
    assert capsys.readouterr().err == "Error (rank 1): no such recipe\n"


def test_without_a_supervisor_the_error_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = supervisor(monkeypatch)
    alone.follow()
    assert alone.record(ValueError("no such recipe")) == 2
    assert capsys.readouterr().err == "Error: no such recipe\n"


@pytest.mark.parametrize("code", [0, 3])
def test_after_an_error_the_interpreter_is_not_finalized(code: int) -> None:
    program = (
        "import atexit, sys, threading\n"
        "from wan_model.system.child_process import end_process\n"
        "atexit.register(print, 'finalized')\n"
        "threading.Thread(target=threading.Event().wait, args=(1e6,), daemon=sys.argv[1] == '0').start()\n"
        "print('said before')\n"
        "end_process(int(sys.argv[1]))"
    )
    command = [sys.executable, "-c", program, str(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code
    assert done.stderr == ""
    assert done.stdout.split("\n")[:-1] == (["said before"] if code else ["said before", "finalized"])


# -- following the parent ---------------------------------------------------------------------------------------------

# A parent, its child that follows it, and the child's child.
FAMILY = """
import os, subprocess, sys, time
if sys.argv[1] == "parent":
    subprocess.Popen([sys.executable, __file__, "child", str(os.getpid())], start_new_session=sys.argv[2] == "group")
    time.sleep(600)
from pathlib import Path
from wan_model.system import child_process
WITHOUT_PIDFD
child_process.follow_parent(int(sys.argv[2]))
if os.getpgrp() == os.getpid(): subprocess.Popen(["sleep", "600"])
Path(__file__).with_name("1.partial").write_text(str(os.getpid()))
Path(__file__).with_name("1.partial").rename(Path(__file__).with_name("1"))
time.sleep(600)
"""


@pytest.fixture
def jobs() -> Iterator[list[Job]]:
    jobs: list[Job] = []
    yield jobs
    for job in jobs:
        job.end()


@pytest.mark.parametrize("how", ["group", "alone", "stopped", "without pidfd"])
def test_a_child_ends_with_its_parent(how: str, jobs: list[Job], tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    # As on a system that has no pidfd_open, or does not allow it.
    without = "def refuse(pid): raise PermissionError\nos.pidfd_open = refuse" if how == "without pidfd" else ""
    script.write_text(FAMILY.replace("WITHOUT_PIDFD", without))
    grouped = "alone" if how == "alone" else "group"
    jobs.append(job := Job.start([sys.executable, str(script), "parent", grouped], tmp_path))
    pid = job.pid(1)
    assert len(job.alive()) == (2 if how == "alone" else 3)
    if how == "stopped":
        os.kill(pid, signal.SIGSTOP)
    job.process.kill()
    job.code()
    wait_until(lambda: not job.alive(), "all have ended", 20.0)
    assert job.error_lines() == []


def test_a_parent_that_is_gone_already_is_noticed() -> None:
    # It says it follows this process, whose child it is not.
    program = "import sys, time; from wan_model.system import child_process as c; c.follow_parent(int(sys.argv[1]))"
    command = f"[sys.executable, '-c', {program + '; time.sleep(600)'!r}, sys.argv[1]]"
    parent = f"import subprocess, sys; sys.exit(subprocess.run({command}).returncode)"
    done = subprocess.run([sys.executable, "-c", parent, str(os.getpid())], check=False, timeout=60)
    assert done.returncode == 1


def test_what_is_waited_for_may_be_anything() -> None:
    imports = "import time; from wan_model.system.child_process import end_after"
    program = f"{imports}; end_after(lambda: None); time.sleep(600)"
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == 1


def test_it_imports_no_torch() -> None:
    program = (
        "import sys, wan_model.system.child_process, wan_model.system.launcher\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'a command would start slowly'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
