"""Threads of a process that ends."""

import subprocess
import sys
import time

ENDING = """
import sys, threading, time
from wan_data.storage import background
begun = threading.Event()

def call(number):
    begun.set()
    time.sleep(float(sys.argv[1]))
    print(number, flush=True)

one = background.Background(1, "calls", computes=sys.argv[2] == "computes")
for number in range(3):
    one.submit(call, number)
begun.wait()
background._SECONDS_AT_EXIT = float(sys.argv[3])
"""


def ended(seconds, kind, at_exit):
    """A process that ends while a call of so many seconds is in progress."""
    command = [sys.executable, "-c", ENDING, str(seconds), kind, str(at_exit)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_what_computes_ends_and_nothing_else_begins():
    done = ended(1, "computes", 200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_stalled_call_does_not_hold_up_the_end():
    begin = time.monotonic()
    for kind, at_exit in (("computes", 2), ("waits", 600)):
        done = ended(600, kind, at_exit)
        assert (done.returncode, done.stdout) == (0, "")
    assert time.monotonic() - begin < 300
