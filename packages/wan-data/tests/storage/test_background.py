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

one = background.Background(1, "calls")
for number in range(3):
    one.submit(call, number)
begun.wait()
background._SECONDS_AT_EXIT = 2.0
"""


def test_what_is_in_progress_ends_and_nothing_else_begins():
    done = subprocess.run([sys.executable, "-c", ENDING, "1"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_stalled_call_does_not_hold_up_the_end():
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", ENDING, "600"], capture_output=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, b"")
    assert time.monotonic() - begin < 300
