"""Imported first by the fork server of the encoding processes: it ends with the command, also while it still imports.

Otherwise it would notice the end of the command when it has imported what it preloads, seconds later. A thread that
waits for the end would be in every process that it forks.
"""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1

if sys.platform == "linux":
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))  # a fork does not inherit it
