"""Loading streams: beside the weights themselves, memory holds a small part of the file at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wan_model import WanConfig, WanDiT, save_transformer

# 250 MB in bf16, of which the largest tensor is 7 MB.
CONFIG = WanConfig(num_heads=8, head_dim=96, ffn_dim=4608, num_layers=10, text_dim=1024)

CHILD = """
import json, os, sys, torch
from pathlib import Path
from wan_model import load_transformer

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def measure(folder):
    before = status("VmRSS")
    model = load_transformer(Path(folder), dtype=torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    print(json.dumps({"before": before, "peak": status("VmHWM"), "weights": size}), flush=True)

torch.set_num_threads(1)
for folder in sys.argv[1:]:
    # A process of its own for each: what the first has freed would serve the second.
    if not (child := os.fork()):
        measure(folder)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = WanDiT(CONFIG)
    state = {key: torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in model.state_dict().items()}
    folders = {"one file": 10**10, "shards": 10**8}
    for name, shard_bytes in folders.items():
        save_transformer(state, CONFIG, tmp_path / name, shard_bytes=shard_bytes)
    assert [len(list((tmp_path / name).glob("*.safetensors"))) for name in folders] == [1, 3]
    command = [sys.executable, "-c", CHILD, *(str(tmp_path / name) for name in folders)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    for name, line in zip(folders, lines, strict=True):
        found = json.loads(line)
        assert found["weights"] > 2.4e8
        # The part of the file that is read at once is 64 MiB, however large the model; the rest is torch's own pages.
        assert found["peak"] - found["before"] < found["weights"] + 100 * 2**20, name
