"""Ranks under torchrun: each file and each shard belongs to one of them, and the bytes are those of one process."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from folder_digests import without_index
from thread_ranks import ThreadRanks
from torch.distributed import HashStore, TCPStore

from wan_data.prepare import ranks as ranks_module
from wan_data.prepare.ranks import ranks_from_environment
from wan_model.testing.processes import Job

RANK = """
import json, os, sys
from pathlib import Path

import torch
torch.set_num_threads(1)
from wan_data import cli
from wan_data.prepare.probing.source_probe import SourceProbe
from wan_data.prepare import local_workers

log = Path(sys.argv[1]) / f"rank{os.environ['RANK']}.jsonl"
probe, finish = SourceProbe.probe, local_workers.write_shard

def note(**what):
    with log.open("a") as file:
        file.write(json.dumps(what) + "\\n")

def logged_probe(self, source, *more):
    note(probed=source.name)
    return probe(self, source, *more)

def logged_finish(folder, plan, *more):
    note(wrote=plan.number)
    return finish(folder, plan, *more)

SourceProbe.probe, local_workers.write_shard = logged_probe, logged_finish
cli.main(sys.argv[2:])
"""


def test_every_file_and_shard_belongs_to_one_rank(dataset, clips, tiny_model, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=localhost"),
        *(script, tmp_path, "prepare", "--video-folder", clips, "--output-folder", tmp_path / "out"),
        *("--model", tiny_model, "--area", 1536, "--frames", 9, "--min-frames", 5, "--samples-per-shard", 3),
        *("--device", "cpu", "--num-decoders", 1, "--validation-fraction", 1e-4),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("14 samples") == 1, "one rank reports"
    logs = [path.read_text().splitlines() for path in tmp_path.glob("rank*.jsonl")]
    assert len(logs) == 2
    lines = [json.loads(line) for log in logs for line in log]
    probed = sorted(line["probed"] for line in lines if "probed" in line)
    assert probed == sorted(path.relative_to(clips).as_posix() for path in clips.rglob("*.mkv"))
    assert sorted(line["wrote"] for line in lines if "wrote" in line) == [0, 1, 2, 3, 4]
    assert without_index(tmp_path / "out") == without_index(dataset)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_items_are_distributed_exactly_once_among_any_number_of_ranks(count):
    store, items = HashStore(), list(range(20))
    arrived, claimed = [], []

    def run(rank):
        ranks = ThreadRanks(store, rank, count)
        mine = ranks.partition(items)
        arrived.append(rank)
        ranks.barrier("arrived")
        all_here = len(arrived) == count
        for name in ("unfinished", "new"):
            claimed.extend((name, item) for item in ranks.claim(items, name))
        return mine, all_here

    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        results = list(threads.map(run, range(count)))
    assert sorted(item for mine, _ in results for item in mine) == items
    assert all(all_here for _, all_here in results), "nobody passes a barrier before all are there"
    assert sorted(claimed) == sorted((name, item) for name in ("unfinished", "new") for item in items)


def test_a_rank_that_works_for_long_is_waited_for_and_one_without_a_sign_of_life_is_not(monkeypatch):
    monkeypatch.setattr(ranks_module, "_SILENT_SECONDS", 1.0)
    monkeypatch.setattr(ranks_module, "_BEAT_SECONDS", 0.05)
    store, end = HashStore(), threading.Event()
    waits, works = ThreadRanks(store, 0, 2), ThreadRanks(store, 1, 2)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        beats = threads.submit(works._beat, end)
        passed = threads.submit(waits.barrier, "late")
        with pytest.raises(TimeoutError):
            passed.result(2.5)
        works.barrier("late")
        passed.result(60.0)
        end.set()
        beats.result(60.0)
    with pytest.raises(ChildProcessError, match=r"rank 1 has given no sign of life for 1 seconds: .*run the same"):
        waits.barrier("never")


STORES = []  # a rank of this process uses one until its end
SECOND = """
import time
from wan_data.prepare import ranks
ranks._BEAT_SECONDS = 0.1
second = ranks.ranks_from_environment()
second.barrier("started")
time.sleep(600)
"""


def test_a_stopped_rank_is_named(monkeypatch, tmp_path):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    STORES.append(store)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    job = Job.start([sys.executable, "-c", SECOND], tmp_path, **shared, RANK="1")
    try:
        for name, value in {**shared, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        first = ranks_from_environment()
        first.barrier("started")
        job.process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(ranks_module, "_SILENT_SECONDS", 1.0)
        with pytest.raises(ChildProcessError, match="rank 1 has given no sign of life"):
            first.barrier("never")
    finally:
        job.end()
