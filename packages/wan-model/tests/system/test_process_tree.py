import os
import signal
import subprocess
import sys

import pytest

from wan_model.system import process_tree
from wan_model.testing.processes import wait_until


@pytest.fixture
def sleeper():
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"]) as process:
        yield process.pid
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_only_what_stays_stopped_is_found(sleeper, monkeypatch):
    clock = 0.0
    monkeypatch.setattr(process_tree.time, "monotonic", lambda: clock)
    stopped = process_tree.StoppedProcesses(2.0)

    def look(passed):
        nonlocal clock
        clock += passed
        return stopped.look([sleeper, os.getpid(), 1 << 30])

    assert look(0.5) == look(0.5) == look(600.0) == []
    with monkeypatch.context() as real:
        real.undo()
        os.kill(sleeper, signal.SIGSTOP)
        wait_until(lambda: process_tree._state_and_parent(sleeper)[0] == "T", "it is stopped")
    clock = 1000.0
    stopped = process_tree.StoppedProcesses(2.0)
    assert look(0.5) == look(0.5) == [], "seen for half a second"
    assert look(3600.0) == [], "who looks was stopped meanwhile"
    assert look(0.5) == [sleeper]
    os.kill(sleeper, signal.SIGCONT)
    with monkeypatch.context() as real:
        real.undo()
        wait_until(lambda: process_tree._state_and_parent(sleeper)[0] != "T", "it goes on")
    assert look(0.5) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_processes_are_found_by_their_environment(monkeypatch):
    monkeypatch.setenv("WAN_TEST_SOUGHT", "a=b")
    command = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(command, start_new_session=True) as process:
        wait_until(lambda: process_tree.environment_of(process.pid).get("WAN_TEST_SOUGHT") == "a=b", "it has begun")
        assert process_tree.processes_with("WAN_TEST_SOUGHT", "a=b") == [process.pid]
        assert process_tree.processes_with("WAN_TEST_SOUGHT", "a") == []
        assert process_tree.is_running(process.pid)
        process.kill()
        # Its exit status is not collected, so its entry in /proc stays.
        wait_until(lambda: not process_tree.is_running(process.pid), "it has ended")
        assert os.path.exists(f"/proc/{process.pid}")
        assert process_tree.processes_with("WAN_TEST_SOUGHT", "a=b") == []
    assert not process_tree.is_running(process.pid)
    assert process_tree.environment_of(process.pid) == {}
