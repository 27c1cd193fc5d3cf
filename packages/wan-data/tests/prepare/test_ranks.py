"""Several launches under torchrun: each file and each shard falls to one of them, and the bytes are those of one."""

import json
import os
import subprocess
import sys

import pytest

from wan_model.system.files import sha256_of

RANK = """
import json, os, sys
from pathlib import Path

import torch
torch.set_num_threads(1)
from wan_data import cli
from wan_data.prepare import probe
from wan_data.prepare.run import _Preparation

log = Path(sys.argv[1]) / f"rank{os.environ['RANK']}.jsonl"
probe_source, finish = probe._probe_source, _Preparation._write_shard

def note(**what):
    with log.open("a") as file:
        file.write(json.dumps(what) + "\\n")

def logged_probe(source, *more):
    note(probed=source.name)
    return probe_source(source, *more)

def logged_finish(self, plan, *more):
    note(wrote=plan.number)
    return finish(self, plan, *more)

probe._probe_source, _Preparation._write_shard = logged_probe, logged_finish
cli.main(sys.argv[2:])
"""


def bytes_of(folder):
    return {
        path.relative_to(folder).as_posix(): sha256_of(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".sqlite"
    }


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_file_and_shard_falls_to_one_rank(dataset, clips, tiny_model, tmp_path, ranks):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"),
        *(script, tmp_path, "prepare", "--video-folder", clips, "--output-folder", tmp_path / "out"),
        *("--model", tiny_model, "--area", 1536, "--frames", 9, "--min-frames", 5, "--samples-per-shard", 3),
        *("--device", "cpu", "--num-decoders", 1),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14 samples") == 1, "one rank reports"
    lines = [json.loads(line) for path in tmp_path.glob("rank*.jsonl") for line in path.read_text().splitlines()]
    assert len(list(tmp_path.glob("rank*.jsonl"))) == ranks
    probed = sorted(line["probed"] for line in lines if "probed" in line)
    assert probed == sorted(path.relative_to(clips).as_posix() for path in clips.rglob("*.mkv"))
    assert sorted(line["wrote"] for line in lines if "wrote" in line) == [0, 1, 2, 3, 4]
    assert bytes_of(tmp_path / "out") == bytes_of(dataset)
