"""The GPU check on a CPU: every stage at a tiny size, and what becomes of stages that fail, hang or crash."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wan_model.system.process_tree import is_running
from wan_model.testing.processes import default_signals, wait_until

TOOLS = Path(__file__).parents[1] / "tools"
LAST_LINE = re.compile(r"(\d+) rows passed, (\d+) failed, (\d+) not run in \d+ s on cpu")

PLANTED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from gpu.rows import Failed, Found, NotRun

def fine(context):
    yield from context.row("one", lambda: Found("it holds", {"value": 0.5, "huge": float("inf")}))
    yield from context.row("two", lambda: Found("it holds", table=[{"kernel": "a|b", "ms": 1.5}]))

def failing(context):
    def wrong():
        raise Failed("off by more than rounding", {"error": 1.01})
    def lacking():
        raise NotRun("no GPU")
    yield from context.row("wrong", wrong)
    yield from context.row("broken", lambda: Found(f"{1 / 0}"))
    yield from context.row("absent", lambda: Found(__import__("transformer_engine").__name__))
    yield from context.row("lacking", lacking)
    raise LookupError("between two rows")

def overrunning(context):
    def hang():
        # A child in a session of its own, as every rank of a launch is.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        Path(os.environ["PLANTED_PID"]).write_text(str(child.pid))
        time.sleep(600)
    yield from context.row("before", lambda: Found("it holds"))
    yield from context.row("hanging", hang)

def crashing(context):
    yield from context.row("before", lambda: Found("it holds"))
    yield from context.row("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    yield from context.row("behind", lambda: Found("it holds"))
"""

DRIVER = """
import sys
from pathlib import Path
from gpu.check import Check
from gpu.stages import Stage

names = sys.argv[3:]
stages = [Stage(n, n.title(), f"planted:{n}", 4 if n == "overrunning" else 30) for n in names]
sys.exit(Check(Path(sys.argv[1]), float(sys.argv[2]), "cpu", stages).run())
"""


@pytest.fixture(autouse=True)
def signals_as_in_a_shell():
    """Also where the tests run in the background."""
    with default_signals(signal.SIGINT, signal.SIGHUP):
        yield


@pytest.fixture(autouse=True)
def no_check_is_left():
    """No check outlives its test."""
    yield
    for check in _STARTED:
        check.kill()
        check.communicate()
    _STARTED.clear()


_STARTED: list["subprocess.Popen[str]"] = []


def _start(folder: Path, minutes: float, *stages: str) -> "subprocess.Popen[str]":
    (folder / "planted.py").write_text(PLANTED)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(TOOLS), os.environ.get("PYTHONPATH", "")]),
        "PLANTED_PID": str(folder / "pid"),
    }
    command = [sys.executable, "-c", DRIVER, str(folder / "out"), str(minutes), *stages]
    check = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _STARTED.append(check)
    return check


def _report(folder: Path) -> dict:
    return json.loads((folder / "out" / "gpu_check.json").read_text())


def _rows(stage: dict) -> dict[str, tuple[str, str]]:
    return {row["name"]: (row["outcome"], row["why"]) for row in stage["rows"]}


def test_stages_that_fail_hang_or_crash_end_alone(tmp_path):
    check = _start(tmp_path, 2.5, "failing", "overrunning", "crashing", "fine")
    output, errors = check.communicate(timeout=170)
    assert (check.returncode, errors) == (1, "")
    report = _report(tmp_path)
    failing, overrunning, crashing, fine = report["stages"]
    assert report["finished"]
    assert _rows(failing) == {
        "wrong": ("failed", "off by more than rounding"),
        "broken": ("failed", "ZeroDivisionError: division by zero"),
        "absent": ("not run", "the package transformer_engine is not installed"),
        "lacking": ("not run", "no GPU"),
        "the stage itself": ("failed", "LookupError: between two rows"),
    }
    wrong, broken, *_, whole = failing["rows"]
    assert wrong["numbers"] == {"error": 1.01}
    assert broken["traceback"][-1] == "ZeroDivisionError: division by zero"
    assert "between two rows" in whole["traceback"][-1]

    assert _rows(overrunning)["before"] == ("passed", "it holds")
    outcome, why = _rows(overrunning)["the stage itself"]
    assert outcome == "failed"
    assert re.fullmatch(r"it overran its \d+ s in 'hanging' and was killed; what follows was not measured", why), why
    assert overrunning["seconds"] < overrunning["deadline"] + 5
    assert not is_running(int((tmp_path / "pid").read_text())), "a child of the stage runs on"

    assert _rows(crashing) == {
        "before": ("passed", "it holds"),
        "crash": ("failed", "its process was ended by SIGSEGV"),
        "behind": ("passed", "it holds"),
    }
    assert set(_rows(fine).values()) == {("passed", "it holds")}

    last = output.strip().splitlines()[-1]
    assert LAST_LINE.fullmatch(last).groups() == ("5", "5", "2")
    assert report["counts"] == {"passed": 5, "failed": 5, "not run": 2}
    markdown = (tmp_path / "out" / "gpu_check.md").read_text()
    assert last in markdown
    assert "- Crashing: **crash**: its process was ended by SIGSEGV" in markdown
    assert "| one | passed | it holds | value 0.5; huge inf |" in markdown
    assert "| a\\|b | 1.5 |" in markdown
    assert all(f"## {stage['title']}\n" in markdown for stage in report["stages"])


def test_nothing_failed_is_exit_status_0(tmp_path):
    check = _start(tmp_path, 2, "fine")
    output, errors = check.communicate(timeout=150)
    assert (check.returncode, errors) == (0, "")
    assert LAST_LINE.fullmatch(output.strip().splitlines()[-1]).groups() == ("2", "0", "0")


def _start_and_wait(folder: Path) -> "subprocess.Popen[str]":
    """A check whose second stage hangs."""
    check = _start(folder, 20, "fine", "overrunning", "failing")
    pid = folder / "pid"
    wait_until(lambda: pid.exists() and pid.read_text() != "", "the second stage runs")
    return check


def test_a_killed_check_leaves_its_rows(tmp_path):
    check = _start_and_wait(tmp_path)
    check.kill()
    check.communicate(timeout=60)
    report = _report(tmp_path)
    assert not report["finished"]
    assert set(_rows(report["stages"][0])) == {"one", "two"}
    # The rank-like child is in a session of its own: only a check that is asked to end finds it. Real ranks follow
    # their launcher.
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT] * 3, [signal.SIGHUP, signal.SIGTERM]], ids=str)
def test_a_check_that_is_asked_to_end_leaves_its_report_and_no_process(tmp_path, numbers):
    check = _start_and_wait(tmp_path)
    for number in numbers:
        check.send_signal(number)
        time.sleep(0.1)
    output, errors = check.communicate(timeout=60)
    assert (check.returncode, errors) == (128 + numbers[0], "")
    report = _report(tmp_path)
    fine, overrunning, failing = report["stages"]
    assert not report["finished"]
    assert set(_rows(fine)) == {"one", "two"}
    assert _rows(overrunning)["the stage itself"] == ("not run", "the check was ended in 'hanging'")
    assert _rows(failing) == {"the stage itself": ("not run", "the check was ended before")}
    assert report["counts"] == {"passed": 3, "failed": 0, "not run": 2}
    assert output.endswith("on cpu; the check has not come to its end\n")
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_a_check_under_nohup_goes_on_at_a_hangup(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        check = _start_and_wait(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    check.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert check.poll() is None
    check.terminate()
    check.communicate(timeout=60)
    assert check.returncode == 128 + signal.SIGTERM


def test_a_second_check_in_the_same_folder_is_refused(tmp_path):
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        command = [sys.executable, str(TOOLS / "gpu_check.py"), "--device", "cpu", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        os.close(holder)
    assert done.returncode == 2
    assert f"--out is {tmp_path}, where another check writes its report; name another folder" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_no_folder_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--device", "cpu", "--out", str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: --out is" in done.stderr
    assert "where nothing can be written (File exists); name another folder" in done.stderr


def test_every_stage_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--out", str(tmp_path), "--minutes", "20"]
    # As on a machine where none of the packages is installed, as far as paths go.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--device", "cpu", "--quick"], capture_output=True, text=True, env=environment, timeout=600
    )
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    failed = [row for stage in report["stages"] for row in stage["rows"] if row["outcome"] == "failed"]
    assert failed == []
    assert (done.returncode, done.stderr) == (0, "")
    assert [stage["name"] for stage in report["stages"]] == [
        "versions", "training", "sampler", "kernels", "attention", "model", "step", "bandwidth", "bridge", "sampling",
        "autoencoder", "profile",
    ]  # fmt: skip
    reasons = {
        row["why"] for stage in report["stages"] for row in stage["rows"] if row["outcome"] == "not run"
    }  # fmt: skip
    assert reasons == {"no GPU", "left out by --quick"}
    for stage in report["stages"]:
        names = [row["name"] for row in stage["rows"]]
        assert len(set(names)) == len(names), f"{stage['name']} has two rows of a name"
        assert any(row["outcome"] == "passed" for row in stage["rows"]), stage["name"]
        assert all(row["why"] for row in stage["rows"])
    by_name = {row["name"]: row for stage in report["stages"] for row in stage["rows"]}
    assert by_name["one video: auto, all_but_attention"]["numbers"]["tokens/s"] > 0
    assert by_name["calls, auto, block"]["numbers"]["forward"] == 16
    assert len(by_name["one video"]["table"]) == 20
    passed, failures, not_run = map(int, LAST_LINE.fullmatch(done.stdout.strip().splitlines()[-1]).groups())
    assert report["counts"] == {"passed": passed, "failed": failures, "not run": not_run}
    assert passed >= 70
    assert f"{passed} rows passed" in (tmp_path / "gpu_check.md").read_text()
