"""The peak memory of a process is its own, whatever started it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wan_model.system.memory import peak_memory, peak_resident

PRINTED = "from wan_model.system.memory import peak_resident; print(peak_resident())"


def test_it_counts_what_was_freed_meanwhile():
    before = peak_resident()
    assert 10**7 < before < 10**12
    held = np.ones(before + 10**8, np.uint8)
    del held
    assert before + 10**8 < peak_memory(torch.device("cpu")) < 2 * before + 10**9


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere the system knows no better")
def test_a_process_does_not_inherit_it():
    own = [int(subprocess.check_output([sys.executable, "-c", PRINTED])) for _ in range(2)]
    held = np.ones(2 * max(own), np.uint8)
    assert int(subprocess.check_output([sys.executable, "-c", PRINTED])) < 1.5 * max(own)
    del held
