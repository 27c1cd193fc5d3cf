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
