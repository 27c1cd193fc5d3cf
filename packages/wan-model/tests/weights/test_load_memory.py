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
import json, sys, torch
from pathlib import Path
from wan_model import load_transformer

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
before = status("VmRSS")
model = load_transformer(Path(sys.argv[1]), dtype=torch.bfloat16)
size = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"before": before, "peak": status("VmHWM"), "weights": size}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("shard_bytes", [10**10, 10**8], ids=["one file", "shards"])
def test_peak_memory_of_loading(tmp_path: Path, shard_bytes: int) -> None:
    with torch.device("meta"):
        model = WanDiT(CONFIG)
    state = {key: torch.zeros(value.shape, dtype=torch.bfloat16) for key, value in model.state_dict().items()}
    save_transformer(state, CONFIG, tmp_path, shard_bytes=shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if shard_bytes == 10**10 else 3)
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(child.stdout)
    assert found["weights"] > 2.4e8
    # The part of the file that is read at once is 64 MiB, however large the model; the rest is torch's own pages.
    assert found["peak"] - found["before"] < found["weights"] + 100 * 2**20
